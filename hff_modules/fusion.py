"""From the states of several layers to one sequence of features.

Every fusion maps states (num_states, batch, frames, input_size) and the valid frames of each
utterance to features (batch, frames, ``output_size``).
"""

import math
from itertools import pairwise

import torch
from torch import nn

from hff_modules.adapters.bottleneck import Bottleneck
from hff_modules.frontend import valid_mask

PACE = 100  # of the weights in a softmax beside maps: as their best rates are to each other's
_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Fusion(nn.Module):
    """What all fusions share.

    Arguments
    ---------
    num_states : int
        States that are given, low layers first.
    input_size : int
        Width of each state.
    output_size : int
        Width of the features.
    """

    def __init__(self, num_states: int, input_size: int, output_size: int):
        super().__init__()
        if num_states < 1:
            raise ValueError(f"num_states={num_states}: a fusion needs at least one state")
        self.num_states, self.input_size, self.output_size = num_states, input_size, output_size

    def check(self, states: torch.Tensor) -> None:
        """Refuse states of another number or width than the fusion was made for."""
        if states.dim() != 4 or states.shape[0] != self.num_states:
            raise ValueError(
                f"{type(self).__name__} was made for {self.num_states} states as (num_states, "
                f"batch, frames, width); given {tuple(states.shape)}"
            )
        if states.shape[-1] != self.input_size:
            raise ValueError(
                f"{type(self).__name__} was made for states of width {self.input_size}; "
                f"given {states.shape[-1]}"
            )


class LastLayer(Fusion):
    """The highest selected state as it is: the baseline, with nothing to train.

    Example
    -------
    >>> LastLayer(num_states=2, input_size=8)(torch.randn(2, 3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, num_states: int, input_size: int):
        super().__init__(num_states, input_size, input_size)

    def forward(self, states: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Map states (num_states, batch, frames, width) to features (batch, frames, width)."""
        self.check(states)
        return states[-1]


class WeightedSum(Fusion):
    """``sum_k softmax(w)_k h_k`` with ``w = 0`` at first (SUPERB, Yang et al., 2021).

    Arguments
    ---------
    num_states : int
        States that are given.
    input_size : int
        Width of each state.
    layer_norm : bool
        Normalise each state first (no trained scale), so that wide and narrow ones weigh alike.

    Example
    -------
    >>> fusion = WeightedSum(num_states=2, input_size=8)
    >>> fusion(torch.randn(2, 3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, num_states: int, input_size: int, layer_norm: bool = False):
        super().__init__(num_states, input_size, input_size)
        self.layer_norm = layer_norm
        self.weights = nn.Parameter(torch.zeros(num_states))

    def layer_weights(self) -> list[float]:
        """The weight that each state has now; they add up to 1."""
        return torch.softmax(self.weights.detach(), 0).tolist()

    def forward(self, states: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Map states (num_states, batch, frames, width) to features (batch, frames, width)."""
        self.check(states)
        if self.layer_norm:
            states = nn.functional.layer_norm(states, (self.input_size,))
        return torch.einsum("k,kbtd->btd", torch.softmax(self.weights, 0), states)


class LayerAdapters(Fusion):
    """L-adapters: every state through a map of its own, then a weighted sum.

    ``g_k = LN(act(W_k h_k + b_k))`` and ``sum_k softmax(w)_k g_k`` with ``w = 0`` at first (Otake
    et al., 2023, arXiv 2212.02780; Inoue et al., 2024 (ELP), arXiv 2407.21066). No way back to the
    width of the states, no skip. Trained: ``K (D d + 3 d + 1)``.

    Arguments
    ---------
    num_states : int
        States that are given.
    input_size : int
        Width ``D`` of each state.
    output_size : int
        Width ``d`` of the features.
    activation : str
        "gelu" (the authors' for speech recognition and intent), "relu" (theirs for speaker and
        emotion), "silu" or "tanh".

    Example
    -------
    >>> fusion = LayerAdapters(num_states=12, input_size=768)
    >>> sum(p.numel() for p in fusion.adapters[0].parameters())
    394752
    """

    def __init__(
        self, num_states: int, input_size: int, output_size: int = 512, activation: str = "gelu"
    ):
        super().__init__(num_states, input_size, output_size)
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r}: expected one of {', '.join(_ACTIVATIONS)}"
            )
        self.weights = nn.Parameter(torch.zeros(num_states))
        self.adapters = nn.ModuleList()
        for _ in range(num_states):
            linear, act = nn.Linear(input_size, output_size), _ACTIVATIONS[activation]()
            nn.init.normal_(linear.weight, std=1e-3)
            nn.init.zeros_(linear.bias)
            self.adapters.append(nn.Sequential(linear, act, nn.LayerNorm(output_size)))

    def layer_weights(self) -> list[float]:
        """The weight that each state has now; they add up to 1."""
        return torch.softmax(self.weights.detach(), 0).tolist()

    def forward(self, states: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Map states (num_states, batch, frames, width) to features (batch, frames, output)."""
        self.check(states)
        weights = torch.softmax(self.weights, 0)
        features = 0
        for weight, (linear, activation, norm), state in zip(
            weights, self.adapters, states, strict=True
        ):
            # The weight goes into LayerNorm's scale and shift: a product of frames less.
            scale, shift = weight * norm.weight, weight * norm.bias
            mapped = activation(linear(state))
            features = features + nn.functional.layer_norm(
                mapped, norm.normalized_shape, scale, shift, norm.eps
            )
        return features


class InterAdapter(WeightedSum):
    """The weighted sum of all states with a bottleneck beside it, zero at first.

    The "inter" half of inner + inter adapters (Sang & Hansen, 2024, arXiv 2403.00293), whose
    "inner" half is the adapter method ``inner``. ``s + W_up act(W_down s)`` of the weighted sum
    ``s``; where the paper is not open to us, this is ours. Trained: ``2 D r + D + r + K``.

    Arguments
    ---------
    num_states : int
        States that are given.
    input_size : int
        Width ``D`` of each state.
    bottleneck : int
        Width ``r`` in between.
    activation : str
        "gelu", "relu" or "silu".

    Example
    -------
    >>> InterAdapter(num_states=2, input_size=8, bottleneck=4)(torch.randn(2, 3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(
        self, num_states: int, input_size: int, bottleneck: int = 256, activation: str = "relu"
    ):
        super().__init__(num_states, input_size)
        self.adapter = Bottleneck(input_size, bottleneck, activation)

    def forward(self, states: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Map states (num_states, batch, frames, width) to features (batch, frames, width)."""
        summed = super().forward(states, lengths)
        return summed + self.adapter(summed)


class ConcatProjection(Fusion):
    """``W [h_1; ...; h_K]``: one linear map of all states side by side.

    Arguments
    ---------
    num_states : int
        States that are given.
    input_size : int
        Width of each state.
    output_size : int, optional
        Width of the features; ``input_size`` by default.
    layer_norm : bool
        Normalise each state first (no trained scale).

    Example
    -------
    >>> ConcatProjection(num_states=2, input_size=8, output_size=4)(torch.randn(2, 3, 5, 8)).shape
    torch.Size([3, 5, 4])
    """

    def __init__(
        self,
        num_states: int,
        input_size: int,
        output_size: int | None = None,
        layer_norm: bool = False,
    ):
        super().__init__(num_states, input_size, output_size or input_size)
        self.layer_norm = layer_norm
        self.projection = nn.Linear(num_states * input_size, self.output_size, bias=False)

    def forward(self, states: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Map states (num_states, batch, frames, width) to features (batch, frames, output)."""
        self.check(states)
        if self.layer_norm:
            states = nn.functional.layer_norm(states, (self.input_size,))
        return self.projection(states.permute(1, 2, 0, 3).flatten(2))


class HierarchicalConv(Fusion):
    """HConv: convolutions over the layer axis (Shih & Harwath, 2024, arXiv 2406.12209).

    ``floor(log3 K)`` full convolutions (kernel 5, stride 3, padding 2, ReLU) shorten the layer
    axis; the last one gives ``input_size // K_last`` channels, so that flattening the ``K_last``
    positions that remain gives about the width of one state again.

    Arguments
    ---------
    num_states : int
        States that are given; at least 3.
    input_size : int
        Width of each state.

    Example
    -------
    >>> fusion = HierarchicalConv(num_states=13, input_size=768)
    >>> round(sum(p.numel() for p in fusion.parameters()) / 1e6, 2)
    4.42
    """

    def __init__(self, num_states: int, input_size: int):
        if num_states < 3:
            raise ValueError(
                f"num_states={num_states}: a hierarchical convolution needs at least 3 states"
            )
        positions = [num_states]
        while 3 ** len(positions) <= num_states:
            positions.append((positions[-1] - 1) // 3 + 1)
        channels = input_size // positions[-1]
        super().__init__(num_states, input_size, channels * positions[-1])
        convolutions = len(positions) - 1
        widths = [input_size] * convolutions + [channels]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, next_width, kernel_size=5, stride=3, padding=2)
            for width, next_width in pairwise(widths)
        )

    def forward(self, states: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Map states (num_states, batch, frames, width) to features (batch, frames, output)."""
        self.check(states)
        _, batch, frames, _ = states.shape
        hidden = states.flatten(1, 2)  # (num_states, batch * frames, width)
        for convolution in self.convolutions:
            hidden = torch.relu(_over_layers(convolution, hidden))
        return hidden.permute(1, 2, 0).reshape(batch, frames, self.output_size)


def _over_layers(convolution: nn.Conv1d, states: torch.Tensor) -> torch.Tensor:
    """Convolve along the first axis of (positions, frames, width) by one matrix product.

    With a dozen positions at most, convolution kernels do this three times as slowly on a CPU.
    """
    (size,), (stride,), (padding,) = (
        convolution.kernel_size,
        convolution.stride,
        convolution.padding,
    )
    padded = nn.functional.pad(states, (0, 0, 0, 0, padding, padding))
    windows = padded.unfold(0, size, stride)  # (new positions, frames, width, kernel)
    windows = windows.transpose(2, 3).flatten(2)
    weight = convolution.weight.transpose(1, 2).flatten(1)
    return nn.functional.linear(windows, weight, convolution.bias)


class HierarchicalFusion(Fusion):
    """Hierarchical feature fusion: neighbouring layers merge pair by pair until one is left.

    After Huo et al., "Hierarchical feature fusion" (ICASSP 2023, arXiv 2211.02712). The equations
    of the paper are not public, so these are our own::

        u_m^0     = act(W_m LN_m(h_m) + b_m)                one per state, input_size -> hidden_size
        u_m^(j+1) = merge(u_2m^j, u_(2m+1)^j)               an odd one moves up as it is
        features  = W_out u^top + b_out                     hidden_size -> output_size
                    + sum_m softmax(100 w)_m LN(h_m)        with ``residual``

    with one of three merges, each with parameters of its own:

    * ``concat``: ``act(W LN([a; b]) + b)``
    * ``gated``: ``g * a + (1 - g) * b`` with ``g = sigmoid(W LN([a; b]) + b)``
    * ``conv``: ``act(W LN([a; b]) + b)``, then a depthwise convolution over time added to it

    Arguments
    ---------
    num_states : int
        States that are given, low layers first.
    input_size : int
        Width of each state.
    hidden_size : int
        Width inside the hierarchy.
    output_size : int, optional
        Width of the features; ``input_size`` by default.
    merge : str
        "concat", "gated" or "conv".
    layer_norm : bool
        Normalise states and pairs (LayerNorm with trained scale and shift).
    activation : str
        "gelu", "relu", "silu" or "tanh".
    kernel_size : int
        Frames that the "conv" merge sees; odd.
    residual : bool
        Add the hierarchy, zero at first (``W_out = 0, b_out = 0``), to a weighted sum of the
        normalised states (no trained scale), their mean at first (``w = 0``): the head reads speech
        from the first step on. The weights are few and must move far, a hundred times as fast as
        the rest. Needs ``output_size = input_size``; ``num_states`` more numbers are trained.

    Example
    -------
    >>> fusion = HierarchicalFusion(num_states=3, input_size=8, hidden_size=4)
    >>> fusion(torch.randn(3, 2, 5, 8), torch.tensor([5, 3])).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        num_states: int,
        input_size: int,
        hidden_size: int = 256,
        output_size: int | None = None,
        merge: str = "concat",
        layer_norm: bool = True,
        activation: str = "gelu",
        kernel_size: int = 5,
        residual: bool = False,
    ):
        super().__init__(num_states, input_size, output_size or input_size)
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r}: expected one of {', '.join(_ACTIVATIONS)}"
            )
        if merge not in _MERGES:
            raise ValueError(f"merge={merge!r}: expected one of {', '.join(_MERGES)}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: expected an odd number of frames")
        if residual and self.output_size != input_size:
            raise ValueError(
                f"residual: output_size={output_size} must be input_size={input_size}, as the "
                "states are added"
            )
        act = _ACTIVATIONS[activation]
        self.hidden_size, self.residual, self.layer_norm = hidden_size, residual, layer_norm
        self.inputs = nn.ModuleList(
            _Project(_norm(input_size, layer_norm), nn.Linear(input_size, hidden_size), act())
            for _ in range(num_states)
        )
        self.merges = nn.ModuleList()  # level by level, as forward walks through them
        nodes = num_states
        for _ in range(math.ceil(math.log2(num_states))):
            self.merges.append(
                nn.ModuleList(
                    _MERGES[merge](
                        hidden_size, _norm(2 * hidden_size, layer_norm), act(), kernel_size
                    )
                    for _ in range(nodes // 2)
                )
            )
            nodes = (nodes + 1) // 2
        self.output = nn.Linear(hidden_size, self.output_size)
        if residual:
            self.weights = nn.Parameter(torch.zeros(num_states))
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def layer_weights(self) -> list[float] | None:
        """The weight that each state has now beside the hierarchy; None without ``residual``."""
        return self._shares().tolist() if self.residual else None

    def _shares(self) -> torch.Tensor:
        return torch.softmax(PACE * self.weights, 0)

    def forward(self, states: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Fuse.

        Arguments
        ---------
        states : torch.Tensor
            (num_states, batch, frames, input_size).
        lengths : torch.Tensor, optional
            (batch,), valid frames; only the "conv" merge looks at them, all valid by default.

        Returns
        -------
        torch.Tensor
            (batch, frames, output_size).
        """
        self.check(states)
        mask = None if lengths is None else valid_mask(lengths, states.shape[2]).unsqueeze(-1)
        if self.residual:  # normalised once for both ways
            normal = nn.functional.layer_norm(states, (self.input_size,))
            nodes = [
                project.of_normal(one) if self.layer_norm else project(state)
                for project, state, one in zip(self.inputs, states, normal, strict=True)
            ]
        else:
            nodes = [project(state) for project, state in zip(self.inputs, states, strict=True)]
        for level in self.merges:
            merged = [merge(nodes[2 * m], nodes[2 * m + 1], mask) for m, merge in enumerate(level)]
            nodes = merged + nodes[2 * len(level) :]
        if not self.residual:
            return self.output(nodes[0])
        return self.output(nodes[0]) + torch.einsum("k,kbtd->btd", self._shares(), normal)


def _norm(size: int, layer_norm: bool) -> nn.Module:
    return nn.LayerNorm(size) if layer_norm else nn.Identity()


class _Project(nn.Sequential):
    """``act(W LN(h) + b)``, with LayerNorm's scale and shift taken into ``W`` and ``b``.

    The same map; but of a frozen state no gradient is needed then, which is one matrix product less
    of three, and no copy of the scaled state.
    """

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        norm, linear, activation = self
        if isinstance(norm, nn.Identity):
            return activation(linear(state))
        return self.of_normal(nn.functional.layer_norm(state, norm.normalized_shape))

    def of_normal(self, normal: torch.Tensor) -> torch.Tensor:
        """The same of a state that is normalised already, but for LayerNorm's scale and shift."""
        norm, linear, activation = self
        bias = linear.bias + linear.weight @ norm.bias
        return activation(nn.functional.linear(normal, linear.weight * norm.weight, bias))


class _ConcatMerge(nn.Module):
    def __init__(self, size: int, norm: nn.Module, activation: nn.Module, kernel_size: int):
        super().__init__()
        self.norm, self.linear, self.activation = norm, nn.Linear(2 * size, size), activation

    def forward(self, low, high, mask):
        return self.activation(self.linear(self.norm(torch.cat([low, high], dim=-1))))


class _GatedMerge(nn.Module):
    def __init__(self, size: int, norm: nn.Module, activation: nn.Module, kernel_size: int):
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(2 * size, size)

    def forward(self, low, high, mask):
        gate = torch.sigmoid(self.linear(self.norm(torch.cat([low, high], dim=-1))))
        return gate * low + (1 - gate) * high


class _ConvMerge(_ConcatMerge):
    def __init__(self, size: int, norm: nn.Module, activation: nn.Module, kernel_size: int):
        super().__init__(size, norm, activation, kernel_size)
        self.conv = nn.Conv1d(size, size, kernel_size, padding=kernel_size // 2, groups=size)

    def forward(self, low, high, mask):
        merged = super().forward(low, high, mask)
        seen = merged if mask is None else merged * mask  # padding must not reach the speech
        return merged + self.conv(seen.transpose(1, 2)).transpose(1, 2)


_MERGES = {"concat": _ConcatMerge, "gated": _GatedMerge, "conv": _ConvMerge}
