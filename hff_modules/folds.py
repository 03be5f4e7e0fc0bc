"""Cross-validation: a job once for each fold by ``--fold all``, and what the folds say together.

Every fold has a folder and a ``results.json`` of its own; ``folds.json`` beside them has the mean
and the spread (standard deviation) of all scores.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from speechbrain.utils.distributed import if_main_process

from hff_modules.cli import given, separated
from hff_modules.config import DEBUG
from hff_modules.files import write_atomically

Job = Callable[[list[str]], tuple[Path, dict[str, Any]]]


def with_folds(job: Job, folds: Sequence[int]) -> Callable[[list[str]], dict[str, Any]]:
    """Let a job understand ``--fold all``; with any other fold it runs once, as it is.

    Arguments
    ---------
    job : Callable
        Takes a command line with ``--fold``; gives its output folder and its results.
    folds : Sequence[int]
        All of them.

    Returns
    -------
    Callable
        Takes a command line; gives the results, or what ``folds.json`` holds.
    """

    def main(argv: list[str]) -> dict[str, Any]:
        argv = separated(argv)
        fold = given(argv, "fold")
        if fold is None:
            return job(argv)[1]
        if fold != "all":
            check_fold(fold, folds)
            return job(argv)[1]
        outcomes = [job(_of_fold(argv, number)) for number in folds]
        together = gather(folds, [results for _, results in outcomes])
        first = outcomes[0][0]
        tried = DEBUG if first.name.endswith(DEBUG) else ""  # beside folds that may be finished
        path = first.parent / f"folds{tried}.json"
        if if_main_process():
            write_atomically(path, json.dumps(together, indent=2, ensure_ascii=False) + "\n")
            for name, scores in together["test"].items():
                said = [f"{key} {s['mean']:.2f} ± {s['spread']:.2f}" for key, s in scores.items()]
                print(f"\n  {len(folds)} folds, {name}: {', '.join(said)}\n  in {path}\n")
        return together

    return main


def check_fold(fold: Any, folds: Sequence[int]) -> None:
    """Refuse a fold that is none; "all" is one on the command line only."""
    if fold not in folds:
        known = ", ".join(map(str, folds))
        raise ValueError(
            f"fold: expected one of {known}, got {fold!r}; for all of them say --fold all"
        )


def gather(folds: Sequence[int], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of the scores of all folds.

    Arguments
    ---------
    folds : Sequence[int]
    results : Sequence[dict]
        As ``results.json`` has them, one per fold.

    Returns
    -------
    dict[str, Any]
        ``test`` {set: {score: {"mean", "spread", "folds": [of each]}}} and what all have in common.
    """
    same = ("task", "dataset", "method", "encoder", "layers", "horizon", "seed")
    test: dict[str, dict[str, Any]] = {}
    for name, scores in results[0]["test"].items():
        test[name] = {}
        for score in scores:
            values = [fold["test"][name][score] for fold in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            mean = statistics.mean(values)
            test[name][score] = {"mean": mean, "spread": spread, "folds": values}
    return {**{key: results[0][key] for key in same}, "folds": list(folds), "test": test}


def _of_fold(argv: Sequence[str], fold: int) -> list[str]:
    """The same command for one fold; a folder that is named gets one for each fold."""
    line, words = [], iter(argv)
    for word in words:
        line.append(word)
        if word == "--fold":
            line.append(str(fold))
            next(words, None)
        elif word == "--output_folder":
            line.append(str(Path(next(words, "")) / f"fold-{fold}"))
    return line
