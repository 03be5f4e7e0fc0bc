"""From manifests to batches: signals, targets, dynamic batching; nothing that CTC cannot align."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.dataset import DynamicItemDataset, FilteredSortedDynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from hff_modules.cache import StateCache, why_nothing_is_kept
from hff_modules.data.audio import read_audio
from hff_modules.data.manifest import COLUMNS, read_rows
from hff_modules.data.speed import change_speed, speeds_of
from hff_modules.data.text import Units

logger = get_logger(__name__)

SAMPLE_RATE = 16000


def read_speech(
    csvs: Iterable[str | Path], data_root: str | Path, columns: Sequence[str] = COLUMNS
) -> DynamicItemDataset:
    """Read manifests, one after the other, as one set of utterances.

    Arguments
    ---------
    csvs : Iterable[str | Path]
        Manifests as :mod:`hff_modules.data.manifest` writes them.
    data_root : str | Path
        What ``$data_root`` stands for in them.
    columns : Sequence[str]
        Columns that the task needs; by default those of transcribed speech.

    Returns
    -------
    DynamicItemDataset
    """
    rows: dict[str, dict] = {}
    for csv in csvs:
        more = read_rows(csv, data_root, columns)
        twice = rows.keys() & more.keys()
        if twice:
            raise ValueError(f"{csv}: {len(twice)} IDs are in another split too: {min(twice)!r}")
        rows.update(more)
    return DynamicItemDataset(rows)


def filled_cache(
    hparams: Mapping[str, Any], encoder: torch.nn.Module, datasets: Iterable[DynamicItemDataset]
) -> StateCache | None:
    """Compute and keep the states of all utterances that training cannot change.

    Arguments
    ---------
    hparams : Mapping[str, Any]
        ``cache`` (a folder, or None), ``cache_dtype``, ``cache_gigabytes``, ``batch_seconds``.
    encoder : SSLEncoder
        With its adapters attached.
    datasets : Iterable[DynamicItemDataset]
        With ``wav`` and ``duration``.

    Returns
    -------
    StateCache | None
        None where no cache is wanted, or nothing can be kept.

    Raises
    ------
    ValueError
        An utterance is longer than the encoder takes at once (Whisper's 30 s).
    """
    datasets = list(datasets)
    refuse_too_long(encoder, datasets)
    if hparams["cache"] is None or not encoder.stored_layers:
        return None
    cache = StateCache(
        hparams["cache"], encoder, hparams["cache_dtype"], hparams["cache_gigabytes"]
    )
    wanted = [
        (dataset.data[name]["wav"], dataset.data[name]["duration"], speed)
        for dataset in datasets
        for speed in speeds_of(dataset)
        for name in dataset.data_ids
    ]
    if wanted:
        wavs, seconds, speeds = zip(*wanted, strict=True)
        cache.fill(wavs, seconds, hparams["batch_seconds"], speeds=speeds)
    return cache


def refuse_too_long(encoder: torch.nn.Module, datasets: Iterable[DynamicItemDataset]) -> None:
    """Refuse utterances that are longer than the encoder takes at once (Whisper's 30 s)."""
    most = encoder.maximum_samples
    if most is None:
        return
    for dataset in datasets:
        rate = SAMPLE_RATE / min(speeds_of(dataset))  # at its slowest it has the most samples
        longer = [n for n in dataset.data_ids if dataset.data[n]["duration"] * rate > most]
        if longer:
            named = ", ".join(longer[:3]) + (", ..." if len(longer) > 3 else "")
            raise ValueError(
                f"{len(longer)} utterances ({named}) are longer than the {most / SAMPLE_RATE:g} s "
                f"that {encoder.source} takes at once; cut them or leave them out"
            )


def end_if_only_filled(
    hparams: Mapping[str, Any], encoder: torch.nn.Module, *caches: StateCache | None
) -> None:
    """End the process here if ``fill_only`` asks for stored states and nothing else.

    Raises
    ------
    ValueError
        There is no cache, or nothing to keep in it.
    """
    if not hparams.get("fill_only", False):
        return
    filled = [cache for cache in caches if cache is not None]
    if not filled:
        reason = "cache is null" if hparams["cache"] is None else why_nothing_is_kept(encoder)
        raise ValueError(f"fill_only: there is nothing to store, as {reason}")
    if if_main_process():
        for cache in filled:
            print(f"states {cache.layers} are in {cache.folder}")
    sys.exit(0)


def transcripts(dataset: DynamicItemDataset) -> list[str]:
    """Transcripts of all utterances."""
    return [dataset.data[name]["wrd"] for name in dataset.data_ids]


def read_signal(wav: str | Path, minimum_samples: int, speed: float = 1.0) -> torch.Tensor:
    """Read samples (samples,), with silence behind them if they are fewer than the minimum."""
    samples = change_speed(read_audio(wav, SAMPLE_RATE), speed)
    missing = minimum_samples - len(samples)
    return torch.nn.functional.pad(samples, (0, missing)) if missing > 0 else samples


def add_signal(
    dataset: DynamicItemDataset, minimum_samples: int = 0, cache: StateCache | None = None
) -> None:
    """Let a dataset give ``id``, ``duration`` and ``signal``.

    ``signal`` is what the encoder is to be given: samples (samples,), or stored states (frames,
    num_stored, width) where there is a cache.

    Arguments
    ---------
    dataset : DynamicItemDataset
        With ``wav``, a path.
    minimum_samples : int
        Shorter signals are filled up with silence, so that the encoder gives a frame for them.
    cache : StateCache, optional
        Filled with the states of these utterances.
    """
    choice = getattr(dataset, "speeds", None)  # of vary_speed

    def signal(wav: str, name: str) -> torch.Tensor:
        speed = 1.0 if choice is None else choice.of(name)
        if cache is None:
            return read_signal(wav, minimum_samples, speed)
        return cache.read(wav, speed)

    dataset.add_dynamic_item(signal, takes=["wav", "id"], provides="signal")
    dataset.set_output_keys(["id", "duration", "signal"])


def add_ctc_items(
    dataset: DynamicItemDataset,
    units: Units,
    minimum_samples: int = 0,
    cache: StateCache | None = None,
) -> None:
    """Let a dataset with ``wrd`` also give ``targets`` (units,) and ``wrd``.

    Arguments
    ---------
    dataset : DynamicItemDataset
        With ``wav`` and ``wrd``.
    units : CharUnits | SentencePieceUnits
    minimum_samples, cache
        As for :func:`add_signal`.
    """

    def targets(wrd: str) -> torch.Tensor:
        return torch.tensor(units.encode(wrd), dtype=torch.long)

    add_signal(dataset, minimum_samples, cache)
    dataset.add_dynamic_item(targets, takes="wrd", provides="targets")
    dataset.set_output_keys(["id", "duration", "signal", "targets", "wrd"])


def add_label_items(
    dataset: DynamicItemDataset,
    labels: Mapping[str, Sequence[str]],
    minimum_samples: int = 0,
    cache: StateCache | None = None,
) -> None:
    """Let a dataset with a column for each slot also give ``targets`` (slots,), class numbers.

    Arguments
    ---------
    dataset : DynamicItemDataset
        With ``wav`` and a column for each slot.
    labels : Mapping[str, Sequence[str]]
        Classes of each slot in the order of their numbers.
    minimum_samples, cache
        As for :func:`add_signal`.
    """
    numbers = [{label: n for n, label in enumerate(known)} for known in labels.values()]

    def targets(*values: str) -> torch.Tensor:
        return torch.tensor([slot[v] for slot, v in zip(numbers, values, strict=True)])

    add_signal(dataset, minimum_samples, cache)
    dataset.add_dynamic_item(targets, takes=list(labels), provides="targets")
    dataset.set_output_keys(["id", "duration", "signal", "targets"])


def find_labels(
    dataset: DynamicItemDataset, slots: Sequence[str], source: str
) -> dict[str, list[str]]:
    """Find the classes of each slot in the training part.

    Arguments
    ---------
    dataset : DynamicItemDataset
        With a column for each slot.
    slots : Sequence[str]
    source : str
        Where the utterances are from, for messages.

    Returns
    -------
    dict[str, list[str]]
        Sorted, by slot.

    Raises
    ------
    ValueError
        A slot has one class: nothing to learn.
    """
    labels = {}
    for slot in slots:
        counts = Counter(dataset.data[name][slot] for name in dataset.data_ids)
        if len(counts) < 2:
            raise ValueError(
                f"{source}: every {slot} is {min(counts)!r}; expected two classes or more"
            )
        single = sorted(label for label, count in counts.items() if count == 1)
        if single:
            logger.warning(
                f"{source}: expected two examples or more of each {slot}; there is one of "
                f"{_some(single)}"
            )
        labels[slot] = sorted(counts)
    return labels


def check_labels(
    dataset: DynamicItemDataset, labels: Mapping[str, Sequence[str]], source: str
) -> None:
    """Refuse an utterance of dev or test with a class that the training part does not have."""
    for slot, known in labels.items():
        allowed = set(known)
        for name in dataset.data_ids:
            label = dataset.data[name][slot]
            if label not in allowed:
                raise ValueError(
                    f"{source}: the {slot} of {name!r} is {label!r}, unknown to the training part; "
                    f"expected one of {_some(known)}"
                )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def needed_frames(targets: list[int]) -> int:
    """Frames that CTC needs: one for each target, and a blank between equal neighbours.

    Example
    -------
    >>> needed_frames([3, 5, 5, 5, 4])
    7
    """
    repeats = sum(a == b for a, b in zip(targets, targets[1:], strict=False))
    return len(targets) + repeats


def drop_unalignable(
    dataset: DynamicItemDataset,
    units: Units,
    count_frames: Callable[[torch.Tensor], torch.Tensor],
) -> FilteredSortedDynamicItemDataset:
    """Leave out, by name, training utterances with fewer frames than CTC needs, or without targets.

    Arguments
    ---------
    dataset : DynamicItemDataset
    units : CharUnits | SentencePieceUnits
    count_frames : Callable
        Frames of the encoder for numbers of samples, ``encoder.count_frames``.

    Returns
    -------
    FilteredSortedDynamicItemDataset
        The rest, in the same order.

    Raises
    ------
    ValueError
        Nothing remains.
    """
    names = dataset.data_ids
    rate = SAMPLE_RATE / max(speeds_of(dataset))  # at its fastest it has the fewest frames
    samples = [round(dataset.data[name]["duration"] * rate) for name in names]
    frames = count_frames(torch.tensor(samples)).tolist()
    kept, dropped = [], []
    for name, available in zip(names, frames, strict=True):
        needed = needed_frames(units.encode(dataset.data[name]["wrd"]))
        if needed == 0:
            dropped.append(f"{name} (no targets)")
        elif needed > available:
            dropped.append(f"{name} ({max(available, 0)} frames, {needed} needed)")
        else:
            kept.append(name)
    if dropped:
        logger.warning(
            f"{len(dropped)} of {len(names)} training utterances are too short for their CTC "
            f"targets and left out: {', '.join(dropped)}"
        )
    if not kept:
        raise ValueError(
            f"none of {len(names)} training utterances has enough frames for its CTC targets; "
            f"the first: {dropped[0]}"
        )
    return FilteredSortedDynamicItemDataset(dataset, kept)


def batches_by_length(
    dataset: DynamicItemDataset,
    batch_seconds: float,
    num_buckets: int,
    max_batch_size: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
) -> DynamicBatchSampler:
    """Batches of about equally long utterances (SpeechBrain's ``DynamicBatchSampler``).

    Arguments
    ---------
    dataset : DynamicItemDataset
        With a ``duration`` in seconds for each utterance.
    batch_seconds : float
        Upper limit of a batch, padding included, in seconds; a longer utterance goes alone.
    num_buckets : int
        Groups of similar length: more of them, less padding and less shuffling.
    max_batch_size : int, optional
        Upper limit of a batch in utterances.
    seed : int
    shuffle : bool
        Otherwise longest first.

    Returns
    -------
    DynamicBatchSampler
    """
    return DynamicBatchSampler(
        dataset,
        max_batch_length=batch_seconds,
        num_buckets=num_buckets,
        max_batch_ex=max_batch_size,
        shuffle=shuffle,
        batch_ordering="random" if shuffle else "descending",
        seed=seed,
    )
