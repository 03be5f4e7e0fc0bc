"""Tables, pictures and choices of the benchmarks; what they measure is not tested here."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("training_step", "inference", "filling", "multitask"):
        sys.modules.pop(name, None)


def row(step, memory):
    return {"step_seconds": step, "memory_mb": memory, "trainable_parameters": 1000}


def test_the_table_compares_with_the_baseline_and_with_peers_at_the_same_work(benchmark):
    steps = benchmark("training_step")
    rows = {steps.BASELINE: row(4.0, 2000.0), "PEFT LoRA (r=8)": row(3.0, 1500.0)}
    rows |= {"LoRA (r=8)": row(1.5, 300.0), "prefix (n=16)": row(2.0, 400.0)}
    rows["SpeechBrain LoRA (r=8)"] = {"error": "no such thing"}
    lines = {line.split(" | ")[0].strip("| "): line for line in steps.table(rows).splitlines()}
    lora = lines["LoRA (r=8)"]
    assert "× 2.67 | 300 | 0.150 | 1,000 | PEFT LoRA (r=8): × 2.00 / 0.200 |" in lora
    assert lines["prefix (n=16)"].endswith("| — |")
    assert "failed: no such thing" in lines["SpeechBrain LoRA (r=8)"]
    assert len({line.count("|") for line in lines.values()}) == 1


def test_every_peer_and_every_row_of_ours_is_there(benchmark):
    steps = benchmark("training_step")
    assert steps.PEERS.keys() <= steps.ROWS.keys()
    assert {p for peers in steps.PEERS.values() for p in peers} <= steps.ROWS.keys()
    ours = [name for name in steps.ROWS if steps.is_ours(name)]
    assert "prefix (n=16)" in ours and steps.BASELINE not in ours
    assert not any(name.startswith(("SpeechBrain", "PEFT", "s3prl", "trunk")) for name in ours)


def test_rows_are_chosen_by_name_or_part_and_unknown_ones_refused(benchmark):
    steps = benchmark("training_step")
    assert steps.chosen_rows(steps.ROWS, ["fusion [3,6,9]"]) == ["fusion [3,6,9]"]
    assert len(steps.chosen_rows(steps.ROWS, ["LoRA"])) == 3
    assert steps.chosen_rows(steps.ROWS, None) == list(steps.ROWS)
    with pytest.raises(ValueError, match="--rows 'LoRa': no such row; there are SpeechBrain"):
        steps.chosen_rows(steps.ROWS, ["LoRa"])


def test_a_row_that_fails_says_why_and_does_not_end_the_run(benchmark, tmp_path):
    steps = benchmark("training_step")
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('no memory')\n")
    settings = {"batch": 1, "seconds": 1.0, "device": "cpu", "steps": 1}
    assert steps.in_own_process(str(script), "x", tmp_path, settings) == {"error": "no memory"}


def test_memory_is_that_of_the_process_which_gives_back_what_it_frees(benchmark, tmp_path):
    steps = benchmark("training_step")
    script = tmp_path / "row.py"
    script.write_text(
        "import json, os, sys\n"
        "apart = 'MALLOC_TRIM_THRESHOLD_' in os.environ\n"
        "steps = int(sys.argv[sys.argv.index('--steps') + 1])\n"
        "print(json.dumps({'step_seconds': steps, 'memory_mb': 10 if apart else 99}))\n"
    )
    settings = {"batch": 1, "seconds": 1.0, "device": "cpu", "steps": 7}
    measured = steps.in_own_process(str(script), "x", tmp_path, settings)
    assert measured == {"step_seconds": 7, "memory_mb": 10}


def test_what_was_measured_is_drawn_again_from_its_file(benchmark, tmp_path):
    pytest.importorskip("matplotlib")
    steps = benchmark("training_step")
    path = tmp_path / "measured.json"
    rows = {steps.BASELINE: row(4.0, 2000.0), "BitFit": row(2.0, 900.0), "x": {"error": "y"}}
    path.write_text(json.dumps({"rows": rows}))
    steps.main(["--draw", str(path)])
    assert (tmp_path / "measured.png").read_bytes()[:4] == b"\x89PNG"


def test_the_tables_in_the_readme_are_those_of_their_files(benchmark):
    text = (FOLDER / "README.md").read_text()
    names = re.findall(r"<!-- benchmark: (\S+) -->", text)
    assert names
    for name in names:
        rows = json.loads((FOLDER / name).read_text())["rows"]
        script = benchmark("multitask" if name.startswith("multitask") else "training_step")
        assert f"<!-- benchmark: {name} -->\n\n{script.table(rows)}\n\n<!-- end" in text, name


@pytest.mark.parametrize("shape", ["wav2vec2-base", "wav2vec2-large", "w2v-bert-2"])
def test_every_shape_has_its_features_and_can_be_named(shape, benchmark, tmp_path):
    steps = benchmark("training_step")
    steps.write_shape(shape, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.layerdrop == 0.0
    assert (config.hidden_size, config.num_hidden_layers) in ((768, 12), (1024, 24))
    (given,) = steps.inputs_for(tmp_path, torch.randn(2, 16000))
    assert given.shape == ((2, 49, 160) if shape == "w2v-bert-2" else (2, 16000))


def test_inference_is_compared_at_the_same_batch_size(benchmark):
    inference = benchmark("inference")
    row = {"real_time_factor": 0.1, "model_mb": 300.0}
    rows = {
        batch: {
            inference.BASELINE: {**row, "call_seconds": 3.0 * factor, "memory_mb": 80.0},
            "whole encoder": {**row, "call_seconds": 1.5, "memory_mb": 20.0},
        }
        for batch, factor in (("1", 1), ("16", 10))
    }
    table = inference.table(rows)
    assert "| whole encoder | 1 | 0.1000 | × 2.00 | 20 | 0.250 | 300 |" in table
    assert "| whole encoder | 16 | 0.1000 | × 20.00 | 20 | 0.250 | 300 |" in table


def test_more_tasks_are_compared_with_one(benchmark):
    multitask = benchmark("multitask")
    row = {"call_seconds": 1.0, "memory_mb": 190.0, "model_mb": 365.0}
    rows = {multitask.BASELINE: row, "four": {**row, "call_seconds": 4.5}, "x": {"error": "why"}}
    table = multitask.table(rows)
    assert "| four | 4500 | 4.50 | 190 | 365 |" in table and "| x | failed: why |" in table


def test_filling_is_compared_with_one_pass(benchmark):
    filling = benchmark("filling")
    rows = {"one pass": {"seconds": 2.0, "cpu_seconds": 4.0}}
    rows["filling, fp16"] = {"seconds": 2.1, "cpu_seconds": 4.2}
    assert "| filling, fp16 | 2.10 | 1.050 | 4.20 | 1.050 |" in filling.table(rows)
