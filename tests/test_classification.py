import json
import math

import pytest
import torch

from hff_modules.brains import ClassificationBrain, train_classification
from hff_modules.checkpoint import CheckpointError
from hff_modules.config import METHODS, load_config
from hff_modules.data.manifest import write_manifest
from tests.corpora import arguments, write_audio
from tests.test_training import trained_tensors

SLOTS = ("pitch", "length")
PITCHES = {"low": 300, "high": 2500}


def write_rows(path, rows):
    write_manifest(path, rows, ("ID", "duration", "wav", "spk_id", *SLOTS))
    return path


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Eight tones, high or low, long or short."""
    folder, rows = tmp_path_factory.mktemp("tones"), []
    for number in range(8):
        pitch = list(PITCHES)[number % 2]
        length, seconds = (("short", 0.3), ("long", 0.6))[number // 2 % 2]
        write_audio(folder / f"t{number}.wav", seconds, PITCHES[pitch])
        row = {"ID": f"t{number}", "duration": seconds, "wav": f"$data_root/t{number}.wav"}
        rows.append({**row, "spk_id": "", "pitch": pitch, "length": length})
    write_rows(folder / "all.csv", rows)
    return folder, rows


@pytest.fixture(scope="module")
def job(tones, tmp_path_factory, encoder_folder):
    folder, _ = tones
    base = tmp_path_factory.mktemp("base") / "tones.yaml"
    base.write_text("extends: base/classification.yaml\ndataset: tones\nslots: [pitch, length]\n")

    def run(output, *options, method="fusion", test="all.csv", train="all.csv"):
        options = ["--layers", "[2, 4]", *options] if method in ("fusion", "concat") else options
        argv = arguments(output, encoder_folder, method, *options)
        hparams, run_opts = load_config(argv, base)
        parts = {"train": train, "dev": "all.csv", "test": test}
        manifests = {part: folder / csv for part, csv in parts.items()}
        return train_classification(hparams, run_opts, folder, manifests)

    return run


@pytest.mark.parametrize("method", sorted(p.stem for p in METHODS.glob("*.yaml")))
def test_every_method_classifies(job, tmp_path, method, make_encoder_folder):
    options = ["--encoder", make_encoder_folder("wav2vec2-base")] if method == "cnn" else []
    results = job(tmp_path, *options, method=method)
    assert results["task"] == "classification" and results["method"] == method
    scores = {"loss", "error", "accuracy", "unweighted_error", "unweighted_accuracy"}
    assert results["test"]["test"].keys() == scores | {"accuracy pitch", "accuracy length"}
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert labels == {"pitch": ["high", "low"], "length": ["long", "short"]}
    assert any(name.startswith("head.outputs.1.") for name in trained_tensors(tmp_path))


def test_tones_are_told_apart_and_what_was_found_is_written(job, tmp_path):
    options = ["--number_of_epochs", "15", "--patience", "15", "--lr_head", "0.02"]
    results = job(tmp_path, *options, "--lr_fusion", "0.02")
    scores = results["test"]["test"]
    assert scores["accuracy"] == scores["accuracy pitch"] == scores["unweighted_accuracy"] == 100
    assert scores["error"] == 0 and scores["loss"] < 0.5 * results["history"][0]["loss"]
    found = json.loads((tmp_path / "test-test.json").read_text())
    assert len(found) == 8
    assert found["t3"]["expected"] == found["t3"]["found"] == {"pitch": "high", "length": "long"}


def test_stored_states_train_like_waveforms(job, tmp_path):
    store = ["--cache", str(tmp_path / "store"), "--cache_dtype", "fp32"]
    job(tmp_path / "direct", "--lr_head", "0.02")
    job(tmp_path / "stored", "--lr_head", "0.02", *store)
    assert len(list((tmp_path / "store").glob("*/*/*.safetensors"))) == 8
    stored = trained_tensors(tmp_path / "stored")
    for key, tensor in trained_tensors(tmp_path / "direct").items():
        assert (stored[key] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-4, key


def test_a_finished_run_is_tested_again_and_other_labels_are_refused(job, tones, tmp_path):
    folder, rows = tones
    first = job(tmp_path)
    assert job(tmp_path, "--test_only") == first
    renamed = [{**row, "pitch": row["pitch"].upper()} for row in rows]
    write_rows(folder / "upper.csv", renamed)
    with pytest.raises(ValueError, match="all.csv: the pitch of 't0' is 'low', unknown to the"):
        job(tmp_path, train="upper.csv")
    (folder / "saved.csv").write_bytes((folder / "all.csv").read_bytes())
    write_rows(folder / "all.csv", renamed)
    try:
        with pytest.raises(ValueError, match="on other data: train had .* not all the same"):
            job(tmp_path)
        (tmp_path / "data.json").unlink()  # a run from before there was one
        with pytest.raises(CheckpointError, match="task.labels: "):
            job(tmp_path)
    finally:
        (folder / "saved.csv").rename(folder / "all.csv")


def test_a_class_that_training_does_not_know_is_refused_with_those_it_knows(job, tones, tmp_path):
    folder, rows = tones
    write_rows(folder / "strange.csv", [*rows[:3], {**rows[3], "length": "endless"}])
    message = (
        "strange.csv: the length of 't3' is 'endless', unknown to the training part; "
        "expected one of long, short"
    )
    with pytest.raises(ValueError, match=message):
        job(tmp_path, test="strange.csv")


def test_a_class_with_one_example_is_named_and_a_slot_with_one_class_refused(
    job, tones, tmp_path, caplog
):
    folder, rows = tones
    odd = [*rows, {**rows[0], "ID": "odd", "length": "endless"}]
    write_rows(folder / "odd.csv", odd)
    job(tmp_path / "odd", train="odd.csv")
    expected = "odd.csv: expected two examples or more of each length; there is one of endless"
    assert expected in caplog.text
    write_rows(folder / "low.csv", rows[::2])
    with pytest.raises(ValueError, match="low.csv: every pitch is 'low'; expected two classes"):
        job(tmp_path / "low", train="low.csv")


def test_a_manifest_without_a_column_for_a_slot_is_named(job, tones, tmp_path):
    folder, rows = tones
    write_manifest(folder / "bare.csv", rows, ("ID", "duration", "wav", "spk_id", "pitch"))
    with pytest.raises(ValueError, match="bare.csv: no column length; it has ID, duration"):
        job(tmp_path, test="bare.csv")


class Told(ClassificationBrain):
    """A brain that was told what was found; nothing else of it is needed."""

    def __init__(self, labels, references, hypotheses):
        self.labels, self.references, self.hypotheses = labels, references, hypotheses
        self.ids, self.loss_total = [str(n) for n in range(len(references))], 2.0


def test_scores_are_those_counted_by_hand():
    labels = {"emotion": ["a", "b", "c"]}
    references = [[0], [0], [0], [0], [1], [1], [2]]
    hypotheses = [[0], [0], [0], [1], [1], [0], [0]]
    scores = Told(labels, references, hypotheses).scores(stage=None)
    assert scores.keys() == {"loss", "error", "accuracy", "unweighted_error", "unweighted_accuracy"}
    assert scores["accuracy"] == pytest.approx(100 * 4 / 7)
    assert scores["error"] == pytest.approx(100 * 3 / 7)
    assert scores["unweighted_accuracy"] == pytest.approx(100 * (3 / 4 + 1 / 2 + 0) / 3)
    assert scores["loss"] == pytest.approx(2 / 7)


def test_an_utterance_is_right_when_all_its_slots_are():
    labels = {"one": ["a", "b"], "two": ["c", "d"]}
    scores = Told(labels, [[0, 0], [1, 1]], [[0, 0], [1, 0]]).scores(stage=None)
    assert scores["accuracy"] == 50
    assert (scores["accuracy one"], scores["accuracy two"]) == (100, 50)
    assert scores["unweighted_accuracy"] == (100 + 50) / 2


def test_the_first_loss_is_that_of_chance_in_every_slot(job, tmp_path):
    rates = ["--lr_head", "0", "--lr_fusion", "0"]
    head = "!name:hff_modules.heads.PooledClassifier {hidden_size: 256, dropout: 0.0}"
    results = job(tmp_path, *rates, "--head", head)
    assert results["test"]["test"]["loss"] == pytest.approx(2 * math.log(2), rel=0.2)
    assert torch.tensor(results["history"][0]["train_loss"]).isfinite()
