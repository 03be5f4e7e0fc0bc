"""What filling the cache costs against one forward pass over the same data.

python benchmarks/filling.py [--shape wav2vec2-base] [--utterances 24] [--dtypes fp16 int8 fp32]

Noise of 2 to 8 s as WAV files, an encoder with random weights, states 3, 6 and 9. A pass reads the
audio and runs the encoder in batches of 30 s and keeps nothing, as an epoch without a cache does;
filling also hashes the audio, packs the states and writes them. Both take turns in one process;
medians of time and of the work of all threads, which does not suffer from other programs.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import soundfile
import torch
from training_step import CONFIGS, write_shape

from hff_modules import SSLEncoder
from hff_modules.cache import DTYPES, StateCache
from hff_modules.cli import run
from hff_modules.data.audio import read_audio
from hff_modules.data.batches import by_length, padded
from hff_modules.measure import versions, write_results

BATCH_SECONDS = 30.0


def write_noise(folder: Path, utterances: int) -> dict[tuple[str, float], float]:
    """Write utterances of 2 to 8 s; gives their durations by file and speed."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(2, 8, utterances).tolist()
    made = {}
    for number, seconds in enumerate(lengths):
        noise = 0.1 * torch.randn(int(16000 * seconds), generator=generator)
        path = str(folder / f"{number}.wav")
        soundfile.write(path, noise.numpy(), 16000)
        made[path, 1.0] = len(noise) / 16000
    return made


def one_pass(encoder: SSLEncoder, speech: dict, device: str) -> None:
    """Read and encode everything, in the batches of the filling."""
    for batch in by_length(speech, speech.get, BATCH_SECONDS):
        wavs, wav_lens = padded([read_audio(wav) for wav, _ in batch])
        with torch.no_grad():
            states, _ = encoder(wavs.to(device), wav_lens.to(device))
        states.cpu()


def fill(encoder: SSLEncoder, speech: dict, folder: Path, dtype: str) -> None:
    """Fill an empty cache."""
    cache = StateCache(folder, encoder, dtype)
    wavs, seconds = [wav for wav, _ in speech], list(speech.values())
    spent = cache.fill(wavs, seconds, BATCH_SECONDS, progress=False)
    if spent["utterances"] != len(speech):
        raise ValueError(f"{folder}: expected an empty cache, {spent['utterances']} were stored")


def timed(work, *args) -> tuple[float, float]:
    """Seconds, and seconds of all threads."""
    start, before = time.perf_counter(), time.process_time()
    work(*args)
    return time.perf_counter() - start, time.process_time() - before


def table(rows: dict[str, dict]) -> str:
    """Markdown: seconds, and how many times those of the pass."""
    lines = ["| what | s | × one pass | CPU s | × one pass |", "| --- " * 5 + "|"]
    base = rows["one pass"]
    for name, row in rows.items():
        cells = [name]
        for key in ("seconds", "cpu_seconds"):
            cells += [f"{row[key]:.2f}", f"{row[key] / base[key]:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=list(CONFIGS), default="wav2vec2-base")
    parser.add_argument("--utterances", type=int, default=24)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp16", "int8"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=None, help="JSON file; by default in results/")
    options = parser.parse_args(argv)
    default = Path(f"results/filling-{options.shape}-{options.device}.json")
    works = ["one pass", *(f"filling, {dtype}" for dtype in options.dtypes)]
    taken: dict[str, list] = {name: [] for name in works}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "encoder").mkdir()
        write_shape(options.shape, folder / "encoder")
        speech = write_noise(folder, options.utterances)
        encoder = SSLEncoder(str(folder / "encoder"), [3, 6, 9], pretrained=False)
        encoder = encoder.to(options.device).eval()
        one_pass(encoder, dict(list(speech.items())[:2]), options.device)  # warms up
        for _ in range(options.rounds):
            taken["one pass"].append(timed(one_pass, encoder, speech, options.device))
            for dtype in options.dtypes:
                place = folder / "cache"
                taken[f"filling, {dtype}"].append(timed(fill, encoder, speech, place, dtype))
                shutil.rmtree(place)
    rows = {}
    for work, times in taken.items():
        seconds, worked = zip(*times, strict=True)
        rows[work] = {
            "seconds": statistics.median(seconds),
            "cpu_seconds": statistics.median(worked),
        }
    about = {key: getattr(options, key) for key in ("shape", "utterances", "device", "rounds")}
    about |= {"threads": torch.get_num_threads(), "speech_seconds": sum(speech.values())}
    write_results(options.output or default, {**about, "rows": rows, "versions": versions()})
    print(f"{table(rows)}\n\nin {options.output or default}")


if __name__ == "__main__":
    run(main)
