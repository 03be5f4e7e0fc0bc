import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hff_modules.heads import BLSTMHead


def test_blstm_equals_torchs_own_on_packed_sequences():
    torch.manual_seed(0)
    head = BLSTMHead(6, 5, hidden_size=4, num_layers=2, dropout=0.0)
    reference = nn.LSTM(6, 4, num_layers=2, batch_first=True, bidirectional=True)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    for layer in range(2):
        for suffix, lstm in (("", head.onward[layer]), ("_reverse", head.reverse[layer])):
            for name in names:
                value = getattr(lstm, f"{name}_l0").data
                getattr(reference, f"{name}_l{layer}{suffix}").data.copy_(value)
    features, lengths = torch.randn(3, 9, 6), torch.tensor([4, 9, 7])
    packed = pack_padded_sequence(features, lengths, batch_first=True, enforce_sorted=False)
    hidden, _ = pad_packed_sequence(reference(packed)[0], batch_first=True)
    scores = head(features, lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(scores[row, :length], head.output(hidden[row, :length]))
