"""Utterances put together: which ones, and as one padded tensor."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")


def by_length(
    items: Iterable[Item], seconds: Callable[[Item], float], batch_seconds: float
) -> Iterator[list[Item]]:
    """Group what is of about the same length, shortest first, up to so many padded seconds.

    Arguments
    ---------
    items : Iterable
    seconds : Callable
        Gives an item's duration.
    batch_seconds : float
        A longer item is a batch of its own.

    Example
    -------
    >>> list(by_length([3, 1, 2, 9], float, 4))
    [[1, 2], [3], [9]]
    """
    batch: list[Item] = []
    for item in sorted(items, key=seconds):
        if batch and seconds(item) * (len(batch) + 1) > batch_seconds:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def padded(
    signals: Sequence[torch.Tensor], minimum_samples: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put signals (samples,) into one tensor, with silence behind them.

    Arguments
    ---------
    signals : Sequence[torch.Tensor]
    minimum_samples : int
        Shorter ones count as this long, with silence: what an encoder needs for a frame.

    Returns
    -------
    tuple[torch.Tensor, torch.Tensor]
        (batch, samples), and the share of each in the longest one (batch,).
    """
    lengths = torch.tensor([max(len(signal), minimum_samples) for signal in signals])
    wavs = signals[0].new_zeros(len(signals), int(lengths.max()))
    for row, signal in zip(wavs, signals, strict=True):
        row[: len(signal)] = signal
    return wavs, lengths / lengths.max()
