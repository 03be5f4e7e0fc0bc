"""Runs of a comparison in processes of their own: what one is started with, how it ends."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hff_modules.cli import on_command_line
from hff_modules.comparison import Outcomes, Run, next_of
from hff_modules.files import write_atomically
from hff_modules.plan import Plan, PlanError, as_argument

RECORD = "compare.json"  # in a run's folder: what it was started with
LOG = "output.txt"  # in a run's folder: what it printed
# Where things lie and how they are computed: a plan may go on in another place. The data itself is
# compared by its digest.
ELSEWHERE = (
    "data_folder csv sources_folder cache cache_gigabytes speed_cache num_workers "
    "ckpt_interval_minutes device noprogressbar"
).split()


def command(plan: Plan, run: Run, device: str | None = None) -> list[str]:
    """The command line of a run."""
    line = [sys.executable, str(plan.recipe), run.row.method, "--seed", str(run.seed)]
    line += ["--output_folder", str(run.folder), "--noprogressbar"]
    for key, value in run.options.items():
        line += [f"--{key}", as_argument(value)]
    line += plan.extra
    if device is not None:
        line += ["--device", "cuda:0" if device.startswith("cuda") else device]
    if run.trial:
        line += ["--testing", "false"]
    elif (run.folder / "results.json").exists():  # a trial that was chosen
        line += ["--test_only"]
    return line


def finished(run: Run, ended: bool = False) -> dict[str, Any] | None:
    """The results of a run that is done: tested, unless it is a trial or has just ended well."""
    path = run.folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        dev, test = results["dev"], results["test"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path} cannot be read ({error!r}): this run is done again")
        path.unlink()
        return None
    return results if dev and (test or run.trial or ended) else None


def record(plan: Plan, run: Run) -> None:
    """Note what a run is started with.

    Raises
    ------
    PlanError
        Its folder holds a run that was started with something else.
    """
    path = run.folder / RECORD
    recipe = os.path.relpath(plan.recipe, plan.output)  # so that both may be moved together
    now = {"recipe": recipe, "method": run.row.method, "seed": run.seed}
    now |= {"options": run.options, "extra": list(plan.extra)}
    now = json.loads(json.dumps(now))
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_atomically(path, json.dumps(now, indent=1) + "\n")
        return
    except ValueError:
        raise PlanError(f"{path} is no JSON; delete this folder to run it again") from None
    old, new = (_decisive(it) for it in (then, now))
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            raise PlanError(
                f"{run.folder} was run with {key} {old.get(key)!r}, now it is {new.get(key)!r}; "
                "delete that folder or choose another --output"
            )


def _decisive(recorded: dict[str, Any]) -> dict[str, Any]:
    """What a run was started with, without what may change between two commands on its folder."""
    extra = on_command_line(["method", *recorded.pop("extra", [])])
    said = {key: " ".join(words) for key, words in extra.items()}
    every = {**recorded.pop("options", {}), **said, **recorded}
    return {key: value for key, value in every.items() if key not in ELSEWHERE}


def run_before(plan: Plan) -> Outcomes:
    """What the rows that are not run now (``--only``) have left in their folders."""
    outcomes: Outcomes = {}
    for row in plan.rows:
        while row not in plan.wanted:
            known = len(outcomes)
            for run in next_of(plan, row, outcomes):
                with contextlib.suppress(PlanError):  # it was run with something else
                    if (run.folder / RECORD).is_file():
                        record(plan, run)
                        results = finished(run)
                        outcomes |= {run: results} if results else {}
            if len(outcomes) == known:
                break
    return outcomes


def why_failed(code: int, log: Path) -> str:
    """The reason why a run ended, in one line: its own message, or the signal that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + " (out of memory?)" * (name == "SIGKILL")
    last = log.read_text(errors="replace").rpartition("\n$ ")[2]  # an earlier try had its own
    lines = [line.strip() for line in last.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")[:300]
    return lines[-1][:300] if lines else f"exit status {code} and not a word"


def epoch_of(run: Run) -> str:
    """How far a running run is, from its training log."""
    try:
        lines = (run.folder / "train_log.txt").read_text(errors="replace").splitlines()
    except OSError:
        return "starting"
    if not lines:
        return "starting"
    epoch = re.search(r"epoch: (\d+)", lines[-1])
    scores = re.findall(r"valid (\w+): (\S+)", lines[-1])
    said = ", ".join(f"dev {name} {value.rstrip(',')}" for name, value in scores if name != "loss")
    return f"epoch {epoch[1] if epoch else '?'} done, {said}"


class Runner:
    """Starts runs, as many at a time as there are slots, and collects how they end.

    Arguments
    ---------
    plan : Plan
    jobs : int
        Runs at a time.
    devices : Sequence[str]
        Such as ["cuda:0", "cuda:1"], handed out in turn; without any, the recipe decides.
    lock : int
        File descriptor that every run inherits: the output folder stays locked while one lives.
    limit_minutes : float, optional
        A run that takes longer is ended and counts as failed.
    """

    def __init__(self, plan, jobs=1, devices=(), lock=None, limit_minutes=None):
        self.plan, self.jobs, self.lock, self.limit_minutes = plan, jobs, lock, limit_minutes
        for device in devices:
            if device.startswith("cuda"):
                _gpu(device)  # refused before anything is started
        self.free = list(devices) or [None] * jobs
        while len(self.free) < jobs:
            self.free += list(devices)
        self.free = self.free[:jobs]
        self.running: dict[Run, tuple[subprocess.Popen, str | None, float]] = {}
        self.outcomes: Outcomes = {}
        self.before = run_before(plan)
        self.since = time.monotonic()

    def start(self, run: Run) -> None:
        """Start a run, unless it is finished or cannot be."""
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            record(self.plan, run)
            results = finished(run)
        except OSError as error:
            results = {"failed": f"{run.folder}: {error.strerror or error}"}
        except PlanError as error:
            results = {"failed": str(error)}
        if results is not None:
            self.outcomes[run] = self._of_its_row(run, results)
            return
        device = self.free.pop(0)
        line = command(self.plan, run, device)
        with open(run.folder / LOG, "ab") as log:
            log.write(f"$ {' '.join(line)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                line,
                cwd=self.plan.recipe.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(device, self.jobs),
                start_new_session=True,
                pass_fds=() if self.lock is None else (self.lock,),
            )
        self.running[run] = process, device, time.monotonic()

    def _of_its_row(self, run: Run, results: dict[str, Any]) -> dict[str, Any]:
        """The results, or why they are none: a file has changed since other runs of the row."""
        for other, before in self.outcomes.items():
            same_row = other.row is run.row and other.settings == run.settings
            if not same_row or other.trial or run.trial:
                continue
            same_fold = other.options.get("fold") == run.options.get("fold")
            for key in ("settings", "data") if same_fold else ("settings",):
                if key in before and results.get(key, before[key]) != before[key]:
                    return {
                        "failed": f"{run.folder} and {other.folder} were run with different "
                        f"{key} (a file has changed in between); delete the older one"
                    }
        return results

    def poll(self) -> list[Run]:
        """Collect the runs that have ended since."""
        ended = []
        for run, (process, device, since) in list(self.running.items()):
            minutes = (time.monotonic() - since) / 60
            late = self.limit_minutes is not None and minutes > self.limit_minutes
            if process.poll() is None and late:
                _end(process)
            if process.poll() is None:
                continue
            del self.running[run]
            self.free.append(device)
            if late and process.returncode:
                reason = f"longer than the {self.limit_minutes:g} minutes allowed"
                self.outcomes[run] = {"failed": reason}
            elif process.returncode:
                reason = why_failed(process.returncode, run.folder / LOG)
                self.outcomes[run] = {"failed": reason}
            else:
                left = f"left no results in {run.folder}"
                results = finished(run, ended=True) or {"failed": left}
                self.outcomes[run] = self._of_its_row(run, results)
            ended.append(run)
        return ended

    def stop(self) -> None:
        """End what is running; the same command goes on from its checkpoints."""
        for process, _, _ in self.running.values():
            _end(process)
        self.running.clear()


def _gpu(device: str) -> str:
    """The GPU that is meant by "cuda:1": of those that this process may use, if they are named."""
    number, allowed = device.partition(":")[2] or "0", os.environ.get("CUDA_VISIBLE_DEVICES")
    if not allowed:
        return number
    gpus = [gpu.strip() for gpu in allowed.split(",")]  # numbers or UUIDs
    if not number.isdigit() or int(number) >= len(gpus):
        raise PlanError(f"--devices {device}: CUDA_VISIBLE_DEVICES has only {allowed}")
    return gpus[int(number)]


def _environment(device: str | None, jobs: int) -> dict[str, str]:
    env = dict(os.environ)
    root = str(Path(__file__).resolve().parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    env.setdefault("OMP_NUM_THREADS", str(max((cores or 1) // jobs, 1)))
    if device is not None and device.startswith("cuda"):
        env["CUDA_VISIBLE_DEVICES"] = _gpu(device)
    return env


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
