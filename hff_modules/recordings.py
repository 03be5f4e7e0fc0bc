"""Recordings of any length, rate and channels: found, and read in pieces of bounded size."""

import glob
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
import torchaudio

from hff_modules.data.audio import NO_SOUND, AudioError, audio_info, is_sound, printable

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000
STDIN = "-"
_LOWPASS_WIDTH = 6  # torchaudio's default, which decides how far a sample is heard


@dataclass(frozen=True)
class Recording:
    """One thing to read.

    Arguments
    ---------
    name : str
        As it was given, for messages and results.
    path : Path
        Where it lies.
    place : Path
        Where results of its own go, below a folder for results; without a suffix.
    seconds : float
        By its header.
    """

    name: str
    path: Path
    place: Path
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Something that could not be read, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        name, reason = printable(self.name), printable(self.reason)
        return reason if name in reason else f"{name}: {reason}"


def is_audio(path: Path) -> bool:
    """Whether a file's ending is one that libsndfile reads."""
    kind = path.suffix.lower().removeprefix(".")
    return kind in {"wav", "flac", "mp3", "ogg", "oga", "opus", "aif", "aiff", "au", "caf", "w64"}


# Sound that libsndfile does not read
FOREIGN = {".m4a", ".m4b", ".aac", ".amr", ".wma", ".3gp", ".mp4", ".webm", ".mov", ".mkv", ".avi"}


def audio_below(folder: Path) -> list[Path]:
    """Audio at any depth, sorted. Links to folders are followed; what is hidden is left out."""
    found, seen, foreign = [], set(), []
    for here, folders, files in os.walk(folder, onerror=_say, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # links may go in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = [Path(here, name) for name in files if not name.startswith(".")]
        found += [path for path in visible if is_audio(path) and path.is_file()]
        foreign += [path for path in visible if path.suffix.lower() in FOREIGN]
    if foreign:
        logger.warning(
            "%s: %d files (%s%s) cannot be read and are left out; make them wav or flac",
            *(folder, len(foreign), min(foreign).name, ", ..." * (len(foreign) > 1)),
        )
    return sorted(found)


def _say(error: OSError) -> None:
    logger.warning("%s: %s; left out", error.filename, error.strerror)


def find_recordings(
    inputs: Iterable[str], spool: Path | None = None
) -> Iterator[Recording | Failure]:
    """Find what a command line names, in its order; folders and patterns in alphabetical order.

    Arguments
    ---------
    inputs : Iterable[str]
        Files, folders (searched to any depth, by the endings of their files), patterns such as
        ``"calls/*.wav"``, or ``-`` for standard input.
    spool : Path, optional
        Folder for what comes from standard input, which cannot be read twice.

    Yields
    ------
    Recording | Failure
        A failure for a file that is missing or no audio, a pattern or folder with nothing in it.
    """
    for given in inputs:
        if given == STDIN:
            yield _described(STDIN, _spooled(spool), Path("stdin"))
        elif Path(given).is_dir():
            found = audio_below(Path(given))
            for path in found:
                yield _described(str(path), path, path.relative_to(given))
            if not found:
                yield Failure(given, "no audio file in this folder")
        elif not os.path.exists(given) and glob.has_magic(given):
            found = sorted(glob.glob(given, recursive=True))
            for name in found:
                yield _described(name, Path(name), Path(Path(name).name))
            if not found:
                yield Failure(given, "no file matches this pattern")
        else:
            yield _described(given, Path(given), Path(Path(given).name))


def _described(name: str, path: Path, place: Path) -> Recording | Failure:
    try:
        return Recording(name, path, place.with_suffix(""), audio_info(path).duration)
    except AudioError as error:
        return Failure(name, str(error).replace(str(path), name))


def _spooled(folder: Path | None) -> Path:
    """Write standard input to a file, piece by piece."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="stdin-", delete=False) as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return Path(file.name)


class Resampler:
    """Resample a signal that comes in pieces, as :func:`torchaudio.functional.resample` the whole.

    Arguments
    ---------
    rate : int
        Hz of what is given.
    wanted : int
        Hz of what comes out.

    Example
    -------
    >>> resampler = Resampler(8000, 16000)
    >>> sum(len(piece) for piece in resampler([torch.zeros(100), torch.zeros(50)]))
    300
    """

    def __init__(self, rate: int, wanted: int = SAMPLE_RATE):
        shared = math.gcd(rate, wanted)
        self.rate, self.wanted = rate // shared, wanted // shared
        width = _LOWPASS_WIDTH * self.rate / (0.99 * min(self.rate, self.wanted))
        # How far to either side a sample is heard, in whole periods of both rates.
        self.context = (math.ceil(width / self.rate) + 1) * self.rate

    def __call__(self, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Resample pieces (samples,) of one signal."""
        if self.rate == self.wanted:
            yield from pieces
            return
        pending, before = torch.zeros(0), 0  # of the pending samples, so many are context
        for piece in pieces:
            pending = torch.cat([pending, piece])
            new = (len(pending) - before - self.context) // self.rate * self.rate
            if new <= 0:
                continue
            done = before + new
            out = self._resample(pending[: done + self.context])
            yield out[self._out(before) : self._out(done)]
            before = min(self.context, done)
            pending = pending[done - before :]
        yield self._resample(pending)[self._out(before) :]

    def _resample(self, samples: torch.Tensor) -> torch.Tensor:
        return torchaudio.functional.resample(samples, self.rate, self.wanted)

    def _out(self, samples: int) -> int:
        return samples // self.rate * self.wanted


def read_pieces(path: str | Path, seconds: float = 10.0) -> Iterator[torch.Tensor]:
    """Read a recording piece by piece as one mono signal at 16 kHz.

    Arguments
    ---------
    path : str | Path
        Audio file of any format that libsndfile reads.
    seconds : float
        Of a piece.

    Yields
    ------
    torch.Tensor
        (samples,), float32.

    Raises
    ------
    AudioError
        As :func:`hff_modules.data.audio.read_audio`; what is cut short is noticed at its end.
    """
    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            yield from Resampler(file.samplerate)(_mono(file, path, seconds))
    except soundfile.SoundFileError as error:
        raise AudioError(f"{path}: not a readable audio file ({error})") from error


def _mono(file: soundfile.SoundFile, path, seconds: float) -> Iterator[torch.Tensor]:
    count, read = max(1, round(seconds * file.samplerate)), 0
    while len(samples := file.read(count, dtype="float32", always_2d=True)):
        read += len(samples)
        signal = torch.from_numpy(samples).mean(dim=1)
        if not is_sound(signal):
            raise AudioError(f"{path}: {NO_SOUND}")
        yield signal
    if read == 0:
        raise AudioError(f"{path}: the audio file has no samples")
    if read < 0.99 * file.frames:  # lossy formats only estimate their length
        raise AudioError(f"{path}: only {read} of {file.frames} samples can be decoded")


def windows(pieces: Iterable[torch.Tensor], size: int, overlap: int) -> Iterator[torch.Tensor]:
    """Cut a signal that comes in pieces into overlapping windows.

    Arguments
    ---------
    pieces : Iterable[torch.Tensor]
        (samples,) each.
    size : int
        Samples of a window.
    overlap : int
        Samples that a window shares with the next.

    Yields
    ------
    torch.Tensor
        (size,); the last one may be shorter, down to one sample more than the overlap.
    """
    pending = torch.zeros(0)
    for piece in pieces:
        pending = torch.cat([pending, piece])
        while len(pending) > size:
            yield pending[:size]
            pending = pending[size - overlap :]
    yield pending
