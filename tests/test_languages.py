"""Plans of the low-resource recipe, and several languages in one table."""

import json
import sys
from pathlib import Path

import pytest

from hff_modules.plan import make_plan, read_plan
from hff_modules.tables import markdown
from tests.test_commonvoice import RECIPE

sys.path.insert(0, str(RECIPE))
import languages  # noqa: E402


@pytest.mark.parametrize("path", sorted(RECIPE.glob("plans/*.yaml")), ids=lambda path: path.stem)
def test_plans_can_be_carried_out_with_keys_that_the_recipe_has(path):
    plan = make_plan(read_plan(path), path)
    assert plan.recipe == RECIPE / "train.py" and len(plan.rows) >= 6
    from hff_modules.config import METHODS, find_method, merge_files

    base = merge_files(RECIPE / "hparams/commonvoice.yaml")
    for row in plan.rows:
        known = {**base, **merge_files(find_method(row.method, METHODS))}
        for settings in row.settings:
            assert {*row.options, *settings} <= set(known), row.label


def result(language, seed, cer, label="fusion", **more):
    return {
        **{"label": label, "method": "fusion", "encoder": "builtin", "layers": [3], "horizon": 12},
        **{"trainable_encoder_parameters": 5, "trainable_parameters": 10 + seed, "seed": seed},
        **{"train_seconds": 60.0, "step_seconds": 0.1, "peak_memory_mb": 500, "score": "cer"},
        **{"dev": {"cer": cer}, "history": [], "language": language},
        "test": {language: {"cer": cer, "wer": 100, "cer_lm": cer - 2, "cer_beam": cer - 1}},
        **more,
    }


def test_the_mean_is_of_the_languages_of_a_seed_and_its_spread_that_of_the_seeds():
    runs = [result("mt", 1, 50), result("ru", 1, 70), result("mt", 2, 52), result("ru", 2, 78)]
    entries = languages.together(runs, ["mt", "ru"])
    assert [entry["test"]["mean"]["cer"] for entry in entries] == [60, 65]
    assert entries[1]["test"]["mean, beam"] == {"cer": 64}
    assert entries[1]["test"]["mean, beam with LM"] == {"cer": 63}
    assert entries[1]["per_language"]["ru"].keys() >= {"cer", "cer_beam", "cer_lm"}
    table = markdown(entries)
    assert "| 62.5 ± 3.5 |" in table and "| 51.0 ± 1.4 |" in table and "| 1, 2 |" in table


def test_a_language_that_failed_or_is_not_there_yet_is_no_part_of_a_mean():
    failed = {
        "label": "fusion",
        "method": "fusion",
        "seed": 2,
        "failed": "no space",
        "language": "ru",
    }
    runs = [result("mt", 1, 50), result("mt", 2, 52), failed]
    entries = languages.together(runs, ["mt", "ru"])
    assert [entry.get("failed") for entry in entries] == ["ru: not run", "ru: no space"]
    assert "seed 2: ru: no space" in markdown(entries)


def test_the_plan_is_carried_out_for_each_language_and_collected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text("recipe: train.py\n")
    lines = []

    def call(line):
        lines.append(line[3:])
        language = line[-1]
        Path(line[5]).mkdir(parents=True)
        runs = [result(language, seed, 50 + seed) for seed in (1, 2)]
        Path(line[5], "runs.json").write_text(json.dumps(runs))
        return 0

    monkeypatch.setattr(languages.subprocess, "call", call)
    for name in ("mt", "ru"):
        Path("data", name).mkdir(parents=True)
        Path("data", name, "train.tsv").touch()
    with pytest.raises(FileNotFoundError, match="language xx: .* there: mt, ru"):
        languages.main(["plan.yaml", "mt", "xx", "--", "--data_folder", "data"])
    assert not lines, "noticed before the first language is learned"
    languages.main(["plan.yaml", "mt", "ru", "--jobs", "2", "--", "--data_folder", "data"])
    place = "results/compare/plan"
    common = ["--jobs", "2", "--", "--data_folder", "data", "--language"]
    assert lines == [
        ["plan.yaml", "--output", f"{place}/{name}", *common, name] for name in ("mt", "ru")
    ]
    measured = json.loads(Path(place, "measured.json").read_text())
    assert [entry["test"]["mean"]["cer"] for entry in measured] == [51, 52]
    assert "mean CER %" in Path(place, "table.md").read_text()
    # A comparison that was refused has written nothing: its old runs are no results of this call.
    monkeypatch.setattr(languages.subprocess, "call", lambda line: int(line[-1] == "ru"))
    with pytest.raises(ValueError, match="no language gave results"):
        languages.main(["plan.yaml", "mt", "ru"])
    for wrong in ([], ["plan.yaml"], ["nowhere.yaml", "mt"], ["plan.yaml", "mt", "--output", "x"]):
        with pytest.raises(ValueError, match="expected a plan and languages"):
            languages.main(wrong)
