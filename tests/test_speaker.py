import json
import math
from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
from speechbrain.utils.metric_stats import EER, minDCF
from torch import nn

from hff_modules.brains import SpeakerBrain, train_speaker
from hff_modules.brains.speaker import (
    choose_cohort,
    s_norm,
    speaker_classifier,
    speaker_loss,
    verification_errors,
)
from hff_modules.config import METHODS, load_config
from hff_modules.data.manifest import write_manifest
from hff_modules.data.trials import Trial, make_trials, read_trials, write_trials
from tests.corpora import arguments, write_audio
from tests.test_training import trained_tensors

VOICES = {"ann": 200, "bob": 900, "eve": 2600, "kim": 400, "leo": 1600}


def write_rows(path, rows):
    write_manifest(path, rows, ("ID", "duration", "wav", "spk_id"))
    return path


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """Three speakers to train on, two others for dev and test: every one has a pitch."""
    folder, rows = tmp_path_factory.mktemp("voices"), []
    for speaker, pitch in VOICES.items():
        for number in range(3):
            name = f"{speaker}{number}"
            write_audio(folder / f"{name}.wav", 0.3 + 0.05 * number, pitch)
            row = {"ID": name, "duration": 0.3 + 0.05 * number, "wav": f"$data_root/{name}.wav"}
            rows.append({**row, "spk_id": speaker})
    known, others = rows[:9], rows[9:]
    write_rows(folder / "train.csv", known)
    write_rows(folder / "test.csv", others)
    speakers = {row["ID"]: row["spk_id"] for row in others}
    write_trials(folder / "trials.txt", make_trials(speakers, 100, 100))
    return folder, known, others


@pytest.fixture(scope="module")
def job(voices, tmp_path_factory, encoder_folder):
    folder, _, _ = voices
    base = tmp_path_factory.mktemp("base") / "voices.yaml"
    base.write_text("extends: base/speaker.yaml\ndataset: voices\n")

    def run(output, *options, method="fusion", train="train.csv", trials="trials.txt"):
        options = ["--layers", "[2, 4]", *options] if method in ("fusion", "concat") else options
        hparams, run_opts = load_config(arguments(output, encoder_folder, method, *options), base)
        test = folder / "test.csv"
        lists = {"dev": folder / "trials.txt", "test": folder / trials}
        manifests = {"train": folder / train, "dev": test, "test": test}
        return train_speaker(hparams, run_opts, folder, manifests, lists)

    return run


@pytest.mark.parametrize("method", sorted(p.stem for p in METHODS.glob("*.yaml")))
def test_every_method_verifies_speakers(job, tmp_path, method, make_encoder_folder):
    options = ["--encoder", make_encoder_folder("wav2vec2-base")] if method == "cnn" else []
    results = job(tmp_path, *options, method=method)
    assert results["task"] == "speaker" and results["method"] == method
    scores = results["test"]["test"]
    assert scores.keys() == {"eer", "min_dcf", "eer_s_norm", "min_dcf_s_norm"}
    assert 0 <= scores["eer"] <= 100
    if method == "last_layer":  # head and what is left behind after training are not the encoder
        assert results["trainable_encoder_parameters"] == 0 < results["trainable_parameters"]


@pytest.mark.parametrize("loss", ["aam", "softmax"])
def test_the_loss_falls_and_the_score_of_every_trial_is_written(job, tmp_path, loss):
    options = ["--number_of_epochs", "10", "--patience", "10", "--loss", loss]
    results = job(tmp_path, *options, "--lr_head", "0.003", "--lr_fusion", "0.003")
    losses = [epoch["train_loss"] for epoch in results["history"]]
    assert losses[-1] < 0.7 * losses[0]
    assert results["test"]["test"]["eer"] == results["dev"]["eer"]
    lines = [line.split() for line in (tmp_path / "test-test.txt").read_text().splitlines()]
    assert len(lines) == 15 and all(len(line) == 5 for line in lines)
    assert any(name.startswith("classifier.") for name in trained_tensors(tmp_path))


class Told(SpeakerBrain):
    """A brain that was told the embeddings; nothing else of it is needed."""

    def __init__(self, embeddings, trials, folder):
        self.embeddings = {name: torch.tensor(e) for name, e in embeddings.items()}
        self.trials, self.test_set, self.cohort = {"dev": trials, "test": trials}, "test", None
        self.hparams, self.debug = SimpleNamespace(output_folder=str(folder)), False


def test_embeddings_that_are_no_numbers_are_no_perfect_score(tmp_path):
    embeddings = {"a0": [1.0, 0.0], "a1": [math.nan, 1.0], "b0": [0.0, 1.0]}
    brain = Told(embeddings, [Trial(True, "a0", "a1"), Trial(False, "a0", "b0")], tmp_path)
    scores = brain.scores(sb.Stage.VALID)
    assert math.isnan(scores["eer"]) and math.isnan(scores["min_dcf"])
    with pytest.raises(ValueError, match="test: the best .* scores that are no numbers"):
        brain.scores(sb.Stage.TEST)


def test_a_debug_run_scores_the_trials_that_it_heard(job, tmp_path):
    results = job(tmp_path, "--debug", "--batch_seconds", "0.5")
    assert {"eer", "min_dcf"} <= results["test"]["test"].keys()


def test_trials_are_scored_by_cosine_and_the_nearer_pair_is_taken_for_one_speaker(tmp_path):
    embeddings = {"a0": [1.0, 0.0], "a1": [8.0, 1.0], "b0": [0.0, 1.0], "b1": [-0.1, 0.2]}
    pairs = [(True, "a0", "a1"), (True, "b0", "b1"), (False, "a0", "b0"), (False, "a1", "b1")]
    brain = Told(embeddings, [Trial(*pair) for pair in pairs], tmp_path)
    assert brain.scores(sb.Stage.TEST) == {"eer": 0.0, "min_dcf": 0.0}
    written = [line.split() for line in (tmp_path / "test-test.txt").read_text().splitlines()]
    assert [line[:3] for line in written] == [[str(int(s)), a, b] for s, a, b in pairs]
    for line in written:
        one, other = (torch.tensor(embeddings[name]) for name in line[1:3])
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
        assert float(line[3]) == pytest.approx(float(cosine), abs=1e-5)
    wrong = [Trial(not same, a, b) for same, a, b in pairs]
    assert Told(embeddings, wrong, tmp_path).scores(sb.Stage.VALID)["eer"] == 100.0
    # Misses cost 0.01 of their share; 1 is what refusing everybody costs.
    half = [Trial(True, "a0", "a1"), Trial(True, "a0", "b0"), Trial(False, "b0", "b1")]
    costs = Told(embeddings, half, tmp_path).scores(sb.Stage.VALID)
    assert costs["min_dcf"] == pytest.approx(0.5 * 0.01 / 0.01)


@pytest.mark.parametrize("digits", [1, 4])
def test_errors_of_trials_are_speechbrains_with_and_without_ties(digits):
    torch.manual_seed(0)
    same, others = (0.3 + torch.randn(200)).round(decimals=digits), torch.randn(300)
    others = others.round(decimals=digits)
    eer, cost = verification_errors(same, others)
    assert eer == pytest.approx(EER(same, others)[0], abs=1e-6)
    assert cost == pytest.approx(minDCF(same, others, p_target=0.01)[0] / 0.01, abs=1e-5)


def test_many_trials_take_no_memory_to_speak_of():
    torch.manual_seed(0)
    eer, cost = verification_errors(torch.randn(200_000) + 2, torch.randn(200_000))
    assert eer == pytest.approx(0.5 * math.erfc(1 / math.sqrt(2)), abs=0.005) and 0 < cost < 1


def test_stored_states_train_like_waveforms_and_a_run_is_tested_again(job, tmp_path):
    store = ["--cache", str(tmp_path / "store"), "--cache_dtype", "fp32"]
    direct = job(tmp_path / "direct")
    stored = job(tmp_path / "stored", *store)
    assert len(list((tmp_path / "store").glob("*/*/*.safetensors"))) == 15
    assert stored["test"]["test"]["eer"] == pytest.approx(direct["test"]["test"]["eer"])
    tensors = trained_tensors(tmp_path / "stored")
    for key, tensor in trained_tensors(tmp_path / "direct").items():
        assert (tensors[key] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-4, key
    assert job(tmp_path / "stored", *store, "--test_only") == stored


def test_trials_and_cohort_are_computed_in_the_precision_of_evaluation(job, tmp_path, monkeypatch):
    autocast, forward = [], SpeakerBrain.compute_forward

    def watched(brain, batch, stage):
        autocast.extend([torch.is_autocast_enabled("cpu")] * (stage != sb.Stage.TRAIN))
        return forward(brain, batch, stage)

    monkeypatch.setattr(SpeakerBrain, "compute_forward", watched)
    job(tmp_path, "--eval_precision", "bf16")
    assert autocast and all(autocast)


def test_without_a_cohort_there_is_no_s_norm(job, tmp_path):
    results = job(tmp_path, "--cohort_speakers", "0")
    assert results["test"]["test"].keys() == {"eer", "min_dcf"}


def test_a_cohort_of_none_is_refused_before_training(job, tmp_path):
    with pytest.raises(ValueError, match="cohort_nearest: expected 1 at least, got 0"):
        job(tmp_path, "--cohort_nearest", "0")
    assert not any(tmp_path.glob("save/*"))


def test_s_norm_is_what_its_definition_gives_trial_by_trial():
    torch.manual_seed(0)
    scores, first, second = torch.rand(5), torch.rand(5, 9), torch.rand(5, 9)
    normed = s_norm(scores, first, second, nearest=4)
    for trial in range(5):
        sides = []
        for side in (first[trial], second[trial]):
            top = sorted(side.tolist())[-4:]
            mean = sum(top) / 4
            deviation = (sum((x - mean) ** 2 for x in top) / 4) ** 0.5
            sides.append((float(scores[trial]) - mean) / deviation)
        assert float(normed[trial]) == pytest.approx(sum(sides) / 2, rel=1e-4)
    assert s_norm(scores, first, second, nearest=1).isfinite().all()


def test_the_margin_makes_the_loss_harder_and_zero_margin_is_scaled_softmax():
    torch.manual_seed(0)
    cosines, targets = torch.rand(4, 1, 3) * 0.8, torch.tensor([[0], [1], [2], [0]])
    plain = nn.functional.cross_entropy(30 * cosines[:, 0], targets[:, 0])
    torch.testing.assert_close(speaker_loss("aam", 0.0, 30)(cosines, targets), plain)
    assert speaker_loss("aam", 0.2, 30)(cosines, targets) > plain
    unscaled = nn.functional.cross_entropy(cosines[:, 0], targets[:, 0])
    torch.testing.assert_close(speaker_loss("softmax", 0.2, 30)(cosines, targets), unscaled)
    assert speaker_classifier("aam", 8, 3)(torch.randn(4, 1, 8)).abs().max() <= 1 + 1e-6
    with pytest.raises(ValueError, match="loss: expected one of aam, softmax, got 'triplet'"):
        speaker_loss("triplet", 0.2, 30)


def test_a_cohort_has_so_many_speakers_and_of_each_so_many_utterances():
    speakers = {f"{s}{n}": s for s in "abcdef" for n in range(4)}
    chosen = choose_cohort(speakers, count=3, utterances=2)
    assert chosen == ["a0", "a1", "c0", "c1", "e0", "e1"]
    assert len(choose_cohort(speakers, count=100, utterances=1)) == 6


def test_a_speaker_to_train_on_in_dev_or_test_is_refused(job, voices, tmp_path):
    folder, known, others = voices
    write_rows(folder / "leak.csv", [*known, *others[:2]])
    with pytest.raises(ValueError, match="test.csv: kim is a speaker of .*leak.csv, too"):
        job(tmp_path, train="leak.csv")


def test_speakers_with_one_utterance_are_left_out_and_none_left_is_refused(
    job, voices, tmp_path, caplog
):
    folder, known, _ = voices
    write_rows(folder / "single.csv", known[:7])
    results = job(tmp_path / "single", train="single.csv")
    assert "single.csv: expected 2 utterances or more of each speaker; 1 of 3" in caplog.text
    (manifest,) = (tmp_path / "single").glob("save/CKPT*/manifest.json")
    assert json.loads(manifest.read_text())["task"]["num_speakers"] == 2 and results
    write_rows(folder / "lone.csv", known[:4])
    with pytest.raises(
        ValueError, match="lone.csv: 1 speakers with 2 utterances or more; expected"
    ):
        job(tmp_path / "lone", train="lone.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 kim0 kim1\n0 kim0 leo7\n", "line 2: names leo7, which is absent; expected .*test.csv"),
        ("1 kim0 kim1\n\nkim0 leo1\n", "line 3: expected `1 first second` .* got 'kim0 leo1'"),
        ("1 kim0 kim1\n2 kim0 leo1\n", "line 2: expected `1 first second`"),
        ("1 kim0 kim1\n", "expected trials of both kinds, found 1 of one kind"),
        ("", "expected trials of both kinds, found 0 of none"),
    ],
)
def test_trials_that_cannot_be_scored_are_named(job, voices, tmp_path, text, message):
    folder, _, _ = voices
    (folder / "bad.txt").write_text(text)
    with pytest.raises(ValueError, match=f"bad.txt.*{message}"):
        job(tmp_path, trials="bad.txt")


def test_a_list_of_trials_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt: no such list of trials; expected"):
        read_trials(tmp_path / "none.txt", {"a"}, "m.csv")


def test_trials_are_drawn_once_each_with_the_right_label_and_read_as_written(tmp_path):
    speakers = {f"{s}{n}": s for s in "abc" for n in range(4)}
    trials = make_trials(speakers, same=5, different=20, seed=3)
    assert sum(trial.same for trial in trials) == 5 and len(set(trials)) == len(trials) == 25
    assert all(t.same == (speakers[t.first] == speakers[t.second]) for t in trials)
    assert trials == make_trials(dict(reversed(speakers.items())), 5, 20, seed=3)
    everything = make_trials(speakers, same=1000, different=1000)
    assert len(everything) == 12 * 11 // 2
    write_trials(tmp_path / "trials.txt", trials)
    assert read_trials(tmp_path / "trials.txt", speakers, "m.csv") == trials
    with pytest.raises(ValueError, match="no trials from 2 utterances of 2 speakers: expected two"):
        make_trials({"a": "1", "b": "2"}, 1, 1)
    assert Trial(True, "a", "b") != Trial(False, "a", "b")
