"""Requests that wait for a model are answered in batches, by a thread of its own."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from hff_modules.data.batches import padded

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Waiting:
    """One utterance and what is wanted of it."""

    signal: torch.Tensor  # (samples,)
    tasks: Sequence[str]
    answer: asyncio.Future


class Batcher:
    """Collects utterances of several requests and hands them to a model together.

    Arguments
    ---------
    model : Callable
        ``model(wavs, wav_lens, tasks)`` with a list of tasks for each utterance gives results by
        task, as :class:`hff_modules.multitask.MultiTask` does. Never called twice at once.
    batch_size : int
        Most utterances in a batch.
    batch_seconds : float
        Longest batch, padding included; one utterance may be longer.
    wait_seconds : float
        How long the first utterance of a batch waits for others.
    sample_rate : int
        Hz of the signals.
    """

    def __init__(
        self,
        model: Callable[..., dict[str, list[Any]]],
        batch_size: int = 16,
        batch_seconds: float = 120.0,
        wait_seconds: float = 0.01,
        sample_rate: int = 16000,
    ):
        self.model, self.batch_size, self.wait_seconds = model, batch_size, wait_seconds
        self.batch_samples = round(batch_seconds * sample_rate)
        self.queue: list[Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def ask(self, signal: torch.Tensor, tasks: Sequence[str]) -> dict[str, Any]:
        """Wait for the results of one utterance, by task.

        Whoever stops waiting (is cancelled) leaves the queue.

        Raises
        ------
        Exception
            What the model raised for this utterance alone.
        """
        waiting = Waiting(signal, tasks, asyncio.get_running_loop().create_future())
        self.queue.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def run(self) -> None:
        """Answer until cancelled; a batch that was begun is finished first."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._arrived.wait()
                if len(self.queue) < self.batch_size:
                    await asyncio.sleep(self.wait_seconds)
                batch = self.take()
                if not batch:
                    self._arrived.clear()
                    continue
                outcomes = await loop.run_in_executor(self._thread, self._compute, batch)
                broken = [it for it in outcomes if isinstance(it, torch.AcceleratorError)]
                for waiting, outcome in zip(batch, outcomes, strict=True):
                    if waiting.answer.done():  # given up in the meantime
                        continue
                    if isinstance(outcome, Exception):
                        waiting.answer.set_exception(outcome)
                    else:
                        waiting.answer.set_result(outcome)
                if broken:  # the GPU takes nothing more from this process
                    raise broken[0]
        finally:
            self._thread.shutdown()

    def take(self) -> list[Waiting]:
        """Take the next batch: who has waited longest, and those nearest to it in length."""
        self.queue = [waiting for waiting in self.queue if not waiting.answer.done()]
        if not self.queue:
            return []
        length = len(self.queue[0].signal)
        batch, longest = [], 0
        for waiting in sorted(self.queue, key=lambda other: abs(len(other.signal) - length)):
            longest = max(longest, len(waiting.signal))
            size = len(batch) + 1
            if batch and (size > self.batch_size or size * longest > self.batch_samples):
                break
            batch.append(waiting)
        self.queue = [waiting for waiting in self.queue if waiting not in batch]
        return batch

    def _compute(self, batch: Sequence[Waiting]) -> list[dict[str, Any] | Exception]:
        try:
            wavs, wav_lens = padded([waiting.signal for waiting in batch])
            found = self.model(wavs, wav_lens, [waiting.tasks for waiting in batch])
        except Exception as error:
            if len(batch) == 1:
                return [error]
            logger.warning("a batch failed (%s); its utterances are tried one by one", error)
            return [self._compute([waiting])[0] for waiting in batch]
        return [{t: found[t][row] for t in waiting.tasks} for row, waiting in enumerate(batch)]
