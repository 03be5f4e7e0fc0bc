#!/usr/bin/env python3
"""Prints a table of pretraining runs from their training.json: what differs, how far they got.

> python compare.py trials/*.json --steps 203
"""

import argparse
import json
from pathlib import Path


def table(paths, steps=None):
    """Markdown table: settings that differ, then the held-out numbers.

    Arguments
    ---------
    paths : list of str
        training.json files of single rounds.
    steps : int, optional
        Take the validation at that step; the last one without it.

    Returns
    -------
    str
    """
    reports = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    configs = [report["config"] for report in reports]
    keys = sorted(set.intersection(*(set(config) for config in configs)))
    # Folders and budgets are told apart by the other columns.
    keys = [k for k in keys if len({json.dumps(c.get(k)) for c in configs}) > 1]
    keys = [k for k in keys if k not in ("budget_seconds", "epoch_hours", "may_change")]
    head = ["run", *keys, "steps", "hours", "seconds", "unigram loss", "masked loss", "accuracy"]
    lines = [head, ["---"] * len(head)]
    for path, report in zip(paths, reports, strict=True):
        rows = [r for r in report["history"] if steps is None or r["steps"] == steps]
        if not rows:
            found = [r["steps"] for r in report["history"]]
            raise ValueError(f"{path}: no validation at step {steps}; there are {found}")
        books = report["targets"]["codebooks"]
        row, unigram = rows[-1], sum(book["entropy"] for book in books) / len(books)
        valid = row["valid"]
        lines.append(
            [Path(path).stem, *(json.dumps(report["config"].get(k)).strip('"') for k in keys)]
            + [str(row["steps"]), f"{row['hours']:.1f}", f"{row['seconds']:.0f}", f"{unigram:.2f}"]
            + [f"{valid['masked_loss']:.2f}", f"{100 * valid['masked_accuracy']:.1f} %"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    print(table(given.runs, given.steps))
