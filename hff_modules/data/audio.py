"""Audio files in, 16 kHz mono float32 tensors out (wav, flac, mp3, ogg, opus through soundfile)."""

import logging
import math
import multiprocessing
import os
from dataclasses import dataclass
from typing import BinaryIO

import soundfile
import torch
import torchaudio

logger = logging.getLogger(__name__)

JOINED = "holds several streams, of which only the first would be read; convert it to one"
NO_SOUND = "the audio holds values that are no sound (-1 to 1 is expected)"
BREAKS_OFF = "breaks off before the end that its header names"
# Shared memory, so that forked DataLoader workers do not each say the same again every epoch.
_SAID = {kind: multiprocessing.RawValue("b", 0) for kind in ("channels", "rate")}


class AudioError(ValueError):
    """An audio file that cannot be used; the message names it."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says.

    Arguments
    ---------
    duration : float
        Seconds.
    sample_rate : int
        Hz, as stored in the file.
    channels : int
        Number of channels.
    frames : int
        Samples per channel at ``sample_rate``.
    """

    duration: float
    sample_rate: int
    channels: int
    frames: int


def audio_info(path: str | os.PathLike) -> AudioInfo:
    """Duration, rate and channels of an audio file, without decoding it.

    Arguments
    ---------
    path : str or path
        Audio file of any format that libsndfile reads.

    Returns
    -------
    AudioInfo

    Raises
    ------
    AudioError
        When the file is missing, unreadable, has no samples or a sample rate that is not supported.
    """
    _check_file(path)
    try:
        info = soundfile.info(os.fspath(path))
    except (soundfile.SoundFileError, OSError, UnicodeError) as error:
        raise AudioError(f"{printable(path)}: not a readable audio file ({error})") from error
    if info.frames <= 0:
        raise AudioError(f"{path}: the audio file has no samples")
    _check_length(path, info.frames)
    _check_rate(path, info.samplerate)
    return AudioInfo(info.frames / info.samplerate, info.samplerate, info.channels, info.frames)


def printable(path: str | os.PathLike) -> str:
    """A path as it can be printed and written, also one that is not UTF-8."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def check_end(path: str | os.PathLike) -> None:
    """Refuse a file that breaks off: of the samples that its header names, the last are decoded.

    Raises
    ------
    AudioError
        What :func:`read_audio` would say of it after decoding all.
    """
    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            file.seek(int(0.99 * file.frames))
            whole = len(file.read(1)) > 0
    except (soundfile.SoundFileError, OSError, UnicodeError):
        whole = False
    if not whole:
        raise AudioError(f"{path}: {BREAKS_OFF}")


def check_all(path: str | os.PathLike) -> None:
    """Refuse a file that is damaged anywhere; decodes all of it, in little memory.

    Raises
    ------
    AudioError
        As :func:`read_audio`.
    """
    decoded = 0
    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            expected = file.frames
            # Not file.blocks(): its blocks are as long as asked for, however little was decoded.
            while len(block := file.read(1 << 16, dtype="float32")):
                decoded += len(block)
                if not is_sound(torch.from_numpy(block)):
                    raise AudioError(f"{path}: {NO_SOUND}")
    except (soundfile.SoundFileError, OSError, UnicodeError) as error:
        raise AudioError(f"{printable(path)}: not a readable audio file ({error})") from error
    _check_decoded(path, decoded, expected)


def read_audio(path: str | os.PathLike, sample_rate: int = 16000) -> torch.Tensor:
    """Read a whole file as one mono signal at the asked sample rate.

    Several channels are averaged and other sample rates resampled; each is said once per run.

    Arguments
    ---------
    path : str or path
        Audio file of any format that libsndfile reads.
    sample_rate : int
        Hz of the returned signal.

    Returns
    -------
    torch.Tensor
        ``(samples,)``, float32, nominally in [-1, 1].

    Raises
    ------
    AudioError
        When the file is missing, unreadable, cut short, empty or holds values that are no sound.

    Example
    -------
    >>> folder = getfixture("tmpdir")
    >>> soundfile.write(f"{folder}/a.wav", [[0.5, 0.25]] * 800, samplerate=8000)
    >>> read_audio(f"{folder}/a.wav").shape
    torch.Size([1600])
    """
    _check_file(path)
    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            rate, expected = file.samplerate, file.frames
            _check_length(path, expected)
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, UnicodeError) as error:
        raise AudioError(f"{printable(path)}: not a readable audio file ({error})") from error
    if len(samples) == 0:
        raise AudioError(f"{path}: the audio file has no samples")
    _check_decoded(path, len(samples), expected)
    _check_rate(path, rate)
    signal = torch.from_numpy(samples)
    if signal.shape[1] > 1:
        _say_once("channels", f"{path} has {signal.shape[1]} channels: averaged to one")
    signal = signal.mean(dim=1)
    if not is_sound(signal):
        raise AudioError(f"{path}: {NO_SOUND}")
    if rate != sample_rate:
        _say_once("rate", f"{path} has {rate} Hz: resampled to {sample_rate} Hz")
        signal = torchaudio.functional.resample(signal, rate, sample_rate)
    return signal


def is_sound(signal: torch.Tensor) -> bool:
    """Whether all samples are numbers whose power is one, too: far from 1 it is infinite."""
    return bool((signal.abs() < 2.0**31).all())


def is_supported(rate: int) -> bool:
    """Whether audio of this sample rate is resampled: the filter for 44,101 Hz fills the memory."""
    shared = math.gcd(rate, 16000)
    return 4000 <= rate <= 384_000 and rate <= 1000 * shared and 16000 <= 4000 * shared


def _check_rate(path: str | os.PathLike, rate: int) -> None:
    if not is_supported(rate):
        raise AudioError(f"{path}: a sample rate of {rate} Hz is not supported")


def _check_file(path: str | os.PathLike) -> None:
    if not os.path.isfile(path):
        raise AudioError(f"{path}: no such audio file")
    if os.path.getsize(path) == 0:
        raise AudioError(f"{path}: the audio file is empty (0 bytes)")
    try:
        with open(path, "rb") as file:
            fault = fault_in(file)
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror})") from error
    if fault:
        raise AudioError(f"{path}: {fault}")


def fault_in(file: BinaryIO) -> str | None:
    """What libsndfile does not say: more audio follows than it reads, or less than there should be.

    Arguments
    ---------
    file : BinaryIO
        Any file, from its beginning.
    """
    if goes_on(file):
        return JOINED
    file.seek(0)
    return BREAKS_OFF if _wav_breaks_off(file) else None


def _wav_breaks_off(file: BinaryIO) -> bool:
    """Whether a WAV or AIFF file holds less than the size of its samples' chunk."""
    head = file.read(12)
    order = {b"RIFFWAVE": "little", b"FORMAIFF": "big", b"FORMAIFC": "big"}.get(head[:4] + head[8:])
    place, end = 12, file.seek(0, os.SEEK_END)
    while order and place + 8 <= end:
        file.seek(place)
        name, size = file.read(4), int.from_bytes(file.read(4), order)
        place += 8
        if name in (b"data", b"SSND"):
            # Written to a pipe, it has no size, or the largest; some writers count their header.
            return size < 0x7FFF0000 and end - place < 0.99 * size
        place += size + size % 2
    return False


def goes_on(file: BinaryIO) -> bool:
    """Whether audio follows the stream that libsndfile reads, as when MP3 or Ogg files are joined.

    Arguments
    ---------
    file : BinaryIO
        Any file, from its beginning; what is neither does not go on.
    """
    head = file.read(10)
    if head[:4] == b"OggS":
        return _ogg_goes_on(file)
    start = 0
    if len(head) == 10 and head[:3] == b"ID3":  # a tag in front; its length has 7 bits of each byte
        start = 10 + sum(byte << 7 * place for place, byte in enumerate(reversed(head[6:])))
        file.seek(start)
        head = file.read(10)
    return _is_frame(head) and _mp3_goes_on(file, start, head + file.read(190))


def _ogg_goes_on(file: BinaryIO) -> bool:
    """Whether a stream begins (flag 2 of a page) behind pages of another."""
    begun = False
    file.seek(0)
    while len(page := file.read(27)) == 27 and page[:4] == b"OggS":
        begins = bool(page[5] & 2)
        if begins and begun:
            return True
        begun = begun or not begins
        file.seek(sum(file.read(page[26])), os.SEEK_CUR)
    return False


def _mp3_goes_on(file: BinaryIO, start: int, frame: bytes) -> bool:
    """Whether frames, or another tag, follow behind as many bytes as the first frame speaks of."""
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if place < 0 or len(frame) < place + 16 or not frame[place + 7] & 2:
        # It says no length in bytes: all will be read.
        return False
    place += 8 + 4 * (frame[place + 7] & 1)  # behind a length in frames
    file.seek(start + int.from_bytes(frame[place : place + 4], "big"))
    behind = file.read(3)
    return behind == b"ID3" or _is_frame(behind)


def _is_frame(data: bytes) -> bool:
    return len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2  # sync, and layer 3


def _check_length(path: str | os.PathLike, frames: int) -> None:
    if frames > 1 << 48:  # libsndfile's largest number, of streams joined to one Ogg file
        raise AudioError(f"{path}: {JOINED}")


def _check_decoded(path: str | os.PathLike, decoded: int, expected: int) -> None:
    if decoded < 0.99 * expected:  # lossy formats only estimate their length
        raise AudioError(f"{path}: only {decoded} of {expected} samples can be decoded")


def _say_once(kind: str, message: str) -> None:
    if not _SAID[kind].value:
        _SAID[kind].value = 1
        logger.warning("%s (and so are all others like it, without further notice)", message)
