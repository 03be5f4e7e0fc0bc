"""LoRA: a low-rank change of chosen linear maps (Hu et al., 2021, arXiv 2106.09685)."""

import functools
import math

import torch
from torch import nn

from hff_modules.adapters.base import Adapter, AdapterError

TARGETS = ("query", "key", "value", "output", "up", "down")


class LowRank(nn.Module):
    """``scale · B A x`` beside a linear map; ``B = 0`` at first.

    Arguments
    ---------
    linear : nn.Linear
        The map that is changed; only its shape is used.
    rank : int
        Rows of A.
    alpha : float
        ``scale = alpha / rank``.
    dropout : float
        On what A reads.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return (self.dropout(x) @ self.a.T) @ (self.scale * self.b.T)

    def delta(self) -> torch.Tensor:
        """The change as a matrix (out, in)."""
        return self.scale * (self.b @ self.a)


def _add_beside(part: nn.Module, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return output + part(x)


class LoRA(Adapter):
    """Low-rank changes of linear maps inside the layers.

    Trained: ``rank (in + out)`` per map.

    Arguments
    ---------
    layers : str | int | Sequence[int]
        Layers to attach to.
    rank : int
        Rank of each change.
    alpha : float
        Numerator of the scale; the rank by default.
    targets : Sequence[str]
        Among "query", "key", "value", "output" (attention), "up", "down" (feed-forward).
    dropout : float
        On what the change reads, in training.
    """

    merges = True

    def __init__(
        self,
        layers="all",
        rank: int = 8,
        alpha: float | None = None,
        targets=("query", "value"),
        dropout: float = 0.0,
    ):
        targets = list(targets)
        if not targets or not set(targets) <= set(TARGETS):
            raise AdapterError(f"targets={targets}: expected some of {', '.join(TARGETS)}")
        super().__init__(layers, rank=rank, alpha=alpha, targets=targets, dropout=dropout)
        self._hosts: dict[str, nn.Linear] = {}
        self._unmerged: dict[str, torch.Tensor] = {}
        self._trained: list[nn.Parameter] = []

    @property
    def switched_by_row(self) -> bool:
        """Not while merged."""
        return not self._unmerged

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        rank, alpha = self.options["rank"], self.options["alpha"]
        alpha = rank if alpha is None else alpha
        for target in self.options["targets"]:
            for place, linear in enumerate(encoder.parts(number).linear(target), start=1):
                key = f"{number}_{target}_{place}"
                part = LowRank(linear, rank, alpha, self.options["dropout"])
                self.parts[key], self._hosts[key] = part, linear
                self.change_output(linear, functools.partial(_add_beside, part), reads=linear)

    def merge(self) -> None:
        """Fold the changes into the weights: no time is spent on them any more, nor training."""
        if not self.enabled:
            raise AdapterError("an adapter that is switched off cannot be merged; enable it first")
        if self._unmerged:
            return
        for key, linear in self._hosts.items():
            if hasattr(linear, "merged_into"):  # unmerging one would undo the other
                raise AdapterError(f"{key}: another adapter is merged into this map; unmerge it")
        self._trained = [p for p in self.parameters() if p.requires_grad]
        self.requires_grad_(False)
        for key, part in self.parts.items():
            linear = self._hosts[key]
            linear.merged_into = True
            self._unmerged[key] = linear.weight.detach().clone()
            linear.weight.data += part.delta().detach()

    def changed_weights(self) -> list[nn.Parameter]:
        """Those that it is merged into."""
        return [self._hosts[key].weight for key in self._unmerged]

    def unmerge(self) -> None:
        """Give the encoder its own weights back, bit for bit."""
        for key, weight in self._unmerged.items():
            self._hosts[key].weight.data.copy_(weight)
            del self._hosts[key].merged_into
        self._unmerged.clear()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._trained.clear()

    def set_enabled(self, enabled: bool) -> None:  # noqa: D102
        if not enabled:
            self.unmerge()
        super().set_enabled(enabled)

    def detach(self) -> None:  # noqa: D102
        self.unmerge()
        super().detach()

    def applies(self) -> bool:  # noqa: D102
        return not self._unmerged and super().applies()
