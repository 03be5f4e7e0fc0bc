import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hff_modules.heads import BLSTMHead, PooledClassifier, Pooling, SpeakerHead


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


def test_pooling_is_the_mean_and_deviation_of_the_valid_frames():
    torch.manual_seed(0)
    features, lengths = torch.randn(3, 7, 4), torch.tensor([7, 3, 1])
    features[1, 3:], features[2, 1:] = 1e4, float("nan")
    pooled = Pooling("mean_std")(features, lengths)
    for row, length in enumerate(lengths.tolist()):
        valid = features[row, :length]
        deviation = valid.std(0, correction=0).clamp(min=1e-5)
        torch.testing.assert_close(pooled[row], torch.cat([valid.mean(0), deviation]))
    assert torch.equal(Pooling("mean")(features, lengths), pooled[:, :4])


def test_pooling_a_single_frame_has_a_finite_gradient():
    features = torch.ones(1, 1, 3, requires_grad=True)
    Pooling("mean_std")(features, torch.tensor([1])).sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("pooling", Pooling.KINDS)
@pytest.mark.parametrize("kind", ["classifier", "speaker"])
def test_padding_does_not_change_the_result_for_an_utterance(kind, pooling):
    torch.manual_seed(0)
    if kind == "speaker":
        head = SpeakerHead(6, embedding_size=5, pooling=pooling)
    else:
        head = PooledClassifier(6, {"a": 3, "b.c": 2}, pooling=pooling)
    head.eval()
    features, lengths = torch.randn(2, 40, 6), torch.tensor([40, 11])
    together, alone = head(features, lengths), head(features[1:, :11], torch.tensor([11]))
    if kind == "speaker":
        together, alone = {"": together}, {"": alone}
    assert together.keys() == alone.keys()
    for name, scores in together.items():
        assert (scores[1] - alone[name][0]).abs().max() < 1e-6


def test_a_pooling_that_is_not_there_and_a_classifier_without_slots_are_refused():
    with pytest.raises(ValueError, match="pooling='max': expected one of mean, mean_std"):
        SpeakerHead(6, pooling="max")
    with pytest.raises(ValueError, match="at least one slot"):
        PooledClassifier(6, {})
