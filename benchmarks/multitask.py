"""What more tasks cost: several exported models that share one pass of an encoder, against one.

python benchmarks/multitask.py [--shape wav2vec2-base] [--batch 2] [--seconds 5] [--device cpu]

The encoder has random weights (speed does not depend on them). A model is a hierarchical fusion of
four states with a head for recognition, for classes or for speakers; "top 3" has parallel adapters
in the last three layers. Every row is a process of its own that reports the median time of a call,
its peak of memory above the loaded models and, beside it, these. Ratios are against one model
without adapters.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from training_step import (
    chosen_rows,
    fill,
    in_own_process,
    median_seconds,
    parser_for,
    prepare,
    with_weights,
    write_shape,
)

from hff_modules import HierarchicalFusion, SSLEncoder, adapters
from hff_modules.checkpoint import write_tensors
from hff_modules.cli import run
from hff_modules.data import CharUnits
from hff_modules.export_format import described_adapters, named_tensors
from hff_modules.exported import load_exported
from hff_modules.heads import LinearHead, PooledClassifier, SpeakerHead
from hff_modules.measure import versions, write_results
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
    modules = {part: made(**settings) for part, (made, settings) in parts.items()}
    manifest = {
        "format": 1,
        "task": task if task in ("asr", "speaker") else "classification",
        "encoder": {**encoder.manifest(), "precision": "fp32", "packed": False, "seed": 0},
        "layers": LAYERS,
        "horizon": encoder.horizon,
        "stored_as": None,
        "adapters": described_adapters(encoder.adapters),
        **{part: {"class": k.__name__, "arguments": a} for part, (k, a) in parts.items()},
    }
    write_results(folder / "hff.json", manifest)
    write_tensors(folder / "trained.safetensors", named_tensors(encoder.adapters, **modules))
    UNITS.save(folder / "tokenizer")
    slots = LABELS.get(task) or {}
    names = {slot: [str(number) for number in range(count)] for slot, count in slots.items()}
    write_results(folder / "labels.json", names)


def write_models(folder: Path, shape: str) -> None:
    """Write the encoder and all exported models."""
    write_shape(shape, folder / "encoder")
    encoder = SSLEncoder(str(with_weights(folder / "encoder")), layers=LAYERS)
    for task in TASKS:
        write_model(encoder, task, folder / task)
    for method, options in TOP.items():
        adapters.attach(encoder, method, **options)
    for task in TASKS:
        write_model(encoder, task, folder / f"{task}-top")


class Models(nn.Module):
    """Exported models, called one after the other; or one MultiTask, where they share a pass."""

    def __init__(self, folders: dict[str, str], shared: bool, device: torch.device):
        super().__init__()
        if shared:
            together = MultiTask(None, folders, str(device))
            self.parts, self.calls = nn.ModuleList(together.tasks.values()), [together]
        else:
            self.parts = nn.ModuleList(load_exported(place) for place in folders.values())
            self.calls = list(self.parts)

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> None:
        """Call them all."""
        for call in self.calls:
            call(wavs, wav_lens)


def measure(row: str, folder: Path, batch: int, seconds: float, device: str, steps: int) -> dict:
    """Run one row in this process.

    Returns
    -------
    dict
        ``call_seconds`` (median), ``memory_mb`` (peak of the calls above the loaded models),
        ``model_mb``.
    """
    names, shared = ROWS[row]

    def build(folder: Path, wavs: torch.Tensor):
        models = Models({name: str(folder / name) for name in names}, shared, wavs.device)
        return models, (wavs, torch.linspace(0.8, 1.0, batch, device=wavs.device))

    models, inputs, meter = prepare(build, folder, batch, seconds, device)
    loaded = meter.peak_memory_mb
    middle = median_seconds(lambda: models(*inputs), steps, meter)
    meter.read_peak()
    return {
        "call_seconds": middle,
        "memory_mb": meter.peak_memory_mb - loaded,
        "model_mb": sum(p.numel() * p.element_size() for p in models.parameters()) / 2**20,
    }


def table(rows: dict[str, dict]) -> str:
    """Markdown: time, how many times that of one task, and memory."""
    lines = ["| what | ms | × one task | memory MB | models MB |", "| --- " * 5 + "|"]
    base = rows.get(BASELINE, {}).get("call_seconds")
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error']} | | | |")
            continue
        ratio = f"{row['call_seconds'] / base:.2f}" if base else ""
        lines.append(
            f"| {name} | {1000 * row['call_seconds']:.0f} | {ratio} | {row['memory_mb']:.0f} | "
            f"{row['model_mb']:.0f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    options = parser_for(__doc__).parse_args(argv)
    settings = {key: getattr(options, key) for key in ("batch", "seconds", "device", "steps")}
    if options.one:
        print(json.dumps(measure(options.one, Path(options.folder), **settings)))
        return
    output = Path(options.output or f"results/multitask-{options.shape}-{options.device}.json")
    about = {"shape": options.shape, **settings, "threads": torch.get_num_threads()}
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name), options.shape)
        for row in chosen_rows(ROWS, options.rows):
            rows[row] = in_own_process(__file__, row, Path(name), settings)
            print(f"{row}: {rows[row]}", flush=True)
            write_results(output, {**about, "rows": rows, "versions": versions()})
    if rows.keys() == ROWS.keys():
        fill(output.with_name("README.md"), output.name, table(rows))
    print(f"\n{table(rows)}\n\nin {output}")


if __name__ == "__main__":
    run(main)
