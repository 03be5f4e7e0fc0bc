"""Which layers each task uses: the learned weights of layers, all tasks in one picture.

    python -m hff_modules.layer_use layers.png results/ recipes/*/*/measured.json
    python -m hff_modules.layer_use layers.png results/ --method l_adapters

Reads ``results.json`` files below folders, and files that hold one of them or a list. Runs on one
data set are averaged; the whiskers reach from their smallest to their largest weight. A weight says
how much of a state is in the sum, not how large the state is (SUPERB, arXiv 2105.01051).
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hff_modules.cli import run
from hff_modules.config import DEBUG


def find_runs(sources: Iterable[str | Path], method: str) -> dict[str, list[dict[str, Any]]]:
    """Runs of a method with learned weights of layers, by data set (and encoder, if several).

    Arguments
    ---------
    sources : Iterable[str | Path]
        Folders, searched to any depth for ``results.json``, and JSON files.
    method : str

    Returns
    -------
    dict[str, list[dict]]
        In the order in which they were found.

    Raises
    ------
    FileNotFoundError
        A source is not there.
    ValueError
        A file is no JSON, no run fits, or runs on one data set weigh different layers.
    """
    runs = []
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(
                f"{source}: expected a folder of runs or a JSON file of results"
            )
        for path in sorted(source.rglob("results.json")) if source.is_dir() else [source]:
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: expected results as JSON ({error})") from None
            if isinstance(content, list):
                runs += content
            elif content.get("test") and not path.parent.name.endswith(DEBUG):
                runs.append(content)  # no trial of a grid, nor a run of a few batches
    fitting = [r for r in runs if r.get("method") == method and r.get("layer_weights")]
    if not fitting:
        methods = sorted({r["method"] for r in runs if r.get("layer_weights")})
        raise ValueError(
            f"none of {len(runs)} runs is of method {method} and has layer_weights; "
            f"expected one of {', '.join(methods) or 'weighted_sum, l_adapters: run it first'}"
        )
    several = len({run["encoder"] for run in fitting}) > 1
    groups: dict[str, list[dict]] = {}
    for run_ in fitting:
        name = run_.get("dataset", "?") + (f", {run_['encoder']}" if several else "")
        groups.setdefault(name, []).append(run_)
    for name, group in groups.items():
        choices = {tuple(run_["layer_weights"]) for run_ in group}
        if len(choices) > 1:
            raise ValueError(
                f"runs on {name} weigh different layers: "
                f"{' and '.join('[' + ', '.join(c) + ']' for c in sorted(choices))}; expected the "
                "same in all"
            )
    return groups


def draw(groups: dict[str, list[dict[str, Any]]], path: str | Path, method: str) -> None:
    """Draw one small picture of bars for each data set, all to one scale, in shades of grey.

    Arguments
    ---------
    groups : dict[str, list[dict]]
        As :func:`find_runs` gives them.
    path : str | Path
        Picture to write; its ending chooses the format.
    method : str
        For the title.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'hff-modules[plots]'") from None
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 2.3 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axis, (name, runs) in zip(axes, groups.items(), strict=False):
        layers = list(runs[0]["layer_weights"])
        columns_of = [[run_["layer_weights"][layer] for run_ in runs] for layer in layers]
        means = [sum(values) / len(values) for values in columns_of]
        below = [mean - min(values) for mean, values in zip(means, columns_of, strict=True)]
        above = [max(values) - mean for mean, values in zip(means, columns_of, strict=True)]
        shades = ["0.25" if mean == max(means) else "0.75" for mean in means]
        axis.bar(layers, means, color=shades, edgecolor="black", linewidth=0.6)
        if len(runs) > 1:
            axis.errorbar(layers, means, [below, above], fmt="none", ecolor="black", capsize=2)
        axis.axhline(1 / len(layers), color="black", linestyle="--", linewidth=0.8)
        axis.set_title(
            f"{name} ({runs[0].get('task', '?')}, {len(runs)} run{'s'[: len(runs) - 1]})"
        )
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    figure.supxlabel("layer (0: what enters layer 1); darkest: the highest weight", fontsize=9)
    figure.supylabel("weight (dashed: all alike)", fontsize=9)
    figure.suptitle(f"Learned weights of layers, {method}", fontsize=10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m hff_modules.layer_use", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("picture", help="file to write, .png, .svg or .pdf")
    parser.add_argument("sources", nargs="+", help="folders of runs, or JSON files of results")
    parser.add_argument("--method", default="weighted_sum")
    options = parser.parse_args(argv)
    groups = find_runs(options.sources, options.method)
    draw(groups, options.picture, options.method)
    for name, runs in groups.items():
        print(f"{name}: {len(runs)} runs")
    print(f"in {options.picture}")


if __name__ == "__main__":
    run(main)
