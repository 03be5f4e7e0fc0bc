"""Prompts: learned frames in front of the speech, in each layer or all the way up.

Deep prompts: Sang & Hansen, 2025 (UniPET-SPK), arXiv 2501.16542. P-adapter: Inoue et al., 2024
(ELP), arXiv 2407.21066.
"""

import torch
from torch import nn

from hff_modules.adapters.base import Adapter, AdapterError


class Frames(nn.Module):
    """``length`` learned frames (length, size).

    Arguments
    ---------
    length : int
    size : int
    std : float, optional
        Drawn from N(0, std²); by default after Xavier.
    """

    def __init__(self, length: int, size: int, std: float | None = None):
        super().__init__()
        self.frames = nn.Parameter(torch.empty(length, size))
        if std is None:
            nn.init.xavier_uniform_(self.frames)
        else:
            nn.init.normal_(self.frames, std=std)


class Prompts(Adapter):
    """Learned frames in front of what enters each layer, taken off its output.

    Trained: ``n D`` per layer. Not the identity at birth.

    Arguments
    ---------
    layers : str | int | Sequence[int]
        Layers to attach to.
    length : int
        Number ``n`` of frames.
    """

    identity_at_birth = False

    def __init__(self, layers="all", length: int = 16):
        super().__init__(layers, length=length)

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        self.parts[str(number)] = Frames(self.options["length"], encoder.hidden_size)

    def frames_in_front(self, number: int) -> torch.Tensor | None:  # noqa: D102
        return self.parts[str(number)].frames if number in self.layers else None


class PAdapter(Adapter):
    """ELP's P-adapter: learned frames that go through all layers and are dropped from the states.

    They stand in front of what enters layer 1. (ELP puts them in front of what the CNN gives,
    before the convolution that adds positions: then state 0 would not stay frozen.)

    Trained: ``n D``. Drawn from N(0, 0.02²); not the identity at birth.

    Arguments
    ---------
    length : int
        Number ``n`` of frames.
    """

    identity_at_birth = False
    in_layers = False
    frames_stay = True

    def __init__(self, length: int = 16):
        super().__init__((), length=length)

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        if encoder.top < 1:
            raise AdapterError("layers: the encoder's first one is not there to read the frames")
        self.parts["1"] = Frames(self.options["length"], encoder.hidden_size, std=0.02)

    def frames_in_front(self, number: int) -> torch.Tensor | None:  # noqa: D102
        return self.parts["1"].frames if number == 1 else None

    def lowest_changed(self) -> int:  # noqa: D102
        return 1
