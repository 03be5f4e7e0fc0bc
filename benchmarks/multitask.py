"""What more tasks cost: several exported models that share one pass of an encoder, against one.

python benchmarks/multitask.py [--batch 2] [--seconds 5] [--device cpu]

The encoder has the shape of wav2vec 2.0 Base (12 layers of 768) and random weights (speed does not
depend on them). A model is a hierarchical fusion of four states with a head for recognition, for
classes or for speakers; "top 3" has parallel adapters in layers 10 to 12. Every row is a process of
its own that reports the median time of a call and its peak of memory above that of the loaded
models. Ratios are against one model without adapters.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from hff_modules import HierarchicalFusion, SSLEncoder, adapters
from hff_modules.checkpoint import write_tensors
from hff_modules.data import CharUnits
from hff_modules.exported import load_exported
from hff_modules.heads import LinearHead, PooledClassifier, SpeakerHead
from hff_modules.measure import Meter, versions, write_results
from hff_modules.multitask import MultiTask

UNITS = CharUnits.from_texts(["THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG"])
LABELS = {"asr": None, "emotion": {"emotion": 7}, "intent": {"action": 6, "object": 14}}
LAYERS = [3, 6, 9, 12]
TOP = {"tpa": {"layers": "last:3", "bottleneck": 256}}
TASKS = ("asr", "emotion", "intent", "speaker")
# What a row calls: models, and whether they go through MultiTask or each through its own encoder.
ROWS: dict[str, tuple[list[str], bool]] = {
    "one task": (["asr"], False),
    "four tasks, one pass": (list(TASKS), True),
    "one task, adapters in the top 3": (["asr-top"], False),
    "four tasks, adapters in the top 3": ([f"{task}-top" for task in TASKS], True),
    "four tasks, four models": (list(TASKS), False),
    "four tasks, adapters in the top 3, four models": ([f"{task}-top" for task in TASKS], False),
}
BASELINE = "one task"
# Memory is measured apart: glibc otherwise keeps what is freed, and the peak depends on chance.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def write_model(encoder: SSLEncoder, task: str, folder: Path) -> None:
    """Write an exported model with random weights, its adapters those of the encoder."""
    size = encoder.hidden_size
    fusion = {"num_states": len(LAYERS), "input_size": size, "hidden_size": 256}
    kind, arguments = LinearHead, {"input_size": size, "num_units": UNITS.size}
    if task == "speaker":
        kind, arguments = SpeakerHead, {"input_size": size}
    elif task != "asr":
        kind, arguments = PooledClassifier, {"input_size": size, "slots": LABELS[task]}
    parts = {"fusion": (HierarchicalFusion, fusion), "head": (kind, arguments)}
    tensors = {
        f"adapters.{name}.{key}": tensor
        for name, adapter in encoder.adapters.items()
        for key, tensor in adapter.tensors().items()
    }
    for part, (made, settings) in parts.items():
        state = made(**settings).state_dict()
        tensors.update({f"{part}.{key}": tensor for key, tensor in state.items()})
    described = [
        {"name": name, "method": a.method, "layers": a.layers, "options": a.options}
        for name, a in encoder.adapters.items()
    ]
    manifest = {
        "format": 1,
        "task": task if task in ("asr", "speaker") else "classification",
        "encoder": {**encoder.manifest(), "precision": "fp32", "packed": False, "seed": 0},
        "layers": LAYERS,
        "horizon": encoder.horizon,
        "stored_as": None,
        "adapters": described,
        **{part: {"class": k.__name__, "arguments": a} for part, (k, a) in parts.items()},
    }
    write_results(folder / "hff.json", manifest)
    write_tensors(folder / "trained.safetensors", tensors)
    UNITS.save(folder / "tokenizer")
    slots = LABELS.get(task) or {}
    names = {slot: [str(number) for number in range(count)] for slot, count in slots.items()}
    write_results(folder / "labels.json", names)


def write_models(folder: Path) -> None:
    """Write the encoder and all exported models."""
    config = transformers.Wav2Vec2Config(layerdrop=0.0)
    torch.manual_seed(0)
    transformers.Wav2Vec2Model(config).save_pretrained(folder / "encoder")
    encoder = SSLEncoder(str(folder / "encoder"), layers=LAYERS)
    for task in TASKS:
        write_model(encoder, task, folder / task)
    for method, options in TOP.items():
        adapters.attach(encoder, method, **options)
    for task in TASKS:
        write_model(encoder, task, folder / f"{task}-top")


def measure(row: str, folder: Path, batch: int, seconds: float, device: str, calls: int) -> dict:
    """Run one row in this process.

    Returns
    -------
    dict
        ``call_seconds`` and ``cpu_seconds`` (medians; the latter is what all threads worked, and
        does not suffer from other programs), ``memory_mb`` (peak of the calls above the loaded
        models).
    """
    names, shared = ROWS[row]
    folders = {name: str(folder / name) for name in names}
    if shared:
        models = [MultiTask(None, folders, device)]
        modules = [models[0].encoder, *models[0].tasks.values()]
    else:
        models = modules = [load_exported(place, device) for place in folders.values()]
    for module in modules:  # mapped files are not in memory until they are touched
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
    meter = Meter(device)
    wavs = 0.1 * torch.randn(batch, int(16000 * seconds), device=device)
    wav_lens = torch.linspace(0.8, 1.0, batch, device=device)
    gc.collect()
    meter.reset_peak()
    meter.read_peak()
    loaded, times, worked = meter.peak_memory_mb, [], []
    for _ in range(calls + 1):  # the first one warms up
        meter.synchronize()
        start, before = time.perf_counter(), time.process_time()
        for model in models:
            model(wavs, wav_lens)
        meter.synchronize()
        times.append(time.perf_counter() - start)
        worked.append(time.process_time() - before)
    meter.read_peak()
    return {
        "call_seconds": statistics.median(times[1:]),
        "cpu_seconds": statistics.median(worked[1:]),
        "memory_mb": meter.peak_memory_mb - loaded,
    }


def in_own_process(row: str, folder: str, settings: dict, variables: dict | None = None) -> dict:
    """Measure one row, with more environment variables if given."""
    command = [sys.executable, __file__, "--one", row, "--folder", folder]
    command += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    environment = {**os.environ, **(variables or {})}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: dict[str, dict]) -> str:
    """Markdown: time and memory, and how many times those of one task."""
    measured = {
        "call_seconds": ("ms", 1000),
        "cpu_seconds": ("CPU ms", 1000),
        "memory_mb": ("MB", 1),
    }
    heads = [f"{unit} | × one task" for unit, _ in measured.values()]
    lines = [f"| what | {' | '.join(heads)} |", "| --- " * (1 + 2 * len(heads)) + "|"]
    for name, row in rows.items():
        cells = [name]
        for key, (_, factor) in measured.items():
            ratio = f"{row[key] / rows[BASELINE][key]:.2f}" if BASELINE in rows else ""
            cells += [f"{factor * row[key]:.0f}", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=7)
    parser.add_argument("--rows", nargs="*", help="names of the rows to measure, or parts of them")
    parser.add_argument("--output", default=None, help="JSON file; by default beside this script")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keys = ("batch", "seconds", "device", "calls")
    settings = {key: getattr(options, key) for key in keys}
    if options.one:
        print(json.dumps(measure(options.one, Path(options.folder), **settings)))
        return
    chosen = [
        r for r in ROWS if any(r == w or w not in ROWS and w in r for w in options.rows or [""])
    ]
    output = options.output or Path(__file__).with_name(f"multitask-{options.device}.json")
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name))
        for row in chosen:
            quick = {**settings, "calls": 1}
            rows[row] = in_own_process(row, name, settings)
            rows[row]["memory_mb"] = in_own_process(row, name, quick, GIVE_BACK)["memory_mb"]
            print(f"{row}: {rows[row]}", flush=True)
            threads = torch.get_num_threads()
            shape = {"shape": "wav2vec2-base", **settings, "threads": threads}
            write_results(output, {**shape, "rows": rows, "versions": versions()})
    print(f"\n{table(rows)}\n\nin {output}")


if __name__ == "__main__":
    main()
