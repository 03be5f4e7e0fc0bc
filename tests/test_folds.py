import json

import pytest

from hff_modules.folds import with_folds


def make_job(calls, tmp_path):
    def job(argv):
        fold = int(argv[argv.index("--fold") + 1]) if "--fold" in argv else 1
        calls.append(list(argv))
        named = "--output_folder" in argv
        folder = tmp_path / (argv[argv.index("--output_folder") + 1] if named else f"fold-{fold}")
        same = {"task": "classification", "dataset": "d", "method": "m", "encoder": "e", "seed": 1}
        test = {"test": {"accuracy": 50.0 + 10 * fold, "loss": 1.0}}
        return folder, {**same, "layers": [1], "horizon": 1, "fold": fold, "test": test}

    return job


def test_all_folds_run_one_after_the_other_and_are_summed_up(tmp_path, capsys):
    calls = []
    main = with_folds(make_job(calls, tmp_path), (1, 2, 3))
    together = main(["m.yaml", "--fold", "all", "--seed", "1"])
    assert calls == [["m.yaml", "--fold", str(n), "--seed", "1"] for n in (1, 2, 3)]
    accuracy = {"mean": 70.0, "spread": 10.0, "folds": [60.0, 70.0, 80.0]}
    assert together["test"]["test"]["accuracy"] == accuracy
    assert json.loads((tmp_path / "folds.json").read_text()) == together
    assert "3 folds, test: accuracy 70.00 ± 10.00" in capsys.readouterr().out


def test_a_folder_that_is_named_gets_one_for_each_fold(tmp_path):
    calls = []
    with_folds(make_job(calls, tmp_path), (1, 2))(["m.yaml", "--fold=all", "--output_folder", "x"])
    assert calls == [["m.yaml", "--fold", f, "--output_folder", f"x/fold-{f}"] for f in "12"]
    assert (tmp_path / "x/folds.json").is_file()


def test_tried_folds_leave_what_finished_ones_say(tmp_path):
    job = make_job([], tmp_path)

    def tried(argv):
        folder, results = job(argv)
        return folder.with_name(f"{folder.name}-debug"), results

    with_folds(tried, (1, 2))(["m.yaml", "--fold=all", "--debug"])
    assert [path.name for path in tmp_path.iterdir()] == ["folds-debug.json"]


def test_one_fold_or_none_runs_as_it_is_and_an_unknown_one_is_refused(tmp_path):
    calls = []
    main = with_folds(make_job(calls, tmp_path), (1, 2))
    assert main(["m.yaml", "--fold", "2"])["fold"] == 2 and main(["m.yaml"])["fold"] == 1
    assert calls == [["m.yaml", "--fold", "2"], ["m.yaml"]]
    with pytest.raises(ValueError, match="fold: expected one of 1, 2, got 7; .* --fold all"):
        main(["m.yaml", "--fold", "7"])
