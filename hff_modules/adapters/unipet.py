"""UniPET-SPK: parallel adapters and deep prompts, weighed by learned gates.

Sang & Hansen, 2025, arXiv 2501.16542. The form of the gate is ours: a pair of numbers per layer.
"""

import functools

import torch
from torch import nn

from hff_modules.adapters.base import Adapter
from hff_modules.adapters.bottleneck import Bottleneck
from hff_modules.adapters.prompts import Frames


def _add_gated(
    part: nn.Module, gate: nn.Parameter, output: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    return output + torch.sigmoid(gate[0]) * part(x)


class UniPET(Adapter):
    """``FFN(x) + g_a A(x)`` and ``g_p P`` in front of each layer's input; gates ½ at first.

    Trained: ``f (2 D r + D + r) + n D + 2`` per layer with ``f`` feed-forwards. Not the identity at
    birth, because of the prompts. In pre-norm layers the gate ``g_p`` hardly moves: the LayerNorm
    takes the prompts' scale away, and their frames are not handed on.

    Arguments
    ---------
    layers : str | int | Sequence[int]
        Layers to attach to.
    bottleneck : int
        Width ``r`` inside ``A``.
    length : int
        Number ``n`` of frames in ``P``.
    activation : str
        "gelu", "relu" or "silu".
    """

    identity_at_birth = False

    def __init__(
        self, layers="all", bottleneck: int = 256, length: int = 16, activation: str = "relu"
    ):
        super().__init__(layers, bottleneck=bottleneck, length=length, activation=activation)
        self.gates = nn.ParameterDict()

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        options, size = self.options, encoder.hidden_size
        gate = self.gates[str(number)] = nn.Parameter(torch.zeros(2))
        for place, branch in enumerate(encoder.parts(number).feed_forwards, start=1):
            part = Bottleneck(size, options["bottleneck"], options["activation"])
            self.parts[f"{number}_{place}"] = part
            change = functools.partial(_add_gated, part, gate)
            self.change_output(branch.gives, change, reads=branch.reads)
        self.parts[f"{number}_prompts"] = Frames(options["length"], size)

    def frames_in_front(self, number: int) -> torch.Tensor | None:  # noqa: D102
        if number not in self.layers:
            return None
        return torch.sigmoid(self.gates[str(number)][1]) * self.parts[f"{number}_prompts"].frames
