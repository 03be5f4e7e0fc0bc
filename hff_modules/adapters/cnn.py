"""CHAPTER's CNN adapters: a small copy beside every convolution of the front end.

Chen et al., 2022, arXiv 2212.01282.
"""

import functools

import torch
from torch import nn

from hff_modules.adapters.base import Adapter, AdapterError


def _add_scaled(
    part: nn.Module, scale: float, output: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    return output + scale * part(x)


class CNNAdapters(Adapter):
    """``conv(x) + scale · A(x)``, ``A`` a convolution of the same shape that is zero at first.

    In front of each convolution's norm and activation. Trained: as many parameters as the
    convolutions have; 4,199,424 in a wav2vec 2.0 Base, HuBERT Base or WavLM Base. The whole encoder
    is run in training: the horizon is -1.

    Arguments
    ---------
    scale : float
        CHAPTER's 0.01.
    """

    in_layers = False

    def __init__(self, scale: float = 0.01):
        super().__init__((), scale=scale)

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        convolutions = encoder.front_convolutions
        if not convolutions:
            raise AdapterError(
                f"{self.method}: the front end of {encoder.source!r} "
                f"({encoder.manifest()['family']}) has no convolutions"
            )
        for place, convolution in enumerate(convolutions, start=1):
            part = nn.Conv1d(
                convolution.in_channels,
                convolution.out_channels,
                convolution.kernel_size,
                convolution.stride,
                convolution.padding,
                bias=convolution.bias is not None,
            )
            for parameter in part.parameters():
                nn.init.zeros_(parameter)
            self.parts[str(place)] = part
            change = functools.partial(_add_scaled, part, self.options["scale"])
            self.change_output(convolution, change, reads=convolution)

    def lowest_changed(self) -> int:  # noqa: D102
        return 0
