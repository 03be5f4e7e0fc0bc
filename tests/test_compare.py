import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hff_modules import compare, comparison, plots, runner, tables
from hff_modules.config import METHODS, find_method, merge_files
from hff_modules.plan import PlanError, as_argument, as_folder, make_plan, read_plan
from tests.test_training import make_speech

ROOT = Path(__file__).parent.parent

# A recipe in name only: its score follows from the learning rate, and it obeys `break` and `wait`.
STUB = """
import json, os, signal, sys, time
from pathlib import Path
method, rest = sys.argv[1], sys.argv[2:]
flags = [word for word in rest if word in ("--test_only", "--noprogressbar")]
rest = [word for word in rest if word not in flags]
options = dict(zip((word[2:] for word in rest[::2]), rest[1::2]))
folder = Path(options["output_folder"])
here = Path(__file__).parent
with open(here / "calls.txt", "a") as calls:
    calls.write(json.dumps([method, flags[1:], options]) + "\\n")
log = "epoch: 1, lr: 1 - train loss: 2 - valid loss: 1, valid cer: 44"
(folder / "train_log.txt").write_text(log)
time.sleep(float(options.get("wait", 0)))
todo = options.get("break")
if todo == "signal":
    os.kill(os.getpid(), signal.SIGKILL)
if todo == "error" and not (here / "mended").exists():
    print("loading\\n\\nerror: no encoder of that name\\n(HFF_TRACEBACK=1 shows where)")
    sys.exit(1)
if todo == "nothing":
    sys.exit(0)
rate, seed = float(options.get("lr", 0.1)), int(options["seed"])
cer = 20 + 1000 * abs(rate - 0.01) + seed
dev = {"loss": 1.0, "wer": 2 * cer, "cer": cer}
history = [{"epoch": n, "train_seconds": 5.0 * n, **dev, "cer": cer + 10 - 5 * n} for n in (1, 2)]
width = int(options.get("width", 4))
results = {
    "method": method, "encoder": "builtin", "layers": [3, 6], "horizon": 6,
    "trainable_encoder_parameters": 1000 * width, "trainable_parameters": 1000 * width + 7,
    "total_parameters": 10**6, "train_seconds": 10.0 * width, "step_seconds": 0.05,
    "audio_seconds_per_second": 3.0, "peak_memory_mb": 100.0 * width, "epochs": 2, "seed": seed,
    **({"fold": int(options["fold"])} if "fold" in options else {}),
    "settings": (here / "settings").read_text() if (here / "settings").exists() else "first",
    "dev": {**dev, "cer": cer}, "history": history,
    "test": {} if options.get("testing") == "false" else {"test": {"cer": cer + 1, "wer": 90.0}},
}
(folder / "save" / "CKPT+1").mkdir(parents=True, exist_ok=True)
(folder / "save" / "CKPT+1" / "trained.safetensors").write_bytes(bytes(1000 * width))
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes longer than all else; the tests that need it ask for it."""
    if "pictures" not in request.node.name:
        monkeypatch.setattr(plots, "available", lambda: False)


@pytest.fixture
def recipe(tmp_path):
    """A folder with a stub of a recipe and two method files."""
    folder = tmp_path / "recipe"
    (folder / "hparams").mkdir(parents=True)
    (folder / "train.py").write_text(STUB)
    for method in ("a", "b"):
        (folder / "hparams" / f"{method}.yaml").write_text(f"method: {method}\n")
    return folder


def calls(recipe):
    """What the stub was called with: method, flags, options."""
    path = recipe / "calls.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_plan(recipe, /, **keys):
    path = recipe / "plan.yaml"
    path.write_text(json.dumps({"recipe": "train.py", **keys}))
    return str(path)


def carry_out(recipe, /, *argv, **keys):
    """Run a plan; gives the runs."""
    return compare.main([write_plan(recipe, **keys), *argv])


def output(recipe, name=""):
    return recipe / "results" / "compare" / "plan" / name


def test_every_method_runs_with_every_seed_and_one_command_leaves_table_csv_json_and_page(
    recipe, capsys
):
    options = {"lr": 0.02, "names": ["x", "y"], "flag": True}
    wide = {"method": "b", "label": "b, wide", "options": {"width": 9, "lr": 3e-05}}
    runs = carry_out(
        recipe, "--", "--more", "1", methods=["a", wide], seeds=[1, 2], options=options
    )
    assert [(run["label"], run["seed"]) for run in runs] == [
        *(("a", 1), ("a", 2)),
        *(("b, wide", 1), ("b, wide", 2)),
    ]
    given = {(method, o["seed"]): o for method, _, o in calls(recipe)}
    assert len(given) == 4
    assert given["a", "1"]["lr"] == "0.02" and given["a", "1"]["more"] == "1"
    assert json.loads(given["a", "1"]["names"]) == ["x", "y"] and given["a", "1"]["flag"] == "true"
    assert not any("=" in o["output_folder"] for o in given.values())
    assert given["b", "2"]["lr"] == "3.0e-05" and given["b", "2"]["width"] == "9"
    table = output(recipe, "table.md").read_text()
    saved = json.loads(output(recipe, "runs.json").read_text())
    assert saved == runs and tables.markdown(saved) == table and table in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    best = dict(zip(rows[0], rows[2], strict=True))
    assert [row[0] for row in rows[2:]] == ["b, wide", "a"]
    assert best["test CER %"] == "32.5 ± 0.7" and best["dev CER %"] == "31.5 ± 0.7"
    assert best["trained in encoder + fusion"] == "9,000" and best["trained"] == "9,007"
    assert (best["step ms"], best["peak MB"], best["training s"]) == ("50", "900", "90")
    (first, second) = csv.DictReader(output(recipe, "table.csv").open())
    assert first["method"] == "b, wide" and float(first["test cer mean"]) == pytest.approx(32.47)
    assert float(second["checkpoint_mb"]) == pytest.approx(0.004) and second["seeds"] == "1; 2"
    page = output(recipe, "index.html").read_text()
    assert "b, wide" in page and "32.5 ± 0.7" in page and "http-equiv" not in page


def test_time_to_a_score_is_that_of_the_first_epoch_on_dev_that_reached_it(recipe):
    runs = carry_out(recipe, methods=["a"], options={"lr": 0.02})  # dev 36 after 5 s, then 31
    assert runs[0]["reach"] == {"score": "cer", "value": 31.0, "seconds": 10.0}
    for reach, seconds in ((36, 5.0), (35.9, 10.0), (1, None)):
        (run,) = carry_out(recipe, "--reach", str(reach), methods=["a"], options={"lr": 0.02})
        assert run["reach"]["seconds"] == seconds
    assert "s to dev CER 1.0 %" in tables.markdown([run])
    assert len(calls(recipe)) == 1


def test_epochs_with_the_head_alone_are_not_the_method_and_reach_nothing():
    history = [{"epoch": n, "cer": 50 - n, "train_seconds": 10.0 * n} for n in (1, 2, 3)]
    assert tables.seconds_to({"history": history}, "cer", 49) == 10
    assert tables.seconds_to({"history": history, "frozen_epochs": 2}, "cer", 49) == 30


def test_by_default_the_score_to_reach_is_one_that_all_rows_reached():
    runs = [{"score": "cer", "dev": {"cer": value}} for value in (30.0, 50.0)]
    assert comparison.reached_by_all(runs) == 50.0
    runs = [{"score": "accuracy", "dev": {"accuracy": value}} for value in (30.0, 50.0)]
    assert comparison.reached_by_all(runs) == 30.0 and comparison.reached_by_all([]) is None


def test_a_learning_rate_is_chosen_on_dev_and_only_the_chosen_one_sees_the_test_set(recipe):
    row = {"method": "a", "grid": {"lr": [0.03, 0.011, 0.001]}, "seeds": [1, 2]}
    runs = carry_out(recipe, methods=[row, "b"])
    of_a = [(o["lr"], o["seed"], o.get("testing"), f) for m, f, o in calls(recipe) if m == "a"]
    assert of_a == [
        *(("0.03", "1", "false", []), ("0.011", "1", "false", []), ("0.001", "1", "false", [])),
        *(("0.011", "1", None, ["--test_only"]), ("0.011", "2", None, [])),
    ]
    assert {run["chosen"] for run in runs if run["label"] == "a"} == {"lr=0.011"}
    assert "chosen" not in runs[-1] and "| lr=0.011 |" in output(recipe, "table.md").read_text()
    trials = json.loads(output(recipe, "trials.json").read_text())
    assert [trial["settings"]["lr"] for trial in trials] == [0.03, 0.011, 0.001]
    assert [trial["dev"]["cer"] for trial in trials] == pytest.approx([41, 22, 30])


def test_settings_can_be_listed_instead_of_combined(recipe):
    grid = [{"lr": 0.03, "width": 1}, {"lr": 0.01, "width": 2}]
    (run,) = carry_out(recipe, methods=[{"method": "a", "grid": grid}])
    assert run["chosen"] == "lr=0.01, width=2" and len(calls(recipe)) == 3


def test_trials_with_options_of_their_own_are_not_the_final_runs(recipe):
    keys = {"grid": {"lr": [0.03, 0.011]}, "grid_options": {"epochs": 1}}
    carry_out(recipe, methods=["a"], options={"epochs": 9}, **keys)
    seen = [(o["lr"], o["epochs"], flags) for _, flags, o in calls(recipe)]
    assert seen == [("0.03", "1", []), ("0.011", "1", []), ("0.011", "9", [])]


def test_folds_are_repeats_of_a_row_like_seeds_and_settings_are_chosen_on_the_first(recipe):
    grid = {"lr": [0.03, 0.011]}
    rows = ["a", {"method": "b", "folds": [2], "grid": grid, "options": {"break": "nothing"}}]
    rows.append({"method": "b", "label": "c", "grid": grid})
    with pytest.raises(SystemExit):
        carry_out(recipe, methods=rows, seeds=[1, 2], folds=[1, 2, 3])
    runs = json.loads(output(recipe, "runs.json").read_text())
    assert [run.get("fold") for run in runs] == [*(1, 2, 3, 1, 2, 3), *(2, 2), *(1, 2, 3, 1, 2, 3)]
    assert sum("failed" in run for run in runs) == 2  # both settings of the second row
    c = [(o["lr"], o["seed"], o["fold"], f) for _, f, o in calls(recipe) if "/c/" in str(o)]
    tested = [("0.011", seed, fold, []) for seed in "12" for fold in "123"]
    tested[0] = ("0.011", "1", "1", ["--test_only"])  # the trial that was chosen
    assert c == [("0.03", "1", "1", []), ("0.011", "1", "1", []), *tested]
    table = output(recipe, "table.md").read_text()
    assert "| 1, 2, 3 |" in table and "seed 1, fold 2: left no results" in table
    progress = output(recipe, "progress.txt").read_text()
    assert progress.startswith("finished: 16 runs, 2 of them failed")


def test_a_plan_says_only_what_differs_from_the_one_that_it_extends(recipe):
    base = {"seeds": [1, 2], "options": {"lr": 0.02, "width": 5}, "methods": ["a", "b"]}
    (recipe / "base.yaml").write_text(json.dumps(base))
    keys = {"extends": "base.yaml", "seeds": [7], "options": {"lr": 0.01}}
    runs = carry_out(recipe, **keys)
    assert [(run["label"], run["seed"]) for run in runs] == [("a", 7), ("b", 7)]
    assert {(o["lr"], o["width"]) for _, _, o in calls(recipe)} == {("0.01", "5")}
    rows = {"b": {"seeds": [8], "options": {"lr": 0.03}}}
    runs = carry_out(recipe, **keys, rows=rows, output="changed")
    assert [(run["label"], run["seed"]) for run in runs] == [("a", 7), ("b", 8)]
    assert [(o["lr"], o["width"]) for _, _, o in calls(recipe)[2:]] == [
        ("0.01", "5"),
        ("0.03", "5"),
    ]
    with pytest.raises(PlanError, match=r"plan\.yaml, rows: there is no row 'c', but a, b"):
        carry_out(recipe, **keys, rows={"c": {}})
    with pytest.raises(PlanError, match=r"rows: a: expected {key: value}, got 3"):
        carry_out(recipe, **keys, rows={"a": 3})
    (recipe / "base.yaml").write_text(json.dumps({"extends": "plan.yaml"}))
    with pytest.raises(PlanError, match=r"plan\.yaml: extends itself"):
        carry_out(recipe, **keys)
    with pytest.raises(PlanError, match=r"nosuch\.yaml: cannot be read \(No such file"):
        carry_out(recipe, extends="nosuch.yaml")


def test_varied_options_make_a_row_each_so_that_pruning_is_one_plan(recipe):
    row = {"method": "a", "label": "tpa", "vary": {"tpa_layers": ["all", "last:3", [1, 2]]}}
    runs = carry_out(recipe, methods=[row])
    assert [run["label"] for run in runs] == [
        *("tpa, tpa_layers=all", "tpa, tpa_layers=last:3", "tpa, tpa_layers=[1, 2]")
    ]
    assert [o["tpa_layers"] for _, _, o in calls(recipe)] == ["all", "last:3", "[1, 2]"]


def test_what_is_finished_is_not_run_again_and_what_failed_is(recipe, capsys):
    rows = ["a", {"method": "b", "options": {"break": "error"}}]
    with pytest.raises(SystemExit) as stopped:
        carry_out(recipe, methods=rows)
    assert stopped.value.code == 1 and [call[0] for call in calls(recipe)] == ["a", "b"]
    (recipe / "mended").touch()
    runs = carry_out(recipe, methods=rows)
    assert [call[0] for call in calls(recipe)] == ["a", "b", "b"]
    assert not any("failed" in run for run in runs)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("error", "no encoder of that name"),
        ("signal", "ended by SIGKILL (out of memory?)"),
        ("nothing", "left no results in"),
    ],
)
def test_a_failed_run_is_a_row_with_its_reason(recipe, fault, reason):
    rows = ["a", {"method": "b", "options": {"break": fault}}]
    with pytest.raises(SystemExit):
        carry_out(recipe, methods=rows)
    last = output(recipe, "table.md").read_text().splitlines()[-1]
    assert last.startswith("| b | – |") and reason in last
    assert reason in output(recipe, "index.html").read_text()
    runs = json.loads(output(recipe, "runs.json").read_text())
    assert [("failed" in run) for run in runs] == [False, True]


def test_what_would_undo_seeds_or_a_grid_is_refused(recipe):
    for extra in (["--seed", "7"], ["--seed=7"]):
        with pytest.raises(PlanError, match="seed is the comparison's own to say; take --seeds"):
            carry_out(recipe, "--", *extra, methods=["a"])
    rows = [{"method": "a", "grid": {"wait": [0, 1]}}]
    with pytest.raises(PlanError, match="a: --wait would undo the grid's"):
        carry_out(recipe, "--", "--wait", "2", methods=rows)
    assert not calls(recipe)


def test_the_reason_of_a_failure_is_that_of_the_last_try(tmp_path):
    log = tmp_path / "output.txt"
    log.write_text("$ run\nerror: no such folder\n$ run\nTraceback\nRuntimeError: out of memory\n")
    assert runner.why_failed(1, log) == "RuntimeError: out of memory"


def test_a_row_with_failed_trials_only_fails_and_one_with_a_good_one_does_not(recipe):
    grid = {"break": ["error", "signal"]}
    rows = [{"method": "a", "grid": grid}, {"method": "b", "grid": {"break": ["error", "no"]}}]
    with pytest.raises(SystemExit):
        carry_out(recipe, methods=rows)
    runs = json.loads(output(recipe, "runs.json").read_text())
    assert [(run["label"], "failed" in run) for run in runs] == [
        *(("a", True), ("a", True), ("b", False))
    ]
    assert runs[-1]["chosen"] == "break=no"


def test_a_folder_of_a_run_with_other_options_is_a_failure_that_names_them(recipe):
    carry_out(recipe, methods=["a"], options={"epochs": 9})
    with pytest.raises(SystemExit):
        carry_out(recipe, methods=["a"], options={"epochs": 3})
    (run,) = json.loads(output(recipe, "runs.json").read_text())
    assert "was run with epochs 9, now it is 3" in run["failed"] and len(calls(recipe)) == 1


def test_data_and_caches_may_lie_elsewhere_when_a_comparison_goes_on(recipe):
    carry_out(recipe, "--", "--data_folder", "/data/CV", "--num_workers", "2", methods=["a"])
    (run,) = carry_out(recipe, "--", "--data_folder", "/scratch/CV", methods=["a"])
    assert "failed" not in run and len(calls(recipe)) == 1
    with pytest.raises(SystemExit):
        carry_out(recipe, "--", "--encoder", "other", methods=["a"])
    (run,) = json.loads(output(recipe, "runs.json").read_text())
    assert "was run with encoder None, now it is 'other'" in run["failed"]


def test_finished_runs_may_be_moved_with_their_recipe(recipe):
    carry_out(recipe, methods=["a"])
    moved = recipe.rename(recipe.with_name("elsewhere"))
    (run,) = carry_out(moved, methods=["a"])
    assert "failed" not in run and len(calls(moved)) == 1


def test_results_that_cannot_be_read_are_made_again(recipe, capsys):
    carry_out(recipe, methods=["a"])
    path = output(recipe, "a/1/results.json")
    path.write_text('{"method": "a", "dev"')
    carry_out(recipe, methods=["a"])
    assert len(calls(recipe)) == 2 and json.loads(path.read_text())["dev"]
    assert f"{path} cannot be read" in capsys.readouterr().out


def test_runs_from_before_a_file_changed_are_no_seeds_of_the_row(recipe):
    carry_out(recipe, methods=["a", "b"], seeds=[1])
    (recipe / "settings").write_text("other")
    with pytest.raises(SystemExit):
        carry_out(recipe, methods=["a"], seeds=[1, 2])
    first, second = json.loads(output(recipe, "runs.json").read_text())
    assert "failed" not in first and "were run with different settings" in second["failed"]


def test_data_without_a_test_part_has_scores_on_dev(recipe):
    options = {"testing": False}
    (run,) = carry_out(recipe, methods=["a"], options=options)
    assert run["test"] == {} and "| 111.0 |" in output(recipe, "table.md").read_text()
    (run,) = carry_out(recipe, methods=["a"], options=options)
    assert run["test"] == {}


def test_settings_of_a_grid_that_share_a_folder_are_refused(recipe):
    with pytest.raises(PlanError, match=r"layers=4-9 and layers=\[4, 9\] would have the same"):
        carry_out(recipe, methods=[{"method": "a", "grid": {"layers": ["4-9", [4, 9]]}}])


def test_of_gpus_that_are_named_only_those_are_used(recipe, monkeypatch):
    plan = make_plan({"recipe": "train.py", "methods": ["a"]}, recipe / "plan.yaml")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-1f")
    assert runner._environment("cuda:0", 1)["CUDA_VISIBLE_DEVICES"] == "4"
    assert runner._environment("cuda:1", 1)["CUDA_VISIBLE_DEVICES"] == "GPU-1f"
    with pytest.raises(PlanError, match="--devices cuda:2: CUDA_VISIBLE_DEVICES has only 4,GPU-1f"):
        runner.Runner(plan, 2, ["cuda:0", "cuda:2"])


def test_jobs_run_side_by_side_with_their_share_of_the_cores(recipe, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert runner._environment(None, 1)["OMP_NUM_THREADS"] == str(cores)
    assert runner._environment(None, 99)["OMP_NUM_THREADS"] == "1"
    keys = {"methods": ["a", "b"], "seeds": [1, 2], "options": {"wait": 1}}
    carry_out(recipe, "--jobs", "4", **keys)
    told = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "/4] " in line]
    assert told == ["started:"] * 4 + ["done:"] * 4 and len(calls(recipe)) == 4


def test_devices_are_handed_out_in_turn(recipe, monkeypatch):
    plan = make_plan({"recipe": "train.py", "methods": ["a"]}, recipe / "plan.yaml")
    started = runner.Runner(plan, 3, ["cuda:0", "cuda:1"])
    assert started.free == ["cuda:0", "cuda:1", "cuda:0"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner._environment("cuda:1", 1)["CUDA_VISIBLE_DEVICES"] == "1"
    (run,) = comparison.pending(plan, {})
    assert runner.command(plan, run, "cuda:1")[-2:] == ["--device", "cuda:0"]
    assert runner.command(plan, run, "cpu")[-2:] == ["--device", "cpu"]


def test_texts_that_look_like_numbers_stay_texts_on_a_command_line():
    assert [as_argument(text) for text in ("123", "012", "1e-3", "-4")] == [
        '"123"', '"012"', '"1e-3"', '"-4"'
    ]  # fmt: skip
    for text in ("last:3", "tpa", "!name:torch.nn.ReLU", "{a: 1}", "10min", "fr"):
        assert as_argument(text) == text


def test_rows_on_different_data_are_not_comparable():
    one = {"label": "a", "seed": 1, "data": {"train": "x", "dev": "y", "tones": "z"}}
    other = {"label": "b", "seed": 2, "data": {"train": "w", "dev": "y", "tones": "z"}}
    assert comparison.scored_apart([one, other, {"label": "c", "seed": 1, "failed": "so"}]) == []
    other["data"]["tones"] = "v"
    assert comparison.scored_apart([one, other]) == [
        "not comparable: b (seed 2) was chosen or tested on other data than a (seed 1)"
    ]
    assert comparison.scored_apart([{**one, "fold": 1}, {**other, "fold": 2}]) == []


def test_a_run_that_takes_too_long_is_ended(recipe):
    with pytest.raises(SystemExit):
        carry_out(recipe, "--limit_minutes", "0.01", methods=["a"], options={"wait": 60})
    (run,) = json.loads(output(recipe, "runs.json").read_text())
    assert run["failed"] == "longer than the 0.01 minutes allowed"


def test_after_a_kill_the_same_command_goes_on_and_meanwhile_nobody_else_may(recipe):
    rows = ["a", {"method": "b", "options": {"wait": 30}}]
    command = [sys.executable, "-m", "hff_modules.compare", write_plan(recipe, methods=rows)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(calls(recipe)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = []
    while not seen or "running: b, seed 1: epoch 1 done, dev cer 44" not in seen[-1]:
        seen.append(output(recipe, "progress.txt").read_text())
        assert time.monotonic() < deadline, seen[-1]
        time.sleep(0.5)
    with pytest.raises(BlockingIOError, match="another process is at work here"):
        compare.main(command[3:])
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; the same command goes on" in told
    shown = []
    compare.watch(output(recipe), 0.1, shown.append)  # ends, as nothing runs any more
    assert len(shown) == 1 and "1 of 2 runs done" in shown[0]
    rows[1]["options"]["wait"] = 0
    json_file = output(recipe, "b/1/compare.json")
    json_file.write_text(json_file.read_text().replace("30", "0"))
    carry_out(recipe, methods=rows)
    assert [call[0] for call in calls(recipe)] == ["a", "b", "b"]


def test_methods_can_be_given_without_a_plan(recipe, tmp_path):
    argv = ["--recipe", str(recipe / "train.py"), "--methods", "a", "b", "--seeds", "4"]
    runs = compare.main([*argv, "--output", str(tmp_path / "out"), "--", "--width", "2"])
    assert [(run["label"], run["seed"]) for run in runs] == [("a", 4), ("b", 4)]
    assert (tmp_path / "out" / "a" / "4" / "results.json").exists()
    assert {o["width"] for _, _, o in calls(recipe)} == {"2"}


def test_rows_can_be_picked_from_a_plan(recipe):
    runs = carry_out(recipe, "--only", "b", "--seeds", "7", methods=["a", {"method": "b"}])
    assert [(run["label"], run["seed"]) for run in runs] == [("b", 7)]
    carry_out(recipe, "--only", "a", methods=["a", {"method": "b"}])
    # What other rows have left is reported, too; not what was run with something else.
    assert [run["label"] for run in carry_out(recipe, "--only", "b", methods=["a", "b"])] == [
        *("a", "b")
    ]
    rows = [{"method": "a", "options": {"width": 3}}, "b"]
    assert [run["label"] for run in carry_out(recipe, "--only", "b", methods=rows)] == ["b"]
    assert len(calls(recipe)) == 3
    with pytest.raises(PlanError, match="no row 'c'; there are a, b"):
        carry_out(recipe, "--only", "c", methods=["a", "b"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"methods": ["nosuch"]}, "no method file nosuch; in"),
        ({"methods": []}, "`methods` is missing or empty"),
        ({"methods": "a"}, "methods: expected a list, got 'a'"),
        ({"methods": [{"options": {}}]}, "expected a method file, got"),
        ({"methods": ["a"], "recipe": "nosuch.py"}, "nosuch.py is not there"),
        ({"methods": ["a"], "seed": [1]}, "unknown key 'seed'; there are recipe, output, seeds"),
        ({"methods": [{"method": "a", "lr": 1}]}, "a: unknown key 'lr'"),
        ({"methods": ["a"], "seeds": []}, "seeds: expected a list of whole numbers, got"),
        ({"methods": ["a"], "seeds": [1, 1]}, "seeds: one is there twice"),
        ({"methods": ["a"], "folds": "all"}, "folds: expected a list of whole numbers, got 'all'"),
        ({"methods": ["a", "a"]}, "two rows are called 'a'"),
        ({"methods": ["a"], "grid": {"lr": 0.1}}, "grid: lr: expected a list of values, got 0.1"),
        ({"methods": ["a"], "grid": [1]}, "expected {key: values} or a list of {key: value}"),
        ({"methods": ["a"], "options": ["x"]}, "options: expected {key: value}"),
        ({"methods": ["a"], "output": "a=b"}, "cannot handle paths with a '='"),
        ({"methods": ["a"], "reach": "low"}, "reach: expected a score in percent, got 'low'"),
        ({"methods": ["a"], "options": {"seed": 7}}, "seed is the comparison's own to say; take"),
        ({"methods": ["a"], "grid": {"output_folder": ["x"]}}, "output_folder is the comparison's"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line_before_anything_runs(recipe, keys, message):
    with pytest.raises(PlanError) as refused:
        carry_out(recipe, **keys)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not calls(recipe)


def test_a_plan_that_cannot_be_read_is_refused_in_one_line(recipe, tmp_path):
    for text, message in (("a: [", "is no YAML"), ("- a", "expected `key: value` lines")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(PlanError, match=message) as refused:
            read_plan(tmp_path / "bad.yaml")
        assert "\n" not in str(refused.value)
    with pytest.raises(PlanError, match="cannot be read .No such file"):
        read_plan(tmp_path / "nosuch.yaml")
    with pytest.raises(PlanError, match="give a plan file, or --recipe and --methods"):
        compare.main([])
    with pytest.raises(PlanError, match="--jobs: expected a number above 0, got 0"):
        carry_out(recipe, "--jobs", "0", methods=["a"])
    with pytest.raises(PlanError, match="--debug leaves nothing to compare"):
        carry_out(recipe, "--", "--debug=true", methods=["a"])
    with pytest.raises(PlanError, match="no comparison was started here"):
        carry_out(recipe, "--watch", methods=["a"])


def test_a_score_that_the_task_does_not_have_fails_with_those_it_has(recipe):
    with pytest.raises(SystemExit):
        carry_out(recipe, methods=["a"], score="eer")
    (run,) = json.loads(output(recipe, "runs.json").read_text())
    assert run["failed"] == "score: eer is not on dev; there are loss, wer, cer"


def test_without_matplotlib_everything_but_the_pictures_is_made(recipe, monkeypatch, capsys):
    monkeypatch.setattr(plots, "available", lambda: False)
    carry_out(recipe, methods=["a"])
    assert plots.MISSING in capsys.readouterr().out
    assert output(recipe, "table.md").exists() and not list(output(recipe).glob("*.png"))


def test_the_pareto_front_is_what_nothing_else_beats():
    points = [plots.Point(*p) for p in (("a", 1, 9), ("b", 2, 5), ("c", 3, 7), ("d", 2, 6))]
    assert [p.label for p in plots.pareto_front(points)] == ["a", "b"]
    assert [p.label for p in plots.pareto_front(points, larger_is_better=True)] == ["a"]


def test_in_pictures_one_hopeless_method_does_not_squeeze_the_others_into_a_line(tmp_path):
    pytest.importorskip("matplotlib")
    points = [plots.Point(str(y), y, y) for y in (50, 51, 52, 53, 54, 99)]
    assert [p.label for p in plots.off_the_scale(points)] == ["99"]
    assert not plots.off_the_scale(points, larger_is_better=True)  # there 99 is the best
    assert not plots.off_the_scale(points[1:]) and not plots.off_the_scale(points[:1])  # too few
    for scores, spread in (((5, 50, 50.1, 50.2, 50.3, 52), 0), ((50, 50.1, 50.2, 50.3, 53, 54), 5)):
        assert not plots.off_the_scale(
            [plots.Point("", y, y, spread) for y in scores]
        )  # there is room
    cheap = plots.Point("cheap", 0, 99)
    assert cheap in plots.pareto_front([cheap, *points[:5]])
    plots.scatter([cheap, *points[:5]], tmp_path / "p.png", "MB", "CER (%)")
    for larger in (False, True):
        plots.scatter(points, tmp_path / "p.png", "MB", "CER (%)", larger_is_better=larger)
    same = [plots.Point(str(x), x, 50) for x in range(5)]
    plots.scatter([*same, plots.Point("far", 1, 90)], tmp_path / "p.png", "MB", "CER (%)")


def test_pictures_are_drawn_for_methods_without_parameters_and_for_one_alone(recipe):
    pytest.importorskip("matplotlib")
    rows = [{"method": "a", "options": {"width": 0}}, {"method": "b", "options": {"width": 900}}]
    carry_out(recipe, methods=rows, seeds=[1, 2])
    for name in comparison.PICTURES:
        assert output(recipe, f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert output(recipe, "index.html").read_text().count("data:image/png;base64,") == 4


PLANS = sorted([*ROOT.glob("plans/*.yaml"), *ROOT.glob("recipes/*/*/plans/*.yaml")])


@pytest.mark.parametrize("path", PLANS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_plans_of_the_project_name_only_keys_that_their_methods_have(path):
    plan = make_plan(read_plan(path), path)
    source = plan.recipe.read_text()
    (base,) = [p for p in plan.recipe.parent.rglob("hparams/**/*.yaml") if f'"{p.name}"' in source]
    shared = merge_files(base)
    for row in plan.rows:
        known = {*shared, *merge_files(find_method(row.method, base.parent))}
        for options in (row.options, plan.grid_options, *row.settings):
            assert set(options) <= known, (row.label, set(options) - known)


def test_the_plan_of_all_methods_has_every_method_file_but_the_one_for_encoders_with_a_cnn():
    path = ROOT / "recipes" / "LibriSpeech" / "ASR" / "plans" / "methods.yaml"
    rows = make_plan(read_plan(path), path).rows
    assert {row.method for row in rows} | {"cnn"} == {p.stem for p in METHODS.glob("*.yaml")}
    # Learning rates are tried for these; the other rows are told one.
    tried = {row.method for row in rows if len(row.settings) > 1}
    assert tried == {"tpa", "full_finetune", "fusion", "weighted_sum"}


REAL = """
import sys
from pathlib import Path
from hff_modules.brains import train_ctc
from hff_modules.cli import run
from hff_modules.config import load_config

HERE = Path(__file__).parent

def main(argv):
    hparams, run_opts = load_config(argv, HERE / "base.yaml")
    csv = HERE / "train.csv"
    return train_ctc(hparams, run_opts, HERE, [csv], [csv], {"tones": csv})

run(main)
"""


def test_a_real_job_is_tried_chosen_and_tested_and_a_wrong_key_is_its_reason(
    tmp_path, encoder_folder
):
    make_speech(tmp_path, 4)
    (tmp_path / "train.py").write_text(REAL)
    (tmp_path / "base.yaml").write_text("extends: base/ctc.yaml\ndataset: tones\n")
    options = {
        "encoder": encoder_folder,
        "layers": [2, 4],
        "number_of_epochs": 1,
        "tensorboard": None,
    }
    options |= {"head": "!name:hff_modules.heads.LinearHead"}
    rows = [
        {"method": "fusion", "grid": {"lr_fusion": [0.001, 0.01]}},
        {"method": "last_layer", "options": {"lr_fussion": 1}},
    ]
    keys = {"recipe": "train.py", "methods": rows, "options": options}
    (tmp_path / "plan.yaml").write_text(json.dumps(keys))
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "plan.yaml"), "--", "--device", "cpu"])
    folder = tmp_path / "results" / "compare" / "plan"
    (run, failed) = json.loads((folder / "runs.json").read_text())
    assert "--lr_fussion: there is no such key. Did you mean --lr_fusion?" in failed["failed"]
    assert run["dev"] == {name: run["history"][0][name] for name in run["dev"]}
    assert run["test"]["tones"]["cer"] == pytest.approx(run["dev"]["cer"])
    (checkpoint,) = (folder / "fusion").glob(f"{as_folder(run['chosen'])}/1/save/CKPT*")
    size = sum((checkpoint / n).stat().st_size for n in ("trained.safetensors", "manifest.json"))
    assert run["checkpoint_mb"] == size / 1e6
    untested = set((folder / "fusion").glob("*/1")) - {checkpoint.parent.parent}
    assert [json.loads((p / "results.json").read_text())["test"] for p in untested] == [{}]
