"""Methods side by side on one recipe: same seeds, data and budget; a table, pictures, one page.

    python -m hff_modules.compare plan.yaml -- --data_folder /data/LibriSpeech
    python -m hff_modules.compare --recipe train.py --methods fusion weighted_sum --seeds 1 2
    python -m hff_modules.compare plan.yaml --watch

The first does what the plan says (see :mod:`hff_modules.plan`), each run in a process of its own;
the same command goes on after a kill, and what is finished is not run again. ``--watch``, from
another terminal, shows how far it is; so does ``index.html`` in the output folder, which refreshes
itself. Relative paths in options start in the recipe's folder, where the runs do.
"""

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hff_modules import plots, tables
from hff_modules.cli import run as run_main
from hff_modules.comparison import (
    Run,
    collected,
    csv_table,
    draw,
    pending,
    score_of,
    scored_apart,
    total_runs,
    trial_scores,
)
from hff_modules.files import locked, write_atomically
from hff_modules.page import page
from hff_modules.plan import Plan, PlanError, make_plan, read_plan
from hff_modules.runner import Runner, epoch_of

POLL_SECONDS = 0.1
REFRESH_SECONDS = 10


def compare(plan: Plan, runner: Runner, say: Callable[[str], None] = print) -> list[dict]:
    """Do everything that the plan asks for; tables, pictures and page follow every finished run.

    Arguments
    ---------
    plan : Plan
    runner : Runner
    say : Callable[[str], None]
        Gets a line whenever a run starts or ends.

    Returns
    -------
    list[dict]
        Results of all runs (trials left out), failed ones with their reason.
    """
    total, written = total_runs(plan), 0.0
    try:
        while runner.running or pending(plan, runner.outcomes):
            changed = drawn = False
            for run in pending(plan, runner.outcomes):
                if run in runner.running or not runner.free:
                    continue
                runner.start(run)
                changed = True
                if run in runner.running:
                    say(f"[{len(runner.outcomes)}/{total}] started: {run}")
                else:
                    say(f"[{len(runner.outcomes)}/{total}] {_ending(plan, run, runner)}")
            for run in runner.poll():
                changed, drawn = True, drawn or not run.trial
                say(f"[{len(runner.outcomes)}/{total}] {_ending(plan, run, runner)}")
            if changed:
                write_report(plan, runner, finished=False, pictures=drawn)
                written = time.monotonic()
            elif time.monotonic() - written > REFRESH_SECONDS:
                write_report(plan, runner, finished=False, pictures=False)
                written = time.monotonic()
            if runner.running:
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        runner.stop()
        write_report(plan, runner, finished=False)
        say("stopped; the same command goes on from here")
        raise
    return write_report(plan, runner, finished=True)


def _ending(plan: Plan, run: Run, runner: Runner) -> str:
    outcome = runner.outcomes[run]
    if "failed" in outcome:
        return f"failed: {run}: {outcome['failed']}"
    try:
        score = score_of(plan, [outcome])
    except PlanError as error:
        runner.outcomes[run] = {"failed": str(error)}
        return f"failed: {run}: {error}"
    parts = {"dev": outcome["dev"], **({} if run.trial else outcome["test"])}
    said = ", ".join(
        f"{name} {tables.score_text(score, scores[score])}{tables.unit(score)}"
        for name, scores in parts.items()
        if score in scores
    )
    return f"done: {run}: {score} {said} after {outcome['train_seconds']:.0f} s of training"


# What it leaves


def write_report(plan: Plan, runner: Runner, finished: bool, pictures: bool = True) -> list[dict]:
    """Write ``runs.json``, tables, pictures, page and progress; gives the results of all runs."""
    outcomes = {**runner.before, **runner.outcomes}
    runs, folder = collected(plan, outcomes), plan.output
    lines = [f"{len(runner.outcomes)} of {total_runs(plan)} runs done"]
    for run, (_, device, since) in runner.running.items():
        on = f" on {device}" if device else ""
        lines.append(f"running{on}: {run}: {epoch_of(run)} ({time.monotonic() - since:.0f} s)")
    if finished:
        failed = sum("failed" in outcome for outcome in runner.outcomes.values())
        lines = [f"finished: {len(runner.outcomes)} runs, {failed} of them failed"]
        lines[0] += f"; {time.monotonic() - runner.since:.0f} s since this command was started"
    lines += scored_apart(runs)
    table = tables.markdown(runs) if runs else ""
    write_atomically(folder / "progress.txt", "\n".join(lines) + "\n\n" + table)
    if pictures:
        text = json.dumps(runs, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / "runs.json", text)
        write_atomically(folder / "table.md", table)
        write_atomically(folder / "table.csv", csv_table(runs))
        tried = trial_scores(plan, outcomes)
        write_atomically(folder / "trials.json", json.dumps(tried, indent=1) + "\n")
    drawn = draw(runs, folder, anew=pictures) if plots.available() else []
    cells = tables.cells(runs) if runs else []
    title = f"{plan.recipe.parent.name}: {len(plan.rows)} rows"
    text = page(title, lines, cells, drawn, refresh=None if finished else REFRESH_SECONDS)
    write_atomically(folder / "index.html", text)
    return runs


def watch(folder: Path, seconds: float, say: Callable[[str], None] = print) -> None:
    """Show how far a comparison is, whenever that changes, until it is done or no longer runs."""
    path, shown = folder / "progress.txt", None
    if not path.is_file():
        raise PlanError(f"{folder}: no comparison was started here")
    while True:
        alive = _locked(folder)
        text = path.read_text(encoding="utf-8")
        if text != shown:
            say(f"{time.strftime('%H:%M:%S')}  {text}")
            shown = text
        if not alive:
            return
        time.sleep(seconds)


def _locked(folder: Path) -> bool:
    try:
        with locked(folder / ".lock", wait=False):
            return False
    except BlockingIOError:
        return True


@contextlib.contextmanager
def _stoppable():
    """Being asked to end, or losing the terminal, is like Ctrl-C: the runs are ended, too."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    asked = (signal.SIGTERM, signal.SIGHUP)
    before = {s: signal.signal(s, interrupt) for s in asked if signal.getsignal(s) is not None}
    if before.get(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str]) -> list[dict]:
    """Command line."""
    argv, extra = list(argv), []
    if "--" in argv:
        argv, extra = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m hff_modules.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", nargs="?", help="plan file; or --recipe and --methods")
    parser.add_argument("--recipe", help="a recipe's train.py")
    parser.add_argument("--methods", nargs="+", help="method files")
    parser.add_argument("--seeds", nargs="*", type=int, help="instead of the plan's")
    parser.add_argument(
        "--only", nargs="+", metavar="LABEL", help="run only these rows of the plan"
    )
    parser.add_argument("--output", default="", help="folder, instead of the plan's")
    parser.add_argument("--jobs", type=int, help="runs at a time; 1, or one for each device")
    parser.add_argument("--devices", nargs="+", default=[], help="such as cuda:0 cuda:1")
    parser.add_argument("--limit_minutes", type=float, help="end a run that takes longer")
    parser.add_argument("--reach", type=float, help="score on dev whose time is a column")
    parser.add_argument("--watch", action="store_true", help="only show how far it is")
    parser.add_argument("--every", type=float, default=5, help="seconds between two looks")
    options = parser.parse_args(argv)
    plan = _plan(options, extra)
    if options.watch:
        watch(plan.output, options.every)
        return []
    jobs = options.jobs if options.jobs is not None else max(len(options.devices), 1)
    if jobs < 1:
        raise PlanError(f"--jobs: expected a number above 0, got {jobs}")
    plan.output.mkdir(parents=True, exist_ok=True)
    if not plots.available():
        print(plots.MISSING)
    with locked(plan.output / ".lock", wait=False) as lock:
        runner = Runner(plan, jobs, options.devices, lock.fileno(), options.limit_minutes)
        try:
            with _stoppable():
                runs = compare(plan, runner)
        except KeyboardInterrupt:
            sys.exit(130)
    print(f"\n{(plan.output / 'progress.txt').read_text(encoding='utf-8')}")
    print(f"{plan.output}: table.md, table.csv, runs.json, trials.json, index.html, pictures")
    if any("failed" in run for run in runs):
        sys.exit(1)
    return runs


def _plan(options: argparse.Namespace, extra: Sequence[str]) -> Plan:
    if options.plan is not None:
        if options.recipe or options.methods:
            raise PlanError("give a plan, or --recipe and --methods, not both")
        keys, source = read_plan(options.plan), Path(options.plan)
    elif options.recipe and options.methods:
        keys = {"recipe": str(Path(options.recipe).resolve()), "methods": options.methods}
        source = Path("command line")
    else:
        raise PlanError("give a plan file, or --recipe and --methods")
    if options.seeds is not None:
        keys["seeds"] = options.seeds
    if options.reach is not None:
        keys["reach"] = options.reach
    if options.seeds is not None and isinstance(keys.get("methods"), list):
        keys["methods"] = [_without_seeds(entry) for entry in keys["methods"]]
    plan = make_plan(keys, source, extra, options.output)
    if options.only is None:
        return plan
    labels = [row.label for row in plan.rows]
    for label in options.only:
        if label not in labels:
            raise PlanError(f"--only: there is no row {label!r}; there are {', '.join(labels)}")
    return dataclasses.replace(plan, only=tuple(options.only))


def _without_seeds(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {key: value for key, value in entry.items() if key != "seeds"}
    return entry


if __name__ == "__main__":
    run_main(main)
