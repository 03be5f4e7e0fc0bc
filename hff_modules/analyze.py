r"""What each layer of an encoder is worth for a task: probes, similarities, learned weights.

    python -m hff_modules.analyze train.py
    python -m hff_modules.analyze recipes/LibriSpeech/ASR/train.py --output results/layers -- \
        --data_folder /data/LibriSpeech --encoder facebook/wav2vec2-base --layers auto:4

The recipe prepares its data as for training; then linear probes on all layers are trained at once
on stored states, and ``layers.json``, ``layers.png`` and ``layers.html`` are written. With
``--layers auto`` (see :mod:`hff_modules.auto_layers`) it also says which layers it would choose.
What follows ``--`` are options of the recipe; ``--probes '{epochs: 8, train_minutes: 20}'`` says
how long and on how much.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hff_modules import plots
from hff_modules.cli import run
from hff_modules.files import write_atomically
from hff_modules.page import page
from hff_modules.tables import score_title

NAME = "layers"


def write_report(report: Mapping[str, Any], folder: str | Path) -> None:
    """Write an analysis as JSON, picture and page, and print its table.

    Arguments
    ---------
    report : Mapping[str, Any]
        From :meth:`hff_modules.auto_layers.Analysis.report`.
    folder : str | Path
    """
    folder = Path(folder)
    write_atomically(folder / f"{NAME}.json", json.dumps(report, indent=1) + "\n")
    pictures = []
    if plots.available():
        pictures = [folder / f"{NAME}.png"]
        plots.layers(report, pictures[0])
    else:
        print(plots.MISSING)
    table, lines = layer_table(report), summary(report)
    title = f"Layers of {Path(report['encoder']).name}: {report['task']}"
    write_atomically(folder / f"{NAME}.html", page(title, lines, table, pictures))
    widths = [max(len(row[n]) for row in table) for n in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print("\n".join(["", *lines, f"{folder / NAME}.json, .html, .png"]))


def score_keys(report: Mapping[str, Any]) -> list[str]:
    """Loss and scores of the probes, in their order."""
    return [key for key in report["probes"][0] if key != "layer"]


def layer_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Head and one row for each layer, then the weighted sum."""
    keys = score_keys(report)
    heads = [key if key == "loss" else f"{score_title(key)} %" for key in keys]
    table = [["layer", *(f"dev {head}" for head in heads), "weight in a sum"]]
    weights = report["weighted_sum"]["weights"]
    for probe, weight in zip(report["probes"], weights, strict=True):
        table.append([str(probe["layer"]), *_numbers(probe, keys), f"{weight:.3f}"])
    table.append(["weighted sum", *_numbers(report["weighted_sum"], keys), f"{sum(weights):.3f}"])
    return table


def summary(report: Mapping[str, Any]) -> list[str]:
    """What was done and found, in a few sentences."""
    minutes = report["minutes"]
    best = min(report["probes"], key=lambda probe: probe["loss"])
    lines = [
        f"Linear probes, {report['epochs']} epochs on {minutes['train']:.1f} minutes, scored on "
        f"{minutes['dev']:.1f} minutes of dev. Lowest loss on dev: layer {best['layer']}."
    ]
    if "auto" in report:
        auto = report["auto"]
        lines.append(f"{auto['asked']} chooses {auto['chosen']} ({auto['stopped']}).")
        for compared in auto["compared"]:
            heads = layer_table(report)[0][1:-1]
            values = _numbers(compared, score_keys(report))
            said = ", ".join(f"{h} {v}" for h, v in zip(heads, values, strict=True))
            lines.append(f"{compared['name']} {compared['layers']}: {said}")
        lines.append(f"{auto['verdict']}.".capitalize())
    return lines


def _numbers(scores: Mapping[str, float], keys: Sequence[str]) -> list[str]:
    return [f"{scores[key]:.3f}" if key == "loss" else f"{scores[key]:.1f}" for key in keys]


def main(argv: Sequence[str]) -> None:
    """Command line."""
    argv, extra = list(argv), []
    if "--" in argv:
        argv, extra = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m hff_modules.analyze",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a recipe's train.py")
    parser.add_argument("--output", default="results/layers", help="folder for the report")
    options = parser.parse_args(argv)
    recipe, folder = Path(options.recipe).resolve(), Path(options.output).resolve()
    if not recipe.is_file():
        raise FileNotFoundError(f"recipe {recipe} is not there; expected a train.py")
    line = [sys.executable, str(recipe), "last_layer", "--layers", "all"]
    line += ["--output_folder", str(folder / "job"), *extra, "--analysis", str(folder)]
    status = subprocess.run(line, cwd=recipe.parent).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    run(main)
