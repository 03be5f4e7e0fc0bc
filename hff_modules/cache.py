"""Hidden states on disk: what training cannot change is computed once, and shared by every run.

The states at and below the horizon never change, so each utterance's are kept as one safetensors
file. The file's name is a hash of the audio's content, its folder's name a hash of everything else
that decides about the states (weights, layers, precision, preprocessing, frozen adapters): a stale
entry cannot be read. Entries appear whole or not at all, so two runs may fill one cache, and a run
that is killed leaves it valid.
"""

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from speechbrain.utils.distributed import ddp_broadcast, ddp_prevent_block, if_main_process
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from hff_modules.data.audio import AudioError, read_audio
from hff_modules.data.batches import by_length, padded
from hff_modules.data.speed import change_speed
from hff_modules.files import locked, write_atomically

logger = get_logger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
_FORMAT = 1
WORTH_SAYING = 300.0  # seconds of speech above which the time is foretold
PATIENCE, ATTEMPTS = 2.0, 60  # seconds between two looks at what other processes do
Variant = tuple[str, float]  # an audio file and its speed


class CacheError(ValueError):
    """A cache that cannot be used; the message says why and what to do."""


class StateCache:
    """States of one encoder, as it is now, on disk.

    Arguments
    ---------
    folder : str | Path
        May hold the states of any number of encoders.
    encoder : SSLEncoder
        With its adapters attached: what is stored follows from its horizon.
    dtype : str
        "fp32", "fp16", "bf16", or "int8" with one scale for each frame.
    max_gigabytes : float, optional
        Refuse to let this folder, of these layers, grow beyond; by default the free disk decides.

    Example
    -------
    >>> cache = StateCache("results/cache", encoder)          # doctest: +SKIP
    >>> cache.fill(["a.wav", "b.wav"], [3.2, 4.1])            # doctest: +SKIP
    >>> cache.read("a.wav").shape                             # doctest: +SKIP
    torch.Size([80, 4, 192])
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: torch.nn.Module,
        dtype: str = "fp16",
        max_gigabytes: float | None = None,
    ):
        if dtype not in DTYPES:
            raise CacheError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
        if not isinstance(max_gigabytes, int | float | None):
            raise CacheError(f"cache_gigabytes: expected a number, got {max_gigabytes!r}")
        self.encoder, self.dtype, self.max_gigabytes = encoder, dtype, max_gigabytes
        self.layers = encoder.stored_layers
        if not self.layers:
            raise CacheError(
                f"nothing of this encoder can be cached: {why_nothing_is_kept(encoder)}"
            )
        self.key = {"format": _FORMAT, "dtype": dtype, **encoder.frozen_manifest()}
        text = json.dumps(self.key, indent=2, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.superset: tuple[Path, list[int]] | None = None  # a place to read from, and columns
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.json").exists():
            write_atomically(self.folder / "key.json", text + "\n")
        self.digests = AudioDigests(Path(folder) / "audio.json")

    def path(self, wav: str | Path, speed: float = 1.0) -> Path:
        """Where the states of an audio file, at this speed, are or would be."""
        digest = self.digests.of(wav)
        variant = "" if speed == 1 else f"-{round(100 * speed)}"
        return self.folder / digest[:2] / f"{digest}{variant}.safetensors"

    def _found(self, wav: str | Path, speed: float) -> tuple[Path, list[int] | None]:
        """Where the states are, and which columns of what is stored there; None for all."""
        path = self.path(wav, speed)
        if self.superset is None or path.exists():
            return path, None
        folder, columns = self.superset
        return folder / path.relative_to(self.folder), columns

    def read(self, wav: str | Path, speed: float = 1.0) -> torch.Tensor:
        """Give the states of one utterance.

        Arguments
        ---------
        wav : str | Path
            Audio file.
        speed : float
            1.0 is the speech as it is.

        Returns
        -------
        torch.Tensor
            (frames, num_stored, width); fp32 if stored as fp32 or int8, otherwise as stored.

        Raises
        ------
        CacheError
            It is not here, or its file is damaged.
        """
        path, columns = self._found(wav, speed)
        try:
            entry = load_file(path)
        except FileNotFoundError:
            raise CacheError(
                f"the states of {wav} are not in {self.folder}; fill it first"
            ) from None
        except SafetensorError as error:
            raise CacheError(f"{path} is damaged ({error}); delete it and run again") from None
        if columns is not None:
            entry = {name: tensor[:, columns] for name, tensor in entry.items()}
        states = entry["states"]
        return states.float() * entry["scale"] if "scale" in entry else states.contiguous()

    def fill(
        self,
        wavs: Sequence[str | Path],
        seconds: Sequence[float],
        batch_seconds: float = 60.0,
        progress: bool = True,
        speeds: Sequence[float] | None = None,
    ) -> dict[str, float]:
        """Compute what is missing, short utterances first; under torchrun each process its share.

        Where another run has kept more layers of the same encoder for all these utterances, theirs
        are read and nothing is computed.

        Arguments
        ---------
        wavs : Sequence[str | Path]
            Audio files.
        seconds : Sequence[float]
            Their durations.
        batch_seconds : float
            Longest batch, padding included.
        progress : bool
            Show a bar.
        speeds : Sequence[float], optional
            Of each; 1.0 by default.

        Returns
        -------
        dict[str, float]
            ``utterances`` and ``seconds`` (of work) that were spent, and ``gigabytes`` added.

        Raises
        ------
        CacheError
            The disk or ``max_gigabytes`` is too small; said before anything is computed.
        AudioError
            Files that cannot be read, all of them; the states of the others are stored.
        """
        speeds = [1.0] * len(wavs) if speeds is None else speeds
        wanted = {
            (str(wav), float(speed)): long / speed
            for wav, long, speed in zip(wavs, seconds, speeds, strict=True)
        }
        spent = {"utterances": 0, "seconds": 0.0, "gigabytes": 0.0}
        with ExitStack() as held:
            todo = self._missing(wanted, held)
            if todo:
                spent = self._compute_all(todo, batch_seconds, progress)
        number, processes = _share()
        if number > 0:
            self.digests.load()  # the main process has hashed all
        for _ in range(ATTEMPTS):  # network file systems show late what others have written
            if processes == 1 or not self._lacking(wanted):  # where to read is found out, too
                return spent
            time.sleep(PATIENCE)
        raise CacheError(
            f"process {number} does not find in {self.folder} what others have stored there; "
            "--cache and --output_folder must be on a disk that all machines share"
        )

    def _absent(self, wanted: Iterable[Variant]) -> list[Variant]:
        return [variant for variant in wanted if not self._is_there(*variant)]

    def _is_there(self, wav: str, speed: float) -> bool:
        try:
            return self._found(wav, speed)[0].exists()
        except OSError:  # the audio is not: it is named with others when its turn comes
            return False

    def _missing(self, wanted: Mapping[Variant, float], held: ExitStack) -> dict[Variant, float]:
        """What is to be computed; then the lock is `held`, and the disk is large enough.

        The main process looks, and tells the others.
        """
        main, lacking = if_main_process(), []
        if main:
            lacking = self._lacking(wanted)
            self.digests.save()
        if not ddp_broadcast(bool(lacking)):
            return {}
        # Two runs that start together do not compute the same twice. It is asked for again and
        # again, as other processes would not wait longer than two hours for an answer.
        lock = self.folder.parent / f"{self.encoder.fingerprint_up_to(0)}.lock"
        for attempt in itertools.count():
            busy = False
            if main:
                try:
                    held.enter_context(locked(lock, wait=False))
                except BlockingIOError:
                    busy = True
            if not ddp_broadcast(busy):
                break
            if attempt == 0:
                logger.warning(f"{lock}: another run stores states of this encoder; waiting for it")
            time.sleep(PATIENCE)
        todo = {}
        if main:
            todo = {variant: wanted[variant] for variant in self._lacking(wanted)}
            if todo:
                self._check_space(self.gigabytes(todo.values()), sum(todo.values()) / 3600)
        return ddp_broadcast(todo)

    def _lacking(self, wanted: Iterable[Variant]) -> list[Variant]:
        """What is neither here nor, with all that is wanted, in a place with more layers."""
        absent = self._absent(wanted)
        return [] if not absent or self._use_superset(wanted) else absent

    def _compute_all(
        self, todo: Mapping[Variant, float], batch_seconds: float, progress: bool
    ) -> dict[str, float]:
        """Store the states of all; each process takes its share of the batches."""
        total, gigabytes = sum(todo.values()), self.gigabytes(todo.values())
        number, processes = _share()
        mode = self.encoder.training
        self.encoder.eval()
        bar = tqdm(
            total=round(total / processes),
            unit=" s of speech",
            desc="caching",
            # None: a bar in a terminal, nothing in a log file
            disable=None if progress and number == 0 else True,
        )
        start, unreadable = time.perf_counter(), []
        try:
            logger.info(
                f"caching states {self.layers} of {len(todo)} utterances ({total / 3600:.2f} h): "
                f"about {gigabytes:.2f} GB in {self.folder}{self._about_time(total / processes)}"
            )
            for batch in [*by_length(todo, todo.get, batch_seconds)][number::processes]:
                self._compute(batch, unreadable)
                bar.update(round(sum(todo[variant] for variant in batch)))
        finally:
            bar.close()
            self.encoder.train(mode)
        unreadable = _of_all(unreadable)
        if unreadable:  # all of them at once, after hours
            raise AudioError(
                f"{len(unreadable)} audio files cannot be read; leave them out:\n  "
                + "\n  ".join(sorted(unreadable)[:20])
                + "\n  ..." * (len(unreadable) > 20)
            )
        spent = time.perf_counter() - start
        return {"utterances": len(todo), "seconds": round(spent, 2), "gigabytes": gigabytes}

    def _about_time(self, seconds: float) -> str:
        """Foretell how long it takes, from some seconds of noise; not for what is soon done."""
        if seconds < WORTH_SAYING:
            return ""
        noise = 0.1 * torch.randn(1, 5 * 16000, generator=torch.Generator().manual_seed(0))
        noise = noise.to(self.encoder.device)
        self.encoder.encode(noise[:, :16000])
        start = time.perf_counter()
        _file(self.encoder.encode(noise)[0][0], self.dtype)  # waits for a GPU
        minutes = (time.perf_counter() - start) / 5 * seconds / 60
        return f", about {minutes:.1f} minutes"

    def _use_superset(self, wanted: Iterable[Variant]) -> bool:
        """Read from a place that holds these layers, and others, of all these utterances."""
        if self.superset is not None:  # utterances of an earlier filling are there
            return False
        for path in sorted(self.folder.parent.glob("*/key.json")):
            try:
                other = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue
            weights = other.get("weights", {})
            same = {**other, "weights": None} == {**self.key, "weights": None}
            if not same or not self.key["weights"].items() <= weights.items():
                continue
            stored = sorted(map(int, weights))
            self.superset = path.parent, [stored.index(layer) for layer in self.layers]
            if not self._absent(wanted):
                return True
            self.superset = None
        return False

    def gigabytes(self, seconds: Iterable[float]) -> float:
        """Foretell the size of utterances of these durations."""
        frames = sum(seconds) * self.encoder.frame_rate
        size = bytes_per_frame(self.encoder.hidden_size, self.dtype)
        return frames * len(self.layers) * size / 1e9

    def _check_space(self, gigabytes: float, hours: float) -> None:
        free = shutil.disk_usage(self.folder).free / 1e9
        what = f"caching {hours:.2f} h of speech takes about {gigabytes:.2f} GB in {self.folder}"
        if gigabytes > 0.95 * free:
            raise CacheError(
                f"{what}, and only {free:.2f} GB are free; use fewer layers, a smaller dtype, "
                "another folder, or no cache"
            )
        if self.max_gigabytes is not None:
            there = sum(f.stat().st_size for f in self.folder.glob("*/*.safetensors")) / 1e9
            if there + gigabytes > self.max_gigabytes:
                raise CacheError(
                    f"{what} beside the {there:.2f} GB that are there, and the budget is "
                    f"{self.max_gigabytes:g} GB"
                )

    def _compute(self, variants: Sequence[Variant], unreadable: list[str]) -> None:
        """Store the states of a batch; of files that cannot be read note why."""
        signals, readable = [], []
        for wav, speed in variants:
            try:
                signals.append(change_speed(read_audio(wav), speed))
                readable.append((wav, speed))
            except AudioError as error:
                unreadable.append(str(error))
        if not signals:
            return
        device = self.encoder.device
        wavs, wav_lens = padded(signals, self.encoder.minimum_samples)
        stored, frames = self.encoder.encode(wavs.to(device), wav_lens.to(device))
        for variant, states, count in zip(readable, stored, frames.tolist(), strict=True):
            write_atomically(self.path(*variant), _file(states[:count], self.dtype))


def why_nothing_is_kept(encoder: torch.nn.Module) -> str:
    """The reason why an encoder has no states that could be stored, for messages."""
    if encoder.horizon < 0:
        return f"training reaches down to its front end (horizon {encoder.horizon})"
    return "its adapted layers hear the padding of a batch (Whisper)"


def _share() -> tuple[int, int]:
    """Number of this process among those that compute together, and how many they are."""
    if ddp_prevent_block():  # there is but one, or SpeechBrain runs only the main one here
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _of_all(found: list[str]) -> list[str]:
    """What all processes found; waits for them."""
    shares: list = [found] * _share()[1]
    if len(shares) > 1:
        torch.distributed.all_gather_object(shares, found)
    return [one for share in shares for one in share]


def _pack(states: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    if dtype == "int8":
        scale = states.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return {"states": (states / scale).round().to(torch.int8), "scale": scale.contiguous()}
    if dtype == "fp16":  # an overflow would come back as infinity and poison the run
        states = states.clamp(-65504, 65504)
    return {"states": states.to(DTYPES[dtype]).contiguous()}


def _file(states: torch.Tensor, dtype: str) -> bytes:
    """What is written; converted where the states are, so that less is copied from a GPU."""
    return save({key: tensor.cpu() for key, tensor in _pack(states, dtype).items()})


def bytes_per_frame(width: int, dtype: str) -> int:
    """Bytes that a frame of one state takes; int8 has a factor beside it."""
    return DTYPES[dtype].itemsize * width + 4 * (dtype == "int8")


def as_stored(states: torch.Tensor, dtype: str) -> torch.Tensor:
    """Give states as they come back out of a cache of this dtype, fp32; width comes last."""
    packed = _pack(states, dtype)
    return packed["states"].float() * packed.get("scale", 1)


class AudioDigests:
    """Content hashes of audio files, so that an entry is found without decoding the audio.

    Kept in a JSON file with the size and time stamp that each file had, as git does it: a file is
    hashed again only when one of them has changed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._checked: dict[str, str] = {}  # this run
        self._new: set[str] = set()  # not yet saved
        self._known = self._read()

    def load(self) -> None:
        """Take over what has been saved since."""
        self._known |= self._read()

    def _read(self) -> dict[str, list]:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):  # absent or damaged: hashing again is all it costs
            return {}

    def of(self, wav: str | Path) -> str:
        """Hash of the file's bytes; the file is looked at once per run."""
        name = os.path.abspath(wav)
        if name not in self._checked:
            stat = os.stat(name)
            size, stamp, digest = self._known.get(name, (None, None, ""))
            if (size, stamp) != (stat.st_size, stat.st_mtime_ns):
                with open(name, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
                self._known[name] = [stat.st_size, stat.st_mtime_ns, digest]
                self._new.add(name)
            self._checked[name] = digest
        return self._checked[name]

    def save(self) -> None:
        """Write what is known, beside what other runs have written meanwhile."""
        if self._new:
            with locked(self.path.with_suffix(".lock")):
                known = self._read() | {name: self._known[name] for name in self._new}
                write_atomically(self.path, json.dumps(known))
            self._new.clear()
