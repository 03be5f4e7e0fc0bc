"""Tables in READMEs from ``results.json`` files: gathered and written by command, never typed.

    python -m hff_modules.tables collect results/librispeech measured.json
    python -m hff_modules.tables write README.md

``collect`` gathers the results of all runs below a folder. ``write`` fills every block between
``<!-- table: measured.json -->`` and ``<!-- end of table -->`` in a Markdown file from the file
that it names (beside the Markdown file), runs that differ in their seed only as mean ± spread.
"""

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from hff_modules.files import write_atomically

_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def collect(folder: str | Path, target: str | Path) -> list[dict]:
    """Gather the ``results.json`` of all runs below a folder into one file.

    Arguments
    ---------
    folder : str | Path
        Searched to any depth.
    target : str | Path
        JSON file to write: a list of results.

    Returns
    -------
    list[dict]
    """
    paths = sorted(Path(folder).rglob("results.json"))
    if not paths:
        raise FileNotFoundError(f"there is no results.json below {folder}")
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    runs.sort(key=lambda run: (run["method"], run["encoder"], run["layers"], run["seed"]))
    write_atomically(target, json.dumps(runs, indent=1, ensure_ascii=False) + "\n")
    return runs


def markdown(runs: Sequence[dict]) -> str:
    """One row for all runs that differ in their seed only, in the order of their first score.

    Arguments
    ---------
    runs : Sequence[dict]
        As ``results.json`` has them.

    Returns
    -------
    str
        A Markdown table.
    """
    groups: dict[str, list[dict]] = {}
    for run in runs:
        same = {key: run.get(key) for key in ("method", "encoder", "layers", "horizon", "label")}
        groups.setdefault(json.dumps(same), []).append(run)
    scores = [
        (name, score)
        for name, values in runs[0]["test"].items()
        for score in ("cer", "wer", "eer", "accuracy")
        if score in values
    ]
    head = ["method", "encoder", "layers", "horizon", "trained in encoder + fusion", "trained"]
    head += [f"{name} {score.upper()} %" for name, score in scores]
    head += ["seeds", "training s", "step ms", "peak MB"]
    rows = []
    for group in groups.values():
        run = group[0]
        row = [run["method"], f"`{run['encoder']}`", _layers(run["layers"]), str(run["horizon"])]
        row += [f"{run['trainable_encoder_parameters']:,}", f"{run['trainable_parameters']:,}"]
        row += [_mean_and_spread([r["test"][name][score] for r in group]) for name, score in scores]
        row += [
            ", ".join(str(r["seed"]) for r in group),
            f"{statistics.mean(r['train_seconds'] for r in group):.0f}",
            f"{1000 * statistics.median(r['step_seconds'] for r in group):.0f}",
            f"{max(r['peak_memory_mb'] for r in group):.0f}",
        ]
        order = statistics.mean(r["test"][scores[0][0]][scores[0][1]] for r in group)
        rows.append((order, row))
    lines = [head, ["---"] * len(head), *(row for _, row in sorted(rows))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def filled(text: str, folder: Path) -> str:
    """Give a Markdown text with every table block filled from the file that it names."""

    def table(match: re.Match) -> str:
        runs = json.loads((folder / match[2]).read_text(encoding="utf-8"))
        return f"{match[1]}\n{markdown(runs)}\n{match[3]}"

    return _BLOCK.sub(table, text)


def write(path: str | Path) -> None:
    """Fill the table blocks of a Markdown file."""
    path = Path(path)
    write_atomically(path, filled(path.read_text(encoding="utf-8"), path.parent))


def _layers(layers: Sequence[int]) -> str:
    if len(layers) > 4 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return ", ".join(map(str, layers))


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m hff_modules.tables", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    gather = commands.add_parser("collect", help="gather results.json files into one")
    gather.add_argument("folder")
    gather.add_argument("target")
    fill = commands.add_parser("write", help="fill the tables of Markdown files")
    fill.add_argument("files", nargs="+")
    options = parser.parse_args(argv)
    if options.command == "collect":
        runs = collect(options.folder, options.target)
        print(f"{len(runs)} runs in {options.target}")
        print(markdown(runs))
    else:
        for file in options.files:
            write(file)
            print(f"{file} is up to date")


if __name__ == "__main__":
    main()
