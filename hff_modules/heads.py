"""Heads: fused features -> scores of units per frame, of classes or an embedding per utterance.

All are called as ``head(features, lengths)`` and none lets padding change a result. Linear and DNN
heads follow SpeechBrain's CTC recipes; the BLSTM head and those for utterances follow SUPERB
(arXiv 2105.01051), mean and deviation pooling x-vectors (Snyder et al., ICASSP 2018).
"""

from collections.abc import Mapping

import torch
from torch import nn

from hff_modules.frontend import valid_mask


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
            # Under autocast cuDNN would take fp16 whatever was asked for: bf16 has no loss scaling.
            with torch.autocast(features.device.type, enabled=False):
                hidden = hidden.to(onward.weight_ih_l0.dtype)
                ahead, _ = onward(hidden)
                back, _ = reverse(hidden.gather(1, order.expand_as(hidden)))
            hidden = torch.cat([ahead, back.gather(1, order.expand_as(back))], dim=-1)
            hidden = self.dropout(hidden)
        return self.output(hidden)


class Pooling(nn.Module):
    """Mean, or mean and standard deviation, of the valid frames.

    SpeechBrain's ``StatisticsPooling`` adds noise to the means, in evaluation as well.

    Arguments
    ---------
    kind : str
        "mean" or "mean_std".

    Example
    -------
    >>> pooling = Pooling("mean_std")
    >>> pooling(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([2]))
    tensor([[2., 1.]])
    """

    KINDS = ("mean", "mean_std")

    def __init__(self, kind: str = "mean_std"):
        super().__init__()
        if kind not in self.KINDS:
            raise ValueError(f"pooling={kind!r}: expected one of {', '.join(self.KINDS)}")
        self.kind = kind

    def output_size(self, input_size: int) -> int:
        """Width of what is given for features of width ``input_size``."""
        return input_size * (2 if self.kind == "mean_std" else 1)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Pool features (batch, frames, width), valid frames (batch,), to (batch, output_size)."""
        lengths = lengths.to(features.device)
        padding = ~valid_mask(lengths, features.shape[1]).unsqueeze(-1)
        count = lengths.clamp(min=1).unsqueeze(-1)
        mean = features.masked_fill(padding, 0.0).sum(1) / count
        if self.kind == "mean":
            return mean
        squares = (features - mean.unsqueeze(1)).square().masked_fill(padding, 0.0)
        # Kept above 0, where the square root has no gradient: a single frame has no deviation.
        deviation = (squares.sum(1) / count).clamp(min=1e-10).sqrt()
        return torch.cat([mean, deviation], dim=-1)


class PooledClassifier(nn.Module):
    """Projection of each frame, pooling over the utterance, one linear layer for each slot.

    Arguments
    ---------
    input_size : int
        Width of the features.
    slots : Mapping[str, int]
        Number of classes of each slot, by name; one slot for a plain classifier.
    pooling : str
        "mean_std" or "mean".
    hidden_size : int
        Width of the projection.
    dropout : float
        On the features and on what was pooled.

    Example
    -------
    >>> head = PooledClassifier(8, {"action": 6, "object": 14})
    >>> logits = head(torch.zeros(2, 5, 8), torch.tensor([5, 3]))
    >>> {slot: tuple(scores.shape) for slot, scores in logits.items()}
    {'action': (2, 6), 'object': (2, 14)}
    """

    def __init__(
        self,
        input_size: int,
        slots: Mapping[str, int],
        pooling: str = "mean_std",
        hidden_size: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        if not slots:
            raise ValueError("slots: expected the number of classes of at least one slot")
        self.slots = dict(slots)
        self.projection = _projection(input_size, hidden_size, dropout)
        self.pooling = Pooling(pooling)
        self.dropout = nn.Dropout(dropout)
        width = self.pooling.output_size(hidden_size)
        # A list: names of slots come from the data and may be no names for modules.
        self.outputs = nn.ModuleList(nn.Linear(width, classes) for classes in self.slots.values())

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Score classes.

        Arguments
        ---------
        features : torch.Tensor
            (batch, frames, input_size).
        lengths : torch.Tensor
            (batch,), valid frames of each utterance.

        Returns
        -------
        dict[str, torch.Tensor]
            Logits (batch, classes) by slot.
        """
        pooled = self.dropout(self.pooling(self.projection(features), lengths))
        return {slot: output(pooled) for slot, output in zip(self.slots, self.outputs, strict=True)}


class SpeakerHead(nn.Module):
    """Projection of each frame, pooling over the utterance, one linear layer to an embedding.

    What tells the training speakers apart is a module of its own, left behind after training.

    Arguments
    ---------
    input_size : int
        Width of the features.
    embedding_size : int
    pooling : str
        "mean_std" or "mean".
    hidden_size : int
        Width of the projection.
    dropout : float
        On the features.

    Example
    -------
    >>> SpeakerHead(8)(torch.zeros(2, 5, 8), torch.tensor([5, 3])).shape
    torch.Size([2, 192])
    """

    def __init__(
        self,
        input_size: int,
        embedding_size: int = 192,
        pooling: str = "mean_std",
        hidden_size: int = 512,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.embedding_size = embedding_size
        self.projection = _projection(input_size, hidden_size, dropout)
        self.pooling = Pooling(pooling)
        self.embedding = nn.Linear(self.pooling.output_size(hidden_size), embedding_size)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Give embeddings (batch, embedding_size) for features (batch, frames, input_size)."""
        return self.embedding(self.pooling(self.projection(features), lengths))


def _projection(input_size: int, hidden_size: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(input_size, hidden_size), nn.ReLU())
