"""Head first: fusion and head train on the plain encoder's states before the encoder joins.

The reasoning is LP-FT's (Kumar et al., ICLR 2022, arXiv 2202.10054): a head that knows nothing
sends gradients that say nothing, and full fine-tuning spoils its features with them. Not yet
compared here with training all from the start. These epochs are also the cheap ones, as the plain
encoder's states are stored, and shared by all methods.
"""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.dataset import DynamicItemDataset

from hff_modules.cache import StateCache
from hff_modules.data.loading import end_if_only_filled, filled_cache, read_signal
from hff_modules.encoder import SSLEncoder


def checked_epochs(hparams: Mapping[str, Any]) -> int:
    """``frozen_epochs`` of a recipe, 0 by default.

    Raises
    ------
    ValueError
        No whole number, negative, or not below ``number_of_epochs``.
    """
    epochs, limit = hparams.get("frozen_epochs", 0), hparams.get("number_of_epochs")
    if type(epochs) is not int or epochs < 0 or (limit is not None and epochs >= max(limit, 1)):
        raise ValueError(
            "frozen_epochs: expected a whole number below number_of_epochs "
            f"({limit}), got {epochs!r}"
        )
    return epochs


class HeadFirst:
    """Lets everything that is trained in an encoder wait, as if nothing had been attached.

    Arguments
    ---------
    encoder : SSLEncoder
        With its adapters.
    epochs : int
        How many epochs to wait; counts as 0 if nothing in the encoder is trained.

    Example
    -------
    >>> from hff_modules import SSLEncoder, adapters
    >>> encoder = SSLEncoder("builtin")
    >>> _ = adapters.attach(encoder, "tpa", bottleneck=8)
    >>> head_first = HeadFirst(encoder, epochs=2)
    >>> with head_first.waits():
    ...     print(encoder.horizon)
    12
    >>> encoder.horizon
    0
    """

    def __init__(self, encoder: SSLEncoder, epochs: int):
        self.encoder, self.waiting = encoder, False
        self.epochs = epochs if encoder.horizon < encoder.top else 0
        self._adapters: list = []
        self._weights: list[torch.nn.Parameter] = []

    def set(self, waiting: bool) -> None:
        """Let them wait, or join again with the values that they had."""
        if waiting == self.waiting:
            return
        if waiting:
            self._adapters = [a for a in self.encoder.adapters.values() if a.enabled]
        for adapter in self._adapters:
            adapter.set_enabled(not waiting)
        if waiting:  # what no adapter owns
            model = self.encoder.model
            self._weights = [p for p in model.parameters() if p.requires_grad]
        for weight in self._weights:
            weight.requires_grad_(not waiting)
        self.waiting = waiting
        self.encoder.train(self.encoder.training)

    @contextlib.contextmanager
    def waits(self, waiting: bool = True):
        """Let them wait (or, with False, join) for as long as the context lasts."""
        before = self.waiting
        self.set(waiting)
        try:
            yield
        finally:
            self.set(before)

    def filled_cache(
        self,
        hparams: Mapping[str, Any],
        datasets: Iterable[DynamicItemDataset],
        training: bool = True,
    ) -> "StateCache | SwitchedCache | None":
        """Store what training cannot change: as :func:`filled_cache`, for both times.

        Without ``training`` nothing waits, and the plain encoder's states are not needed.
        """
        datasets = list(datasets)
        cache = filled_cache(hparams, self.encoder, datasets)
        if not self.epochs or not training:
            end_if_only_filled(hparams, self.encoder, cache)
            return cache
        with self.waits():
            plain = filled_cache(hparams, self.encoder, datasets)
        end_if_only_filled(hparams, self.encoder, plain, cache)
        return SwitchedCache(self, plain, cache)


class SwitchedCache:
    """Gives the plain encoder's states while the others wait, then those at the horizon.

    Arguments
    ---------
    head_first : HeadFirst
    plain, joined : StateCache | None
        Where there is none, the signal is given.
    """

    def __init__(self, head_first: HeadFirst, plain: StateCache | None, joined: StateCache | None):
        self.head_first, self.plain, self.joined = head_first, plain, joined

    def read(self, wav: str | Path, speed: float = 1.0) -> torch.Tensor:
        """Stored states (frames, num_stored, width), or samples (samples,)."""
        cache = self.plain if self.head_first.waiting else self.joined
        if cache is not None:
            return cache.read(wav, speed)
        return read_signal(wav, self.head_first.encoder.minimum_samples, speed)
