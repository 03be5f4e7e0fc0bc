"""Prefix tuning: learned keys and values in front of every attention (Li & Liang, 2021).

arXiv 2101.00190. PEFT's goes through the cache of past keys, which encoders do not have; this one
hooks the attention itself. A prefix has no position: position biases do not touch it.
"""

import functools

import torch
from torch import nn

from hff_modules.adapters.base import Adapter


class KeysAndValues(nn.Module):
    """``length`` learned keys and values (length, size) each."""

    def __init__(self, length: int, size: int):
        super().__init__()
        self.keys = nn.Parameter(0.02 * torch.randn(length, size))
        self.values = nn.Parameter(0.02 * torch.randn(length, size))


def _put_in_front(
    adapter: Adapter,
    part: KeysAndValues,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """See :meth:`hff_modules.families.Family.hook_keys_and_values`."""
    if not adapter.applies():
        return key, value, mask, bias
    length = len(part.keys)
    if mask is not None or adapter.rows is not None:
        there = key.new_ones(len(key), 1, 1, length, dtype=torch.bool)
        if adapter.rows is not None:
            others = torch.ones(len(key), dtype=torch.bool, device=key.device)
            others[adapter.rows] = False
            there[others] = False
        if mask is None:
            mask = key.new_ones(1, 1, 1, key.shape[2], dtype=torch.bool)
        mask = mask.expand(len(key), -1, -1, -1)
        mask = torch.cat([there.expand(-1, *mask.shape[1:3], -1), mask], dim=-1)
    if bias is not None:
        bias = nn.functional.pad(bias, (length, 0))
    return _prepend(part.keys, key), _prepend(part.values, value), mask, bias


def _prepend(learned: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """(length, size) in front of (batch, heads, frames, width of a head)."""
    batch, heads, _, width = frames.shape
    by_head = learned.view(-1, heads, width).transpose(0, 1)
    return torch.cat([by_head.expand(batch, -1, -1, -1).to(frames.dtype), frames], dim=2)


class Prefix(Adapter):
    """Learned keys and values that every frame may attend to.

    Trained: ``2 n D`` per layer. Drawn from N(0, 0.02²); not the identity at birth.

    Arguments
    ---------
    layers : str | int | Sequence[int]
        Layers to attach to.
    length : int
        Number ``n`` of keys and of values.
    """

    identity_at_birth = False

    def __init__(self, layers="all", length: int = 16):
        super().__init__(layers, length=length)

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        part = KeysAndValues(self.options["length"], encoder.hidden_size)
        self.parts[str(number)] = part
        change = functools.partial(_put_in_front, self, part)
        self._handles.append(encoder.hook_keys_and_values(number, change))
