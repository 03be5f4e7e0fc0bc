"""What a comparison has to run, what is chosen from it, and its table and pictures.

Nothing is started here: :mod:`hff_modules.runner` does that.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hff_modules import plots, tables
from hff_modules.plan import Plan, PlanError, Row, as_folder, as_text


@dataclass(frozen=True)
class Run:
    """One process to start.

    Arguments
    ---------
    row : Row
        The row of the table that it belongs to.
    seed : int
    settings : dict
        What is chosen, or being tried, from the row's grid.
    trial : bool
        It only serves to choose: test sets are left alone.
    folder : Path
    options : dict
        All options for the command line but the seed and the folder.
    """

    row: Row = field(compare=False)
    seed: int
    settings: dict = field(compare=False)
    trial: bool
    folder: Path
    options: dict = field(compare=False)

    def __str__(self) -> str:
        settings = f" ({as_text(self.settings)})" if self.settings else ""
        fold = f", fold {self.options['fold']}" if self.row.folds else ""
        return f"{self.row.label}{settings}, seed {self.seed}{fold}{', trial' * self.trial}"


Outcomes = dict[Run, dict[str, Any]]  # results of a run, or {"failed": why}


def runs_of(plan: Plan, row: Row, settings: Mapping[str, Any], trial: bool) -> list[Run]:
    """The runs of a row with these settings: its trial, or one for each seed and fold."""
    shorter = plan.grid_options if trial else {}
    place = plan.output / row.folder
    if trial and shorter:
        place /= "trials"
    if settings:
        place /= as_folder(as_text(settings))
    options = {**row.options, **shorter, **settings}
    runs = []
    for seed in row.seeds:
        for fold in row.folds or [None]:
            folder, its_options = place / str(seed), options
            if fold is not None:
                folder, its_options = folder / f"fold-{fold}", {**options, "fold": fold}
            runs.append(Run(row, seed, dict(settings), trial, folder, its_options))
    return runs[:1] if trial else runs


def trials(plan: Plan, row: Row) -> list[Run]:
    """The runs that a row's settings are chosen from; none where there is no choice."""
    if len(row.settings) < 2:
        return []
    return [run for settings in row.settings for run in runs_of(plan, row, settings, True)]


def choose(plan: Plan, row: Row, outcomes: Outcomes) -> dict[str, Any] | None:
    """The settings with the best score on dev; None if all trials failed."""
    if len(row.settings) < 2:
        return row.settings[0]
    done = [run for run in trials(plan, row) if "failed" not in outcomes[run]]
    if not done:
        return None
    score = score_of(plan, [outcomes[run] for run in done])
    sign = -1 if tables.is_better_when_larger(score) else 1

    def order(run: Run) -> float:
        value = sign * outcomes[run]["dev"][score]
        return math.inf if math.isnan(value) else value

    return min(done, key=order).settings


def pending(plan: Plan, outcomes: Outcomes) -> list[Run]:
    """The runs that are next: the trials of a row, and when it is chosen among them, its seeds."""
    return [run for row in plan.wanted for run in next_of(plan, row, outcomes)]


def next_of(plan: Plan, row: Row, outcomes: Outcomes) -> list[Run]:
    """The runs of one row that are next."""
    runs = trials(plan, row)
    if all(run in outcomes for run in runs):
        settings = choose(plan, row, outcomes)
        runs = [] if settings is None else runs_of(plan, row, settings, False)
    return [run for run in runs if run not in outcomes]


def total_runs(plan: Plan) -> int:
    """How many runs the plan asks for, trials included."""
    return sum(
        len(trials(plan, row)) + len(row.seeds) * max(len(row.folds), 1) for row in plan.wanted
    )


def score_of(plan: Plan, results: Iterable[Mapping[str, Any]]) -> str:
    """The score on dev that chooses.

    Raises
    ------
    PlanError
        The plan's is not among those of the results, or none that is known is.
    """
    for result in results:
        known = result.get("dev", {})
        for score in [plan.score] if plan.score else tables.SCORES:
            if score in known:
                return score
        raise PlanError(f"score: {plan.score} is not on dev; there are {', '.join(known) or None}")
    raise PlanError("there are no results to choose from")


# What came of it


def collected(plan: Plan, outcomes: Outcomes) -> list[dict[str, Any]]:
    """Results of all finished or failed runs, as :mod:`hff_modules.tables` takes them."""
    runs = []
    for row in plan.rows:
        first = trials(plan, row)
        if not all(run in outcomes for run in first):
            continue
        settings = choose(plan, row, outcomes)
        if settings is None:
            runs += [_failure(run, outcomes[run]["failed"]) for run in first]
            continue
        for run in runs_of(plan, row, settings, False):
            if "failed" in outcomes.get(run, {}):
                runs.append(_failure(run, outcomes[run]["failed"]))
            elif run in outcomes:
                about = {"label": row.label, "score": score_of(plan, [outcomes[run]])}
                about |= {"options": run.options, "checkpoint_mb": checkpoint_mb(run.folder)}
                if len(row.settings) > 1:
                    about["chosen"] = as_text(settings)
                runs.append({**outcomes[run], **about})
    done = [run for run in runs if "failed" not in run]
    reach = plan.reach if plan.reach is not None else reached_by_all(done)
    for run in done:
        seconds = tables.seconds_to(run, run["score"], reach)
        run["reach"] = {"score": run["score"], "value": reach, "seconds": seconds}
    return runs


def _failure(run: Run, reason: str) -> dict[str, Any]:
    method = Path(run.row.method).stem
    fold = {"fold": run.options["fold"]} if run.row.folds else {}
    about = {"label": run.row.label, "method": method, "seed": run.seed}
    return {**about, **fold, "failed": reason}


def reached_by_all(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """The score on dev that every run reached: the worst of their best ones."""
    values = [run["dev"][run["score"]] for run in runs]
    if not values:
        return None
    return min(values) if tables.is_better_when_larger(runs[0]["score"]) else max(values)


def checkpoint_mb(folder: Path) -> float | None:
    """MB of what was trained, as it is on disk: tensors and their manifest."""
    files = sorted(folder.glob("save/CKPT*/trained.safetensors"))
    if not files:
        return None
    manifest = files[-1].with_name("manifest.json")
    return sum(f.stat().st_size for f in (files[-1], manifest) if f.exists()) / 1e6


def trial_scores(plan: Plan, outcomes: Outcomes) -> list[dict[str, Any]]:
    """What every setting of the grids gave on dev, as it goes into ``trials.json``."""
    scores = []
    for row in plan.rows:
        for run in trials(plan, row):
            outcome = outcomes.get(run)
            if outcome is None:
                continue
            about = {"label": row.label, "seed": run.seed, "settings": run.settings}
            if "failed" in outcome:
                scores.append({**about, "failed": outcome["failed"]})
            else:
                scores.append({**about, "dev": outcome["dev"], "epochs": outcome["epochs"]})
    return scores


# Its table and pictures


def scored_apart(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line that says that rows were chosen or tested on different data, if they were."""
    of_fold: dict[Any, Mapping[str, Any]] = {}
    for run in runs:
        first = of_fold.setdefault(run.get("fold"), run) if run.get("data") else run
        here, there = run.get("data") or {}, first.get("data") or {}
        if any(here[part] != there[part] for part in here.keys() & there.keys() - {"train"}):
            return [
                f"not comparable: {run['label']} (seed {run['seed']}) was chosen or tested on "
                f"other data than {first['label']} (seed {first['seed']})"
            ]
    return []


def csv_table(runs: Sequence[dict]) -> str:
    """All numbers of the table, not rounded, mean and spread in columns of their own."""
    rows = []
    for summary in tables.summaries(runs):
        row = {key: value for key, value in summary.items() if key not in ("scores", "dev")}
        scores = dict(summary["scores"])
        if "dev" in summary:
            scores[f"dev {next(run['score'] for run in runs if 'score' in run)}"] = summary["dev"]
        for name, (mean, spread) in scores.items():
            row |= {f"{name} mean": mean, f"{name} spread": spread}
        for key in ("seeds", "folds", "layers", "failed"):
            row[key] = "; ".join(map(str, row.get(key) or []))
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


PICTURES = {
    "parameters": ("trainable_encoder_parameters", "trained parameters in encoder + fusion", 1),
    "time": ("train_seconds", "training time (s)", 1),
    "memory": ("peak_memory_mb", "peak memory in training (MB)", 1),
    "step": ("step_seconds", "training step, median (ms)", 1000),
}


def draw(runs: Sequence[dict], folder: Path, anew: bool = True) -> list[Path]:
    """Draw the first score against parameters, time and memory; gives the files there are."""
    names, rows = tables.score_names(runs), tables.summaries(runs)
    paths = []
    for picture, (key, axis, factor) in PICTURES.items():
        path = folder / f"{picture}.png"
        points = [
            plots.Point(row["method"], factor * row[key], *row["scores"][names[0]])
            for row in rows
            if names and names[0] in row["scores"] and row.get(key) is not None
        ]
        if not points:
            continue
        if anew or not path.exists():
            dataset, _, score = names[0].rpartition(" ")
            larger = tables.is_better_when_larger(names[0])
            title = f"{dataset} {tables.score_title(score)} (%)"
            plots.scatter(points, path, axis, title, larger_is_better=larger)
        paths.append(path)
    return paths
