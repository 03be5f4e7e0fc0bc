"""Bottleneck adapters: serial (Houlsby, Pfeiffer, Thomas, ELP's E-adapter) and two parallel ones.

Houlsby et al., 2019, arXiv 1902.00751; Pfeiffer et al., 2020, arXiv 2005.00052; Thomas et al.,
2022, arXiv 2202.03218; Inoue et al., 2024 (ELP), arXiv 2407.21066; Chen et al., 2023 (TPA), arXiv
2306.08131.
"""

import functools

import torch
from torch import nn

from hff_modules.adapters.base import Adapter, AdapterError

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class Bottleneck(nn.Module):
    """``W_up act(W_down x + b_down) + b_up``, with a LayerNorm in front or behind if asked.

    Arguments
    ---------
    size : int
        Width of input and output.
    bottleneck : int
        Width in between.
    activation : str
        "gelu", "relu" or "silu".
    norm : str, optional
        "before" the first map, or "after" the last one (as ELP has it).
    init_std : float, optional
        Both maps are drawn from N(0, init_std²), biases zero, as ELP has it. By default they are
        torch's own but for one that is zero, so that the result is, too: the last map, or the
        scale of a norm behind it. (Behind a zero map that norm would turn the first, smallest
        change into a result of unit variance.)
    """

    def __init__(
        self,
        size: int,
        bottleneck: int,
        activation: str = "relu",
        norm: str | None = None,
        init_std: float | None = None,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise AdapterError(
                f"activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}"
            )
        if norm not in (None, "before", "after"):
            raise AdapterError(f"norm={norm!r}: expected 'before', 'after' or nothing")
        self.down, self.up = nn.Linear(size, bottleneck), nn.Linear(bottleneck, size)
        self.activation = ACTIVATIONS[activation]()
        self.norm = None if norm is None else nn.LayerNorm(size)
        self.norm_last = norm == "after"
        if init_std is None:
            nn.init.zeros_(self.norm.weight if self.norm_last else self.up.weight)
        else:
            nn.init.normal_(self.down.weight, std=init_std)
            nn.init.normal_(self.up.weight, std=init_std)
            nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) to (..., size)."""
        if self.norm is not None and not self.norm_last:
            x = self.norm(x)
        x = self.up(self.activation(self.down(x)))
        return self.norm(x) if self.norm_last else x


def _add(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + part(x)


def _add_beside(part: nn.Module, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return output + part(x)


def places_of(places) -> list[str]:
    """Check the choice of branches that serial methods follow."""
    places = list(places)
    if not places or not set(places) <= {"attention", "feed_forward"}:
        raise AdapterError(f"places={places}: expected 'attention' and / or 'feed_forward'")
    return places


class SerialBottleneck(Adapter):
    """``x + bottleneck(x)`` on what a branch gives, before it is added to the residual.

    Trained: ``2 D r + D + r`` per place, and ``2 D`` more with a norm.

    Arguments
    ---------
    layers : str | int | Sequence[int]
        Layers to attach to.
    bottleneck : int
        Width in between.
    places : Sequence[str]
        "attention" and / or "feed_forward" (in a Conformer the second one).
    activation, norm, init_std
        See :class:`Bottleneck`.
    """

    def __init__(
        self,
        layers="all",
        bottleneck: int = 256,
        places=("attention", "feed_forward"),
        activation: str = "gelu",
        norm: str | None = None,
        init_std: float | None = None,
    ):
        super().__init__(
            layers,
            bottleneck=bottleneck,
            places=places_of(places),
            activation=activation,
            norm=norm,
            init_std=init_std,
        )

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        settings = {key: value for key, value in self.options.items() if key != "places"}
        for place in self.options["places"]:
            part = Bottleneck(encoder.hidden_size, **settings)
            self.parts[f"{number}_{place}"] = part
            host = encoder.parts(number).branch(place)
            self.change_output(host, functools.partial(_add, part))


class TwoParallelAdapters(Adapter):
    """TPA: a bottleneck beside each feed-forward, reading the same raw input.

    ``y = x + ½ (FFN(x) + A(x))`` for each of the two half-step feed-forwards of a Conformer layer;
    a Transformer layer has one, ``y = x + FFN(x) + A(x)``. Lower blocks need them least: prune
    them with ``layers="last:k"``. Trained: ``2 D r + D + r`` per feed-forward.

    Arguments
    ---------
    layers : str | int | Sequence[int]
        Layers to attach to.
    bottleneck : int
        Width in between.
    activation : str
        See :class:`Bottleneck`.
    branches : str
        "both" feed-forwards of a Conformer layer, the "first" or the "last".
    """

    def __init__(
        self,
        layers="all",
        bottleneck: int = 256,
        activation: str = "relu",
        branches: str = "both",
    ):
        if branches not in _BRANCHES:
            raise AdapterError(f"branches={branches!r}: expected one of {', '.join(_BRANCHES)}")
        super().__init__(layers, bottleneck=bottleneck, activation=activation, branches=branches)

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        chosen = encoder.parts(number).feed_forwards[_BRANCHES[self.options["branches"]]]
        for place, branch in enumerate(chosen, start=1):
            part = Bottleneck(
                encoder.hidden_size, self.options["bottleneck"], self.options["activation"]
            )
            self.parts[f"{number}_{place}"] = part
            self.change_output(
                branch.gives, functools.partial(_add_beside, part), reads=branch.reads
            )


_BRANCHES = {"both": slice(None), "first": slice(0, 1), "last": slice(-1, None)}
