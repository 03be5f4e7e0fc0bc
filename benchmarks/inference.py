"""Real-time factor and memory of inference: cut and fused encoders against whole ones.

python benchmarks/inference.py [--shape wav2vec2-base] [--batches 1 16] [--seconds 5] [--device cpu]

Every row is a process of its own; encoder and head have random weights (speed does not depend on
them) and utterances are of equal length. The real-time factor is seconds of work per second of
speech; memory is the peak of the calls above the loaded model and, beside it, the model itself.
Ratios are against the whole encoder by Hugging Face with the same head.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from training_step import (
    UNITS,
    Fused,
    OfHuggingFace,
    chosen_rows,
    in_own_process,
    inputs_for,
    median_seconds,
    parser_for,
    prepare,
    with_weights,
    write_shape,
)

from hff_modules import HierarchicalFusion, SSLEncoder, adapters
from hff_modules.cli import run
from hff_modules.measure import versions, write_results

BASELINE = "whole encoder (Hugging Face)"


def whole(folder: Path, wavs: torch.Tensor):
    """Hugging Face's encoder and a linear head on its last state."""
    model = transformers.AutoModel.from_pretrained(with_weights(folder))
    head = nn.Linear(model.config.hidden_size, UNITS)
    return nn.Sequential(OfHuggingFace(model, frozen=True), head), inputs_for(folder, wavs)


def ours(layers, fused: bool = False, attached: dict | None = None, precision="fp32") -> Callable:
    """Our encoder, with adapters and fusion or without, and the same head."""

    def build(folder: Path, wavs: torch.Tensor):
        encoder = SSLEncoder(str(folder), layers, precision, pretrained=False)
        for method, options in (attached or {}).items():
            adapters.attach(encoder, method, **options)
        size = encoder.hidden_size
        fusion = HierarchicalFusion(len(encoder.layers), size, 256) if fused else None
        return nn.Sequential(encoder, Fused(fusion), nn.Linear(size, UNITS)), (wavs,)

    return build


ROWS: dict[str, Callable] = {
    BASELINE: whole,
    "whole encoder": ours("last:1"),
    "cut at 9, fusion [3,6,9]": ours([3, 6, 9], fused=True),
    "cut at 9, fusion [3,6,9], in bf16": ours([3, 6, 9], fused=True, precision="bf16"),
    "cut at 9, TPA in 7-9 (r=256)": ours([9], False, {"tpa": {"layers": "last:3"}}),
    "whole encoder, TPA everywhere, fusion": ours("every:3", True, {"tpa": {}}),
}


def measure(row: str, folder: Path, batch: int, seconds: float, device: str, steps: int) -> dict:
    """Run one row in this process.

    Returns
    -------
    dict
        ``call_seconds`` (median), ``real_time_factor``, ``memory_mb`` (peak of the calls above the
        loaded model), ``model_mb``.
    """
    model, inputs, meter = prepare(ROWS[row], folder, batch, seconds, device)
    loaded = meter.peak_memory_mb
    model.eval()
    with torch.inference_mode():
        middle = median_seconds(lambda: model(*inputs), steps, meter)
    meter.read_peak()
    return {
        "call_seconds": middle,
        "real_time_factor": middle / (batch * seconds),
        "memory_mb": meter.peak_memory_mb - loaded,
        "model_mb": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
    }


def table(rows: dict[str, dict[str, dict]]) -> str:
    """Markdown: each row at each batch size, and how it compares with the whole encoder there."""
    heads = ["what", "batch", "real-time factor", "speed", "memory MB", "memory", "model MB"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for batch, measured in rows.items():
        base = measured.get(BASELINE, {})
        for name, row in measured.items():
            if "error" in row:
                lines.append(f"| {name} | {batch} | failed: {row['error']} | | | | |")
                continue
            speed = memory = ""
            if "call_seconds" in base:
                speed = f"× {base['call_seconds'] / row['call_seconds']:.2f}"
                memory = f"{row['memory_mb'] / base['memory_mb']:.3f}"
            lines.append(
                f"| {name} | {batch} | {row['real_time_factor']:.4f} | {speed} | "
                f"{row['memory_mb']:.0f} | {memory} | {row['model_mb']:.0f} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = parser_for(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args(argv)
    settings = {key: getattr(options, key) for key in ("seconds", "device", "steps")}
    if options.one:
        result = measure(options.one, Path(options.folder), options.batch, **settings)
        print(json.dumps(result))
        return
    output = Path(options.output or f"results/inference-{options.shape}-{options.device}.json")
    about = {"shape": options.shape, **settings, "threads": torch.get_num_threads()}
    rows: dict[str, dict[str, dict]] = {str(batch): {} for batch in options.batches}
    with tempfile.TemporaryDirectory() as name:
        write_shape(options.shape, Path(name))
        for batch, measured in rows.items():
            for row in chosen_rows(ROWS, options.rows):
                told = {**settings, "batch": int(batch)}
                measured[row] = in_own_process(__file__, row, Path(name), told)
                print(f"{row}, batch {batch}: {measured[row]}", flush=True)
                write_results(output, {**about, "rows": rows, "versions": versions()})
    print(f"\n{table(rows)}\n\nin {output}")


if __name__ == "__main__":
    run(main)
