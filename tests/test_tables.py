import json
from pathlib import Path

import pytest

from hff_modules.config import DEBUG
from hff_modules.tables import (
    add,
    check_rows,
    collect,
    filled,
    is_better_when_larger,
    main,
    markdown,
)

ROOT = Path(__file__).parent.parent


def run(method="fusion", seed=1, cer=40.0, **more):
    return {
        "method": method,
        "encoder": "builtin",
        "layers": [3, 6],
        "horizon": 6,
        "trainable_encoder_parameters": 1234,
        "trainable_parameters": 5678,
        "train_seconds": 61.0,
        "step_seconds": 0.05,
        "peak_memory_mb": 700.0,
        "seed": seed,
        "test": {"test-mini": {"cer": cer, "wer": 2 * cer}},
        **more,
    }


def test_runs_that_differ_in_their_seed_only_make_one_row_and_the_best_comes_first():
    table = markdown(
        [run(cer=40.0), run(seed=2, cer=44.0), run("last_layer", cer=50.0), run("hconv", cer=30.0)]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [row[0] for row in rows[2:]] == ["hconv", "fusion", "last_layer"]
    fusion = dict(zip(rows[0], rows[3], strict=True))
    assert fusion["test-mini CER %"] == "42.0 ± 2.8" and fusion["test-mini WER %"] == "84.0 ± 5.7"
    assert fusion["seeds"] == "1, 2" and fusion["trained"] == "5,678" and fusion["step ms"] == "50"


def test_results_are_gathered_and_written_between_the_marks(tmp_path, capsys):
    for seed in (1, 2):
        folder = tmp_path / "results" / "fusion" / str(seed)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(run(seed=seed)))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table: m.json -->\nold\n<!-- end of table -->\nafter\n")
    main(["collect", str(tmp_path / "results"), str(tmp_path / "m.json")])
    main(["write", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 40.0 ± 0.0 |" in text and "2 runs in" in capsys.readouterr().out
    assert filled(text, tmp_path) == text


def test_runs_of_other_seeds_and_machines_are_added_once(tmp_path, capsys):
    first, second, target = (tmp_path / name for name in ("first.json", "second.json", "all.json"))
    failed = {"method": "tpa", "label": "tpa", "seed": 1, "failed": "out of memory"}
    reach = {"score": "cer", "value": 40.0, "seconds": 5.0}
    first.write_text(json.dumps([run(cer=40.0, reach=reach, checkpoint_mb=3.0), failed]))
    done = run("tpa", cer=36.0, label="tpa")
    second.write_text(json.dumps([run(cer=40.0), run(seed=2, cer=44.0), done]))
    main(["add", str(first), str(target)])
    main(["add", str(second), str(target)])
    main(["add", str(first), str(target)])  # again: nothing new, and what failed is done by now
    assert "3 runs in" in capsys.readouterr().out
    again = run(cer=40.0, reach=reach, checkpoint_mb=3.0)  # what a comparison adds is no result
    assert json.loads(target.read_text()) == [again, done, run(seed=2, cer=44.0)]
    before = target.read_text()
    second.write_text(json.dumps([run(seed=2, cer=45.0)]))
    with pytest.raises(ValueError, match="both have fusion, seed 2, with other results"):
        add(second, target)
    assert target.read_text() == before


def test_runs_with_and_without_a_score_on_dev_make_one_table(tmp_path):
    gathered, compared = tmp_path / "gathered.json", tmp_path / "compared.json"
    gathered.write_text(json.dumps([run()]))
    compared.write_text(json.dumps([run("tpa", score="cer", dev={"cer": 38.0})]))
    for source, target in ((gathered, compared), (compared, gathered)):
        table = markdown(add(source, target))
        assert "| dev CER % |" in table and "| 38.0 |" in table and table.count("| – |") == 1


def test_a_row_is_a_mean_over_seeds_and_of_nothing_else(tmp_path):
    first, second, target = (tmp_path / name for name in ("first.json", "second.json", "all.json"))
    first.write_text(json.dumps([run(label="a", settings="1", weights="1")]))
    add(first, target)
    for other in ({"settings": "2"}, {"encoder": "other"}, {"layers": [12]}, {"weights": "2"}):
        second.write_text(json.dumps([run(label="a", seed=2, **{"settings": "1"} | other)]))
        (key,) = other
        with pytest.raises(ValueError, match=f"a: seed 2 has other {key} than seed 1"):
            add(second, target)
    for seed in (1, 2):
        (tmp_path / f"{seed}").mkdir()
        text = json.dumps(run(seed=seed, settings=f"{seed}"))
        (tmp_path / f"{seed}" / "results.json").write_text(text)
    with pytest.raises(ValueError, match="fusion: seed 2 has other settings than seed 1"):
        collect(tmp_path, tmp_path / "m.json")


def test_layers_that_are_chosen_may_differ_in_a_row_and_debug_runs_are_none(tmp_path):
    runs = [run(seed=n, label="a", settings="1", auto_layers="auto:2", layers=[n]) for n in (1, 2)]
    check_rows(runs)
    for name in ("1", f"1{DEBUG}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(run()))
    assert len(collect(tmp_path, tmp_path / "m.json")) == 1


def test_runs_that_are_joined_are_timed_to_one_score(tmp_path):
    for name, seed, value, best in (("first", 1, 40.0, 40.0), ("second", 2, 60.0, 55.0)):
        history = [
            {"epoch": n, "train_seconds": 10.0 * n, "cer": c} for n, c in ((1, 60.0), (2, best))
        ]
        reach = {"score": "cer", "value": value, "seconds": 10.0}
        one = run(seed=seed, reach=reach, history=history, score="cer", dev={"cer": best})
        (tmp_path / f"{name}.json").write_text(json.dumps([one]))
        runs = add(tmp_path / f"{name}.json", tmp_path / "all.json")
    assert [one["reach"] for one in runs] == [{"score": "cer", "value": 60.0, "seconds": 10.0}] * 2
    assert "s to dev CER 60.0 %" in markdown(runs)


@pytest.mark.parametrize(
    ("name", "larger"),
    [("accuracy action", True), ("test accuracy", True), ("cer", False), ("test min_dcf", False)],
)
def test_accuracies_are_better_when_larger(name, larger):
    assert is_better_when_larger(name) == larger


def test_a_block_may_choose_its_columns(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps([run(), run("hconv", cer=30.0)]))
    block = "<!-- table: m.json | test-mini CER % | method -->\n<!-- end of table -->\n"
    lines = filled(block, tmp_path).splitlines()
    assert lines[2:6] == [
        *("| test-mini CER % | method |", "| --- | --- |", "| 30.0 | hconv |", "| 40.0 | fusion |")
    ]
    assert filled("\n".join(lines), tmp_path) == "\n".join(lines)
    with pytest.raises(ValueError, match="no column 'CER' in the table; expected method, encoder"):
        filled(block.replace("method", "CER"), tmp_path)
    with pytest.raises(ValueError, match="1 of 1 tables lack their end or are spelt otherwise"):
        filled(block.replace("| method", "|method"), tmp_path)


def test_runs_of_other_data_sizes_or_without_a_test_are_no_seeds_of_a_row(tmp_path):
    def keep(name, **more):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(run(**more)))

    keep("a", dataset="one")
    keep("b", dataset="two")
    keep("c", dataset="one", trainable_parameters=9)
    keep("trial", dataset="one", seed=2, test={})
    runs = collect(tmp_path, tmp_path / "m.json")
    assert len(runs) == 3 and len(markdown(runs).splitlines()) == 2 + 3
    keep("again", dataset="one")
    with pytest.raises(ValueError, match=r"again.results\.json and .*a.results\.json .* same seed"):
        collect(tmp_path, tmp_path / "m.json")


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results.json of a tested run below"):
        collect(tmp_path, tmp_path / "m.json")


@pytest.mark.parametrize(
    "path", sorted(p for p in ROOT.rglob("*.md") if ".venv" not in p.parts), ids=str
)
def test_no_table_in_the_project_disagrees_with_its_results(path):
    text = path.read_text(encoding="utf-8")
    assert filled(text, path.parent) == text


def test_folds_of_one_seed_make_one_row_that_names_them():
    def fold(number, accuracy):
        scores = {"accuracy": accuracy, "unweighted_accuracy": accuracy - 10, "loss": 1.0}
        return {**run(), "fold": number, "test": {"test": scores}}

    table = markdown([fold(2, 60.0), fold(1, 80.0)])
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    row = dict(zip(lines[0], lines[-1], strict=True))
    assert len(lines) == 3 and row["folds"] == "1, 2" and row["seeds"] == "1"
    assert "that of fold 1" not in row
    assert row["test accuracy %"] == "70.0 ± 14.1"
    assert row["test unweighted accuracy %"] == "60.0 ± 14.1"
    other = {**fold(1, 75.0), "label": "of the first fold only"}
    lines = markdown([fold(2, 60.0), fold(1, 80.0), other]).splitlines()
    assert " that of fold 1 |" in lines[0]
    assert "| 1, 2 | 80.0 |" in lines[2] and "| 1 | 75.0 |" in lines[3], "all folds first"


OF_THE_README = {
    "half an hour of English": "LibriSpeech/ASR/measured.json",
    "an hour of French": "CommonVoice/ASR/hour-fr.json",
    "39 minutes of Malayalam": "CommonVoice/ASR/hour-ml.json",
    "seventy clips of ten languages": "CommonVoice/ASR/few_shot.json",
    "Arabic command words": "ArabicSpeechCommands/keyword/measured.json",
    "French voices": "CommonVoice/SpeakerRec/measured.json",
    "German emotions": "EmoDB/emotion/measured.json",
    "English intents": "SpeechToIntent/intent/measured.json",
}


@pytest.mark.parametrize("what", OF_THE_README)
def test_the_first_readme_has_the_numbers_of_the_recipes(what):
    root = Path(__file__).parents[1]
    (line,) = (
        s for s in (root / "README.md").read_text().splitlines() if s.startswith(f"| {what},")
    )
    name, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
    score = name.rpartition(", ")[2].removesuffix(" %").lower().replace(" ", "_")
    runs = json.loads((root / "recipes" / OF_THE_README[what]).read_text())
    found = []
    for method in ("last_layer", "fusion", "full_finetune"):
        tests = [next(iter(r["test"].values())) for r in runs if r.get("label") == method]
        found.append(f"{sum(test[score] for test in tests) / len(tests):.1f}")
    assert found == numbers
