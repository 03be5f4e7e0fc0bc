"""One voice of espeak-ng speaks a list of sentences into wav files; run as a script by ``spoken``.

The library keeps its state in global variables, and what it says depends a little on what it said
before. A process of its own for each voice makes the result repeatable. ``python espeak.py`` reads
the job as JSON from stdin and prints the number of samples of each file as JSON.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

import espeakng_loader
import numpy
import soundfile

# From espeak-ng's speak_lib.h.
SYNCHRONOUS, DONT_EXIT, UTF8, POS_CHARACTER = 2, 0x8000, 1, 1
PARAMETERS = {"rate": 1, "volume": 2, "pitch": 3, "range": 4}
SYNTH_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Voice:
    """A voice of espeak-ng; only one per process, whose working folder it changes.

    Arguments
    ---------
    accent : str
        Language of espeak-ng, such as "en-us".
    variant : str
        Voice variant, such as "f1"; the name of a file in ``voices/!v`` of espeak-ng's data.
    parameters : dict
        ``rate`` in words per minute; ``pitch``, ``range`` (of pitch) and ``volume`` from 0 to 100.
    """

    def __init__(self, accent: str, variant: str, parameters: dict[str, int]) -> None:
        data = Path(espeakng_loader.get_data_path())
        # An unknown variant would be ignored without a word.
        if not (data / "voices" / "!v" / variant).is_file():
            raise ValueError(f"espeak-ng has no voice variant {variant!r} in {data}/voices/!v")
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        # The library has 160 bytes for the path of its data: a deep folder needs a relative one.
        os.chdir(data.parent)
        self.sample_rate = self.library.espeak_Initialize(
            SYNCHRONOUS, 0, ctypes.c_char_p(data.name.encode()), DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak-ng does not start with its data in {data}")
        self._chunks: list[numpy.ndarray] = []
        self._callback = SYNTH_CALLBACK(self._receive)  # must outlive the library's use of it
        self.library.espeak_SetSynthCallback(self._callback)
        self.library.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        name = f"{accent}+{variant}"
        if self.library.espeak_SetVoiceByName(ctypes.c_char_p(name.encode())) != 0:
            raise ValueError(f"espeak-ng has no voice {name!r}")
        for key, value in parameters.items():
            self.library.espeak_SetParameter(PARAMETERS[key], value, 0)

    def _receive(self, samples, count, events) -> int:
        if samples and count > 0:
            self._chunks.append(numpy.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str) -> numpy.ndarray:
        """Speak a sentence: ``(samples,)``, float64 in [-1, 1], at ``self.sample_rate``."""
        self._chunks.clear()
        raw = text.encode("utf-8") + b"\0"
        status = self.library.espeak_Synth(raw, len(raw), 0, POS_CHARACTER, 0, UTF8, None, None)
        self.library.espeak_Synchronize()
        if status != 0 or not self._chunks:
            raise RuntimeError(f"espeak-ng said nothing for {text!r} (status {status})")
        return numpy.concatenate(self._chunks) / 32768.0


def trim(signal: numpy.ndarray, margin: int, threshold: float = 1e-3) -> numpy.ndarray:
    """Cut silence at both ends down to ``margin`` samples."""
    loud = numpy.flatnonzero(numpy.abs(signal) > threshold)
    if len(loud) == 0:
        raise RuntimeError("espeak-ng gave silence")
    return signal[max(loud[0] - margin, 0) : loud[-1] + margin]


def resample(signal: numpy.ndarray, rate: int, new_rate: int) -> numpy.ndarray:
    """Band-limited resampling in the frequency domain; needs nothing but numpy, so starts fast."""
    step = rate // numpy.gcd(rate, new_rate)
    padded = numpy.pad(signal, (0, -len(signal) % step))
    count = len(padded) * new_rate // rate
    spectrum = numpy.fft.rfft(padded)
    return numpy.fft.irfft(spectrum[: count // 2 + 1], count) * (count / len(padded))


def at_level(
    signal: numpy.ndarray, level_db: float, snr_db: float, generator: numpy.random.Generator
) -> numpy.ndarray:
    """Scale to an RMS level (dB of full scale), add white noise; peaks stay below 0.95."""
    signal = signal * (10 ** (level_db / 20) / numpy.sqrt(numpy.mean(signal**2)))
    noise = generator.standard_normal(len(signal)) * 10 ** ((level_db - snr_db) / 20)
    mixed = signal + noise
    return mixed * min(1.0, 0.95 / numpy.abs(mixed).max())


def run(job: dict) -> list[int]:
    """Speak a job's sentences into wav files; returns the number of samples of each."""
    voice = Voice(job["accent"], job["variant"], job["parameters"])
    rate, counts = job["sample_rate"], []
    for item in job["items"]:
        spoken = trim(voice.say(item["text"]), margin=voice.sample_rate // 10)
        signal = resample(spoken, voice.sample_rate, rate)
        generator = numpy.random.default_rng(item["noise_seed"])
        signal = at_level(signal, item["level_db"], item["snr_db"], generator)
        soundfile.write(item["path"], signal, rate, subtype="PCM_16")
        counts.append(len(signal))
    return counts


if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
