"""AdapterBias: one shift vector per feed-forward, weighted by each frame (Fu et al., 2022).

arXiv 2205.00305.
"""

import functools

import torch
from torch import nn

from hff_modules.adapters.base import Adapter


class WeightedShift(nn.Module):
    """``(w · u) v``: how far each frame is shifted along ``v`` follows from its inner activation.

    Arguments
    ---------
    inner_size : int
        Width of the activation ``u``.
    size : int
        Width of ``v``, which is zero at first.
    """

    def __init__(self, inner_size: int, size: int):
        super().__init__()
        self.w = nn.Parameter(torch.empty(inner_size))
        self.v = nn.Parameter(torch.zeros(size))
        nn.init.normal_(self.w, std=inner_size**-0.5)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """(..., inner_size) to (..., size)."""
        return (u @ self.w).unsqueeze(-1) * self.v


def _shift(part: nn.Module, output: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return output + part(u)


class AdapterBias(Adapter):
    """``FFN(x) + (w · u) v``, ``u`` what the feed-forward's last map reads.

    Trained: inner width + width per feed-forward; 46,080 in 12 layers of 768 and 3072. A Conformer
    layer has two feed-forwards, and both get one.

    Arguments
    ---------
    layers : str | int | Sequence[int]
        Layers to attach to.
    """

    def __init__(self, layers="all"):
        super().__init__(layers)

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        for place, branch in enumerate(encoder.parts(number).feed_forwards, start=1):
            part = WeightedShift(branch.down.in_features, branch.down.out_features)
            self.parts[f"{number}_{place}"] = part
            self.change_output(branch.gives, functools.partial(_shift, part), reads=branch.down)
