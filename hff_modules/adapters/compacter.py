"""Compacter: bottlenecks whose weights are sums of Kronecker products.

Mahabadi et al., 2021, arXiv 2106.04647.
"""

import functools

import torch
from torch import nn

from hff_modules.adapters.base import Adapter, AdapterError
from hff_modules.adapters.bottleneck import ACTIVATIONS, places_of


class KroneckerLinear(nn.Module):
    """``W x + b`` with ``W = sum_i A_i ⊗ (s_i t_i^T)``, which is never made.

    With ``x`` as a matrix ``X`` of ``division`` rows, ``(A ⊗ s t^T) x`` is ``(A X t) s^T`` read
    row by row: about ``division · (in + out)`` multiplications instead of ``in · out``.

    Arguments
    ---------
    in_features : int
    out_features : int
    division : int
        Number of products, and of rows of each ``A_i``; divides both widths.
    zero : bool
        Start at zero (``s = 0``).
    """

    def __init__(self, in_features: int, out_features: int, division: int, zero: bool = False):
        super().__init__()
        self.division = division
        self.s = nn.Parameter(torch.zeros(division, out_features // division))
        self.t = nn.Parameter(torch.empty(division, in_features // division))
        self.bias = nn.Parameter(torch.zeros(out_features))
        # The variance of the input is kept, given A_i from N(0, 1 / division).
        nn.init.normal_(self.t, std=(division / in_features) ** 0.5)
        if not zero:
            nn.init.normal_(self.s, std=division**-0.5)

    def forward(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """(..., in_features), and ``A`` (division, division, division), to (..., out_features)."""
        rows = x.unflatten(-1, (self.division, -1))
        mixed = torch.einsum("...cq,iq,irc->...ri", rows, self.t, a)
        return (mixed @ self.s).flatten(-2) + self.bias


class KroneckerBottleneck(nn.Module):
    """``W_up act(W_down x + b_down) + b_up`` of two :class:`KroneckerLinear`; zero at first."""

    def __init__(self, size: int, bottleneck: int, division: int, activation: str):
        super().__init__()
        self.down = KroneckerLinear(size, bottleneck, division)
        self.activation = ACTIVATIONS[activation]()
        self.up = KroneckerLinear(bottleneck, size, division, zero=True)

    def forward(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """(..., size) to (..., size)."""
        return self.up(self.activation(self.down(x, a)), a)


def _add(part: nn.Module, a: nn.Parameter, x: torch.Tensor) -> torch.Tensor:
    return x + part(x, a)


class Compacter(Adapter):
    """Serial bottlenecks of Kronecker products, where Houlsby has them; the ``A_i`` are shared.

    Trained: ``3 (D + r)`` per place, biases included, and ``division³`` once for all layers. The
    scale of the random start is ours (the authors draw ``A_i`` from N(0, 0.01²)).

    Arguments
    ---------
    layers : str | int | Sequence[int]
        Layers to attach to.
    bottleneck : int
        Width in between.
    division : int
        Kronecker products per weight; divides ``bottleneck`` and the encoder's width.
    places : Sequence[str]
        "attention" and / or "feed_forward" (in a Conformer the second one); the latter alone is
        the authors' Compacter++.
    activation : str
        "gelu", "relu" or "silu".
    """

    def __init__(
        self,
        layers="all",
        bottleneck: int = 24,
        division: int = 4,
        places=("attention", "feed_forward"),
        activation: str = "gelu",
    ):
        if activation not in ACTIVATIONS:
            raise AdapterError(
                f"activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}"
            )
        super().__init__(
            layers,
            bottleneck=bottleneck,
            division=division,
            places=places_of(places),
            activation=activation,
        )
        if bottleneck % division:
            raise AdapterError(f"division={division} does not divide bottleneck={bottleneck}")
        self.a = nn.Parameter(torch.randn(division, division, division) / division**0.5)

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        options, size = self.options, encoder.hidden_size
        if size % options["division"]:
            raise AdapterError(
                f"division={options['division']} does not divide the encoder's width {size}"
            )
        for place in options["places"]:
            part = KroneckerBottleneck(
                size, options["bottleneck"], options["division"], options["activation"]
            )
            self.parts[f"{number}_{place}"] = part
            host = encoder.parts(number).branch(place)
            self.change_output(host, functools.partial(_add, part, self.a))
