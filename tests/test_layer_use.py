import json

import pytest

from hff_modules.layer_use import draw, find_runs, main


def run(dataset="emodb", weights=(0.2, 0.5, 0.3), method="weighted_sum", **more):
    named = {str(layer): weight for layer, weight in enumerate(weights)}
    about = {"task": "classification", "dataset": dataset, "method": method, "encoder": "builtin"}
    return {**about, "layer_weights": named, **more}


def test_runs_are_found_in_folders_and_lists_and_sorted_by_data_set(tmp_path):
    for seed in (1, 2):
        path = tmp_path / f"results/{seed}/results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(run(seed=seed, test={"test": {"accuracy": 50.0}})))
    for name, test in (("1-debug", {"test": {"accuracy": 9.0}}), ("trials/lr/1", {})):
        path = tmp_path / f"results/{name}/results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(run(seed=1, test=test)))
    listed = [run("arabic"), run("arabic", method="fusion"), {"method": "weighted_sum"}]
    (tmp_path / "measured.json").write_text(json.dumps(listed))
    groups = find_runs([tmp_path / "results", tmp_path / "measured.json"], "weighted_sum")
    assert {name: len(runs) for name, runs in groups.items()} == {"emodb": 2, "arabic": 1}


def test_the_picture_has_a_bar_for_every_weight_of_every_data_set_in_grey(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [run(), run(weights=(0.4, 0.4, 0.2)), run("arabic"), run("fr", task="speaker")]
    (tmp_path / "all.json").write_text(json.dumps([*runs, run("intent")]))
    main([str(tmp_path / "sub/layers.svg"), str(tmp_path / "all.json")])
    drawn = (tmp_path / "sub/layers.svg").read_text()
    assert drawn.count("<!-- emodb (classification, 2 runs) -->") == 1
    assert drawn.count("<!-- fr (speaker, 1 run) -->") == 1
    assert drawn.count("fill: #404040") == 4, "one darkest bar in each of four pictures"
    assert drawn.count("fill: #bfbfbf") == 8
    assert "emodb: 2 runs" in capsys.readouterr().out


def test_sources_without_what_is_needed_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nowhere: expected a folder of runs or a JSON file"
    ):
        find_runs([tmp_path / "nowhere"], "weighted_sum")
    (tmp_path / "bad.json").write_text("no")
    with pytest.raises(ValueError, match="bad.json: expected results as JSON"):
        find_runs([tmp_path / "bad.json"], "weighted_sum")
    (tmp_path / "all.json").write_text(json.dumps([run(), run(method="elp")]))
    with pytest.raises(ValueError, match="of 2 runs is of method hconv .* elp, weighted_sum"):
        find_runs([tmp_path / "all.json"], "hconv")
    (tmp_path / "two.json").write_text(json.dumps([run(), run(weights=(0.5, 0.5))]))
    with pytest.raises(ValueError, match=r"emodb weigh different layers: \[0, 1\] and \[0, 1, 2\]"):
        find_runs([tmp_path / "two.json"], "weighted_sum")


def test_several_encoders_are_kept_apart(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([run(), run(encoder="facebook/wav2vec2-base")]))
    groups = find_runs([tmp_path / "a.json"], "weighted_sum")
    assert list(groups) == ["emodb, builtin", "emodb, facebook/wav2vec2-base"]
    draw(groups, tmp_path / "a.png", "weighted_sum")
    assert (tmp_path / "a.png").stat().st_size > 1000
