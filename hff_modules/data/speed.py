"""Speech at other speeds: the same choice in a resumed run, and each variant kept in the cache.

Speed perturbation: Ko et al., Interspeech 2015; SpeechBrain's ``SpeedPerturb`` resamples.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from speechbrain.augment.time_domain import SpeedPerturb
from speechbrain.dataio.dataset import DynamicItemDataset

SAMPLE_RATE = 16000
SLOWEST, FASTEST = 0.5, 2.0
WITH_CACHE = ("variants", "refuse")


class SpeedChoice:
    """Chooses a speed for each utterance and epoch; nothing is drawn from a random generator.

    Arguments
    ---------
    speeds : Sequence[float]
        Equally likely; 1.0 is the speech as it is.
    epoch_counter : speechbrain.utils.epoch_loop.EpochCounter
        Its ``current`` epoch counts; it is part of every checkpoint.
    seed : int

    Example
    -------
    >>> from speechbrain.utils.epoch_loop import EpochCounter
    >>> choice = SpeedChoice([0.9, 1.0, 1.1], EpochCounter(2), seed=0)
    >>> choice.of("utterance-1") == choice.of("utterance-1")
    True
    """

    def __init__(self, speeds: Sequence[float], epoch_counter: Any, seed: int):
        self.speeds, self.epoch_counter, self.seed = list(speeds), epoch_counter, seed

    def of(self, name: str) -> float:
        """Speed of the utterance with this ID in the present epoch."""
        text = f"{self.seed} {self.epoch_counter.current} {name}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return self.speeds[number % len(self.speeds)]


def checked_speeds(hparams: Mapping[str, Any]) -> list[float]:
    """The speeds that are asked for.

    Arguments
    ---------
    hparams : Mapping[str, Any]
        ``speed`` (a list; empty: as it is), ``speed_cache``, ``cache``.

    Raises
    ------
    ValueError
        Speeds that are none or come twice, or a cache where ``speed_cache`` refuses it.
    """
    speeds = hparams.get("speed") or []
    if not isinstance(speeds, list | tuple):
        raise ValueError(f"speed: expected a list such as [0.9, 1.0, 1.1], got {speeds!r}")
    for speed in speeds:
        number = isinstance(speed, int | float) and not isinstance(speed, bool)
        if not number or not SLOWEST <= speed <= FASTEST or round(100 * speed) != _percent(speed):
            raise ValueError(
                f"speed: expected numbers from {SLOWEST} to {FASTEST} with two decimals, "
                f"got {speed!r}"
            )
    if len({_percent(speed) for speed in speeds}) != len(speeds):
        raise ValueError(f"speed: expected different speeds, got {list(speeds)}")
    if not speeds:
        return []
    if hparams["speed_cache"] not in WITH_CACHE:
        raise ValueError(
            f"speed_cache: expected one of {', '.join(WITH_CACHE)}, got {hparams['speed_cache']!r}"
        )
    if hparams["cache"] is not None and hparams["speed_cache"] == "refuse":
        raise ValueError(
            f"speed: {list(speeds)} would store the training part {len(speeds)} times; "
            "speed_cache: variants allows that, cache: null does without"
        )
    return list(speeds)


def vary_speed(dataset: DynamicItemDataset, hparams: Mapping[str, Any]) -> None:
    """Let the training part give its signals at the speeds that are asked for.

    Arguments
    ---------
    dataset : DynamicItemDataset
        Before its items are added.
    hparams : Mapping[str, Any]
        As :func:`checked_speeds` has them, ``epoch_counter`` and ``seed``.
    """
    speeds = checked_speeds(hparams)
    if speeds:
        dataset.speeds = SpeedChoice(speeds, hparams["epoch_counter"], hparams["seed"])


def speeds_of(dataset: DynamicItemDataset) -> list[float]:
    """Every speed at which a dataset gives its signals."""
    choice = getattr(dataset, "speeds", None)
    return [1.0] if choice is None else choice.speeds


def change_speed(samples: torch.Tensor, speed: float) -> torch.Tensor:
    """Give samples (samples,) at 16 kHz at another speed: fewer of them if it is above 1."""
    if speed == 1:
        return samples
    return _resampler(_percent(speed))(samples.unsqueeze(0)).squeeze(0)


def _percent(speed: float) -> int:
    percent = round(100 * speed)
    return percent if abs(100 * speed - percent) < 1e-6 else -1


@functools.cache
def _resampler(percent: int) -> torch.nn.Module:
    # Not SpeedPerturb itself: it draws from the global generator, even with a single speed.
    return SpeedPerturb(SAMPLE_RATE, speeds=[percent]).resamplers[0]
