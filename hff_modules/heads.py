"""CTC heads: fused features -> one score per unit and frame.

All are called as ``head(features, lengths)`` and none lets padding change a valid frame.
Linear and DNN heads follow SpeechBrain's CTC recipes, the BLSTM head SUPERB (arXiv 2105.01051).
"""

import torch
from torch import nn


class LinearHead(nn.Module):
    """Dropout and one linear layer.

    Arguments
    ---------
    input_size : int
        Width of the features.
    num_units : int
        Units to score, the blank included.
    dropout : float

    Example
    -------
    >>> LinearHead(8, 30)(torch.zeros(2, 5, 8), torch.tensor([5, 3])).shape
    torch.Size([2, 5, 30])
    """

    def __init__(self, input_size: int, num_units: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(input_size, num_units)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Score units.

        Arguments
        ---------
        features : torch.Tensor
            (batch, frames, input_size).
        lengths : torch.Tensor
            (batch,), valid frames of each utterance.

        Returns
        -------
        torch.Tensor
            Logits, (batch, frames, num_units).
        """
        return self.output(self.dropout(features))


class DNNHead(nn.Module):
    """Feed-forward layers, then a linear one. LayerNorm, since BatchNorm would count the padding.

    Arguments
    ---------
    input_size : int
        Width of the features.
    num_units : int
        Units to score, the blank included.
    hidden_size : int
    num_layers : int
        Hidden layers.
    dropout : float

    Example
    -------
    >>> DNNHead(8, 30, hidden_size=16)(torch.zeros(2, 5, 8), torch.tensor([5, 3])).shape
    torch.Size([2, 5, 30])
    """

    def __init__(
        self,
        input_size: int,
        num_units: int,
        hidden_size: int = 512,
        num_layers: int = 2,
        dropout: float = 0.1,
    ):
        super().__init__()
        blocks = []
        for _ in range(num_layers):
            blocks += [
                nn.Linear(input_size, hidden_size),
                nn.LayerNorm(hidden_size),
                nn.LeakyReLU(),
                nn.Dropout(dropout),
            ]
            input_size = hidden_size
        self.hidden = nn.Sequential(*blocks)
        self.output = nn.Linear(input_size, num_units)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Score units; arguments and result as for :class:`LinearHead`."""
        return self.output(self.hidden(features))


class BLSTMHead(nn.Module):
    """Bidirectional LSTM whose backward pass starts at each utterance's last valid frame.

    Two LSTMs, one on the frames of each utterance in reverse, give what packed sequences give. On a
    CPU, packed sequences are stepped through one by one, and training takes ten times as long.

    Arguments
    ---------
    input_size : int
        Width of the features.
    num_units : int
        Units to score, the blank included.
    hidden_size : int
        Per direction.
    num_layers : int
    dropout : float
        Between layers and before the output.

    Example
    -------
    >>> BLSTMHead(8, 30, hidden_size=16)(torch.zeros(2, 5, 8), torch.tensor([5, 3])).shape
    torch.Size([2, 5, 30])
    """

    def __init__(
        self,
        input_size: int,
        num_units: int,
        hidden_size: int = 256,
        num_layers: int = 1,
        dropout: float = 0.1,
    ):
        super().__init__()
        sizes = [input_size] + [2 * hidden_size] * (num_layers - 1)
        self.onward = nn.ModuleList(nn.LSTM(n, hidden_size, batch_first=True) for n in sizes)
        self.reverse = nn.ModuleList(nn.LSTM(n, hidden_size, batch_first=True) for n in sizes)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(2 * hidden_size, num_units)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Score units; arguments and result as for :class:`LinearHead`."""
        frames = torch.arange(features.shape[1], device=features.device)
        mirrored = lengths.unsqueeze(1) - 1 - frames
        order = torch.where(mirrored >= 0, mirrored, frames).unsqueeze(-1)  # padding stays behind
        hidden = features
        for onward, reverse in zip(self.onward, self.reverse, strict=True):
            ahead, _ = onward(hidden)
            back, _ = reverse(hidden.gather(1, order.expand_as(hidden)))
            hidden = torch.cat([ahead, back.gather(1, order.expand_as(back))], dim=-1)
            hidden = self.dropout(hidden)
        return self.output(hidden)
