import functools
import json
import math
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from speechbrain import Stage
from speechbrain.decoders.ctc import CTCPrefixBeamSearcher

from hff_modules import cli
from hff_modules.brains import CTCBrain, base, enter_folder, train_ctc
from hff_modules.brains.ctc import relative_lengths
from hff_modules.brains.head_first import HeadFirst
from hff_modules.checkpoint import CheckpointError
from hff_modules.config import METHODS, load_config
from hff_modules.data import CharUnits
from hff_modules.data.loading import drop_unalignable, needed_frames, read_speech
from hff_modules.data.manifest import write_manifest
from hff_modules.files import locked
from hff_modules.heads import BLSTMHead, DNNHead, LinearHead
from hff_modules.masking import FeatureMasking
from hff_modules.ngram import Fused, tokens, train_ngram
from hff_modules.tables import check_rows

ROOT = Path(__file__).parent.parent
WORDS = ["AB", "BA", "CAB", "AB CA", "B", "ABBA", "CC A", "BAC"]


def make_speech(folder: Path, count: int) -> dict[str, Path]:
    """Tones instead of speech: one for each letter."""
    generator = torch.Generator().manual_seed(count)
    rows = []
    for number in range(count):
        text = WORDS[number % len(WORDS)]
        letters = [torch.sin(torch.arange(2400) * (0.1 * ord(letter) % 3)) for letter in text]
        wav = 0.1 * torch.cat(letters)
        wav = wav + 0.01 * torch.randn(len(wav), generator=generator)
        name = f"u{number}"
        soundfile.write(folder / f"{name}.wav", wav.numpy(), 16000)
        rows.append(
            {
                "ID": name,
                "duration": len(wav) / 16000,
                "wav": f"$data_root/{name}.wav",
                "spk_id": "s",
                "wrd": text,
            }
        )
    write_manifest(folder / "train.csv", rows)
    return {"train": folder / "train.csv"}


@pytest.fixture(scope="module")
def job(tmp_path_factory, encoder_folder):
    """Run a job on tones with a tiny encoder; gives its results and its folder."""
    data = {}

    def run(folder, *options, method="fusion", count=12):
        if count not in data:
            data[count] = tmp_path_factory.mktemp(f"tones{count}")
            make_speech(data[count], count)
        csv = data[count] / "train.csv"
        hparams, run_opts = load_config(arguments(folder, encoder_folder, method, *options), base())
        return train_ctc(hparams, run_opts, data[count], [csv], [csv], {"tones": csv})

    base_file = tmp_path_factory.mktemp("base") / "tones.yaml"
    base_file.write_text("extends: base/ctc.yaml\ndataset: tones\n")

    def base():
        return base_file

    return run


def arguments(folder, encoder, method, *options):
    return [
        f"hparams/{method}.yaml",
        *("--encoder", encoder, "--output_folder", str(folder), "--tensorboard", "null"),
        *("--number_of_epochs", "2", "--batch_seconds", "3", "--num_buckets", "2"),
        *("--head", "!name:hff_modules.heads.LinearHead", "--device", "cpu", "--noprogressbar"),
        *("--cache", "null"),
        *options,
    ]


def trained_tensors(folder):
    """Trained tensors of the newest checkpoint."""
    newest = max(Path(folder).glob("save/CKPT*"), key=lambda p: p.stat().st_mtime_ns)
    return load_file(newest / "trained.safetensors")


@pytest.mark.parametrize("method", sorted(p.stem for p in METHODS.glob("*.yaml")))
def test_every_method_trains_tests_and_leaves_its_results(
    job, tmp_path, method, make_encoder_folder
):
    options = ["--layers", "every:2"] if method in ("fusion", "concat") else []
    if method == "cnn":  # its adapters need an encoder with a CNN
        options += ["--encoder", make_encoder_folder("wav2vec2-base")]
    results = job(tmp_path, "--number_of_epochs", "1", *options, method=method, count=2)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    weights = written.pop("layer_weights", {})
    assert (
        list(written)
        == (
            "task dataset method encoder weights layers horizon trainable_encoder_parameters "
            "trainable_parameters total_parameters train_seconds step_seconds "
            "audio_seconds_per_second peak_memory_mb processes device epochs seed settings data "
            "dev test history versions"
        ).split()
    )
    assert written["method"] == method and written["epochs"] == 1
    assert (written["task"], written["dataset"]) == ("asr", "tones")
    weighing = ("weighted_sum", "l_adapters", "elp", "inner_inter", "unipet")
    weighing += ("houlsby_weighted_sum", "fusion", "fusion_tpa", "fusion_houlsby")
    assert bool(weights) == (method in weighing)
    if weights:
        assert list(weights) == [str(layer) for layer in written["layers"]]
        assert sum(weights.values()) == pytest.approx(1, abs=1e-4)
    assert written["test"]["tones"].keys() == {"loss", "wer", "cer"}
    units = 4  # two utterances: A, B, the space and the blank
    if method in ("last_layer", "weighted_sum"):
        assert written["trainable_encoder_parameters"] == (5 if method == "weighted_sum" else 0)
        head = 24 * units + units  # linear, from a width of 24
        assert written["trainable_parameters"] - written["trainable_encoder_parameters"] == head
    known = {"top_k": 1, "full_finetune": -1, "fusion": 4, "hconv": 4, "last_layer": 4}
    assert written["horizon"] == known.get(method, written["horizon"])
    in_encoder = [name for name in trained_tensors(tmp_path) if name.startswith("encoder.")]
    assert bool(in_encoder) == (written["horizon"] < 4)


def test_random_weights_are_called_untrained_in_results_and_table(job, tmp_path, capsys):
    options = ["--encoder_pretrained", "false", "--number_of_epochs", "1", "--layers", "[2, 4]"]
    results = job(tmp_path, *options, count=2)
    assert results["encoder"].endswith(" (untrained)") and "weights" not in results
    assert " (untrained), layers 2, 4" in capsys.readouterr().out


def test_log_mels_alone_can_be_trained_on_and_stored(job, tmp_path):
    options = ["--encoder", "logmel", "--layers", "0", "--number_of_epochs", "1"]
    options += ["--cache", str(tmp_path / "store")]
    results = job(tmp_path / "run", *options, method="last_layer", count=2)
    assert results["encoder"] == "logmel" and results["layers"] == [0]
    assert results["trainable_encoder_parameters"] == results["horizon"] == 0


def test_batch_norms_of_several_processes_on_a_cpu_are_refused(
    job, tmp_path, make_encoder_folder, monkeypatch
):
    monkeypatch.setattr(base, "is_distributed_initialized", lambda: True)
    options = ["--encoder", make_encoder_folder("wav2vec2-conformer-rel")]
    with pytest.raises(ValueError, match="batch norms are trained, which several processes cannot"):
        job(tmp_path, *options, method="full_finetune")


def test_the_loss_falls(job, tmp_path):
    options = ["--number_of_epochs", "12", "--lr_head", "0.02", "--lr_fusion", "0.02"]
    job(tmp_path, *options, "--layers", "[2, 4]", "--patience", "12")
    lines = (tmp_path / "train_log.txt").read_text().splitlines()
    losses = [float(line.split("train loss: ")[1].split()[0]) for line in lines]
    assert len(losses) == 12
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("adapted", ["{}", "{tpa: {layers: last:1, bottleneck: 4}}"])
def test_stored_states_train_like_waveforms_and_are_computed_once(job, tmp_path, adapted, caplog):
    def run(name, *options):
        options = [*options, "--layers", "[2, 4]", "--adapters", adapted, "--lr_head", "0.02"]
        job(tmp_path / name, *options)
        return trained_tensors(tmp_path / name)

    store = ["--cache", str(tmp_path / "store"), "--cache_dtype"]
    direct, stored = run("direct"), run("stored", *store, "fp32")
    assert direct.keys() == stored.keys()
    # Adam enlarges rounding where a gradient is nearly zero, so whole tensors are compared.
    for key, tensor in direct.items():
        assert (stored[key] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-4, key
    entries = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").glob("*/*/*.safetensors")}
    assert len(entries) == 12
    again = run("again", *store, "fp32")
    assert all(torch.equal(again[key], stored[key]) for key in stored)
    assert entries == {p: p.stat().st_mtime_ns for p in (tmp_path / "store").glob("*/*/*")}
    half = run("half", *store, "fp16")
    for key, tensor in direct.items():
        assert (half[key] - tensor).norm() <= 3e-2 * tensor.norm() + 1e-2, key


@pytest.mark.parametrize("stored", [False, True])
def test_training_that_was_killed_in_mid_epoch_ends_in_the_same_numbers(
    job, tmp_path, monkeypatch, stored
):
    options = [
        *("--cache", str(tmp_path / "store") if stored else "null"),
        "--layers",
        "[2, 4]",
        "--adapters",
        "{top_k: {layers: last:1}}",
        "--ckpt_interval_steps",
        "2",
    ]
    options += ["--lr_encoder", "0.01", "--head", "!name:hff_modules.heads.DNNHead"]
    undisturbed = job(tmp_path / "whole", *options)

    class Killed(Exception):
        pass

    fit_batch, calls = CTCBrain.fit_batch, []

    def killed(brain, batch):
        calls.append(brain.step)
        if len(calls) == 9:
            raise Killed
        return fit_batch(brain, batch)

    with monkeypatch.context() as patched:
        patched.setattr(CTCBrain, "fit_batch", killed)
        with pytest.raises(Killed):
            job(tmp_path / "killed", *options)
    assert calls[-1] == 3, "the kill is meant to come in mid-epoch, after a checkpoint"
    resumed = job(tmp_path / "killed", *options)
    whole, again = trained_tensors(tmp_path / "whole"), trained_tensors(tmp_path / "killed")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert resumed["test"] == undisturbed["test"] and resumed["epochs"] == undisturbed["epochs"]
    logs = [(tmp_path / f / "train_log.txt").read_text() for f in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_a_finished_run_can_be_tested_again_without_training(job, tmp_path):
    first = job(tmp_path, "--layers", "[2, 4]")
    again = job(tmp_path, "--layers", "[2, 4]", "--test_only")
    assert again == first
    assert [past["epoch"] for past in first["history"]] == [1, 2]
    best = min(reversed(first["history"]), key=lambda past: past["wer"])  # the later of equals
    assert first["dev"] == {name: best[name] for name in ("loss", "wer", "cer")}


def test_weights_of_a_language_model_are_chosen_in_the_precision_of_evaluation(
    job, tmp_path, monkeypatch
):
    autocast, forward = [], CTCBrain.compute_forward

    def watched(brain, batch, stage):
        autocast.extend([torch.is_autocast_enabled("cpu")] * (stage != Stage.TRAIN))
        return forward(brain, batch, stage)

    monkeypatch.setattr(CTCBrain, "compute_forward", watched)
    job(tmp_path, "--eval_precision", "bf16", "--lm", "char")
    assert autocast and all(autocast)


def test_test_sets_stay_untouched_until_asked_for(job, tmp_path, monkeypatch):
    stored, filled_cache = [], HeadFirst.filled_cache

    def noted(head_first, hparams, datasets, training):
        stored.append(len(datasets))
        return filled_cache(head_first, hparams, datasets, training)

    monkeypatch.setattr(HeadFirst, "filled_cache", noted)
    options = ["--layers", "[2, 4]", "--number_of_epochs", "1"]
    compared = job(tmp_path / "tried", *options, "--testing", "false")
    assert compared["test"] == {} and compared["dev"]["cer"] >= 0
    assert not list((tmp_path / "tried").glob("test-*.txt"))
    chosen = job(tmp_path / "tried", *options, "--test_only")
    whole = job(tmp_path / "whole", *options)
    assert chosen["test"] == whole["test"] and chosen["dev"] == compared["dev"]
    assert stored == [2, 1, 3]  # nor are their states stored; training's are not for testing


@pytest.mark.parametrize("select_by", ["loss", "cer"])
def test_a_score_that_is_no_number_is_never_the_best(job, tmp_path, monkeypatch, select_by):
    scores = CTCBrain.scores

    def diverging(brain, stage):
        late = stage == Stage.VALID and len(brain.meter.history) == 1
        # What says nothing at all has an error rate of 100 %.
        return scores(brain, stage) | ({"loss": math.nan, "cer": 0.0} if late else {})

    monkeypatch.setattr(CTCBrain, "scores", diverging)
    results = job(tmp_path, "--layers", "[2, 4]", "--select_by", select_by)
    assert len(results["history"]) == 2 and math.isnan(results["history"][1]["loss"])
    assert results["dev"]["loss"] == results["history"][0]["loss"] and results["test"]


def test_patience_begins_when_an_epoch_can_be_chosen(job, tmp_path, monkeypatch):
    scores, seen = CTCBrain.scores, []

    def diverging(brain, stage):
        seen.append(stage)
        return scores(brain, stage) | ({"loss": math.nan} if len(seen) == 3 else {})

    monkeypatch.setattr(CTCBrain, "scores", diverging)
    options = ["--number_of_epochs", "4", "--frozen_epochs", "2", "--patience", "2"]
    results = job(tmp_path, *options, "--bottleneck", "4", "--testing", "false", method="tpa")
    assert math.isnan(results["history"][2]["loss"]) and results["epochs"] == 4


def test_layer_weights_are_those_of_the_best_epoch_without_a_test_set_too(job, tmp_path):
    options = ["--number_of_epochs", "3", "--lr_fusion", "0.5", "--lr_head", "0.5"]
    tried = job(tmp_path, *options, "--testing", "false", method="weighted_sum")
    tested = job(tmp_path, *options, "--test_only", method="weighted_sum")
    assert tried["layer_weights"] == tested["layer_weights"]


def test_another_encoder_is_refused_before_its_states_are_stored(
    job, tmp_path, make_encoder_folder
):
    options = ["--layers", "[2, 4]", "--number_of_epochs", "1"]
    job(tmp_path / "run", *options)
    config = (tmp_path / "run/config.yaml").read_text()
    options += ["--encoder", make_encoder_folder("wavlm-base"), "--cache", str(tmp_path / "store")]
    with pytest.raises(CheckpointError, match="encoder.fingerprint: .* in the checkpoint"):
        job(tmp_path / "run", *options)
    assert (tmp_path / "run/config.yaml").read_text() == config
    assert not (tmp_path / "store").exists()


def test_memory_that_is_full_is_answered_with_what_takes_less(monkeypatch, capsys):
    def full(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with pytest.raises(SystemExit) as end:
        cli.run(full)
    said = capsys.readouterr().err
    assert end.value.code == 1 and "error: CUDA out of memory. Tried to allocate 2 GiB.\n" in said
    assert "--batch_seconds" in said and "more" not in said


@pytest.mark.parametrize("select_by", ["accuracy", "werr"])
def test_a_score_that_cannot_choose_is_refused_at_once(job, tmp_path, select_by):
    with pytest.raises(
        ValueError, match=f"smallest is the best, wer or cer or loss; got '{select_by}"
    ):
        job(tmp_path, "--select_by", select_by)
    assert not (tmp_path / "save").exists() or not any((tmp_path / "save").iterdir())


def test_a_text_for_the_language_model_that_is_not_there_is_refused_at_once(job, tmp_path):
    with pytest.raises(FileNotFoundError, match="lm_text=no.txt: there is no such file"):
        job(tmp_path, "--lm", "char", "--lm_text", "no.txt")
    with pytest.raises(ValueError, match="lm_text is given, but no lm"):
        job(tmp_path, "--lm_text", "no.txt")


def test_testing_otherwise_leaves_the_record_of_training_alone(job, tmp_path):
    options = ["--layers", "[2, 4]", "--number_of_epochs", "1"]
    first = job(tmp_path, *options)
    config = (tmp_path / "config.yaml").read_bytes()
    other = ["--batch_seconds", "9", "--eval_precision", "bf16", "--test_only"]
    assert job(tmp_path, *options, *other)["settings"] == first["settings"]
    assert (tmp_path / "config.yaml").read_bytes() == config
    assert job(tmp_path, *options)["settings"] == first["settings"]


def test_another_number_of_processes_does_not_go_on_with_a_run(job, tmp_path):
    options = ["--layers", "[2, 4]", "--number_of_epochs", "1"]
    job(tmp_path, *options)
    path = tmp_path / "data.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    with pytest.raises(ValueError, match="holds a run of 2 processes, now there are 1; go on"):
        job(tmp_path, *options)
    job(tmp_path, *options, "--test_only")


def test_two_processes_are_not_at_work_in_one_folder(job, tmp_path):
    options = ["--layers", "[2, 4]", "--number_of_epochs", "1"]
    with locked(tmp_path / ".lock"):
        with pytest.raises(BlockingIOError, match="another process is at work here"):
            enter_folder({"output_folder": str(tmp_path), "config": ""})
    enter_folder({"output_folder": str(tmp_path), "config": ""})
    enter_folder({"output_folder": str(tmp_path), "config": ""})
    job(tmp_path, *options)
    with locked(tmp_path / ".lock", wait=False):
        pass  # left when the job was done


def test_results_tell_the_data_they_come_from(job, tmp_path):
    options = ["--layers", "[2, 4]", "--number_of_epochs", "1"]
    first = job(tmp_path / "1", *options, "--seed", "1")
    second = job(tmp_path / "2", *options, "--seed", "2")
    assert first["data"] == second["data"] and first["data"].keys() >= {"train", "dev"}
    check_rows([first, second])
    second["data"] = {**second["data"], "dev": "other"}
    with pytest.raises(ValueError, match="fusion: seed 2 was trained, chosen or tested on other"):
        check_rows([first, second])
    check_rows([{**first, "fold": 1}, {**second, "fold": 2}])


def test_more_batches_to_a_step_than_an_epoch_has_are_refused(job, tmp_path):
    with pytest.raises(ValueError, match="grad_accumulation_factor=99, but an epoch has . batches"):
        job(tmp_path, "--grad_accumulation_factor", "99")


def test_a_debug_run_leaves_the_results_of_a_run_alone(job, tmp_path):
    options = ["--layers", "[2, 4]", "--number_of_epochs", "1"]
    job(tmp_path / "run", *options)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    job(tmp_path / "run", *options, "--debug")
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before == after and (tmp_path / "run-debug" / "results.json").is_file()


@pytest.mark.parametrize("said", [[], ["--cache", "states"]])
def test_a_debug_run_stores_no_states_unless_asked_to(said, encoder_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["hparams/fusion.yaml", "--encoder", encoder_folder, "--dataset", "d", "--debug", *said]
    hparams, _ = load_config(line, METHODS / "base" / "ctc.yaml")
    assert hparams["cache"] == (said[1] if said else None)


def test_what_speechbrain_takes_as_a_run_option_is_a_setting_of_the_run(job, tmp_path):
    options = ["--layers", "[2, 4]", "--number_of_epochs", "1"]
    first = job(tmp_path / "1", *options, "--grad_accumulation_factor", "2", "--seed", "1")
    assert "grad_accumulation_factor: 2\n" in (tmp_path / "1/config.yaml").read_text()
    with pytest.raises(ValueError, match=r"a run with grad_accumulation_factor 2 \(now 1\)"):
        job(tmp_path / "1", *options, "--seed", "1")
    second, other = (
        job(tmp_path / seed, *options, "--grad_accumulation_factor", factor, "--seed", seed)
        for seed, factor in (("2", "2"), ("3", "1"))
    )
    assert first["settings"] == second["settings"] != other["settings"]


def test_a_long_setting_is_shown_where_it_differs(job, tmp_path):
    options = ["--layers", "[2, 4]", "--number_of_epochs", "1"]
    job(tmp_path, *options)
    with pytest.raises(ValueError, match=r"fusion ….*: True\} \(now ….*: False\}\)"):
        job(tmp_path, *options, "--fusion", "{residual: false}")


def test_a_warmup_of_all_steps_is_refused(job, tmp_path):
    with pytest.raises(ValueError, match="warmup: expected a share below 1, got 1.0"):
        job(tmp_path, "--warmup", "1.0")


def test_testing_without_a_checkpoint_is_refused(job, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path}"):
        job(tmp_path, "--layers", "[2, 4]", "--test_only")


def test_going_on_in_the_folder_of_another_method_is_refused(job, tmp_path):
    job(tmp_path, "--number_of_epochs", "1", "--layers", "[2, 4]")
    with pytest.raises(ValueError, match=r"holds a run with method fusion \(now concat\)"):
        job(tmp_path, "--number_of_epochs", "1", "--layers", "[2, 4]", method="concat")


def test_going_on_with_other_settings_is_refused_unless_training_does_not_know_them(job, tmp_path):
    options = ["--layers", "[2, 4]", "--number_of_epochs", "1"]
    first = job(tmp_path, *options)
    config = (tmp_path / "config.yaml").read_text()
    for other in (["--lr_head", "0.5"], ["--number_of_epochs", "3"], ["--batch_seconds", "2"]):
        with pytest.raises(
            ValueError, match=rf"holds a run with {other[0][2:]} .* \(now {other[1]}"
        ):
            job(tmp_path, *options, *other)
    assert (tmp_path / "config.yaml").read_text() == config
    again = job(tmp_path, *options, "--decoding", "beam", "--batch_seconds", "2", "--test_only")
    assert again["dev"] == first["dev"] and again["epochs"] == first["epochs"]


def test_a_checkpoint_has_no_pickle_and_no_frozen_tensor(job, tmp_path):
    job(tmp_path, "--number_of_epochs", "1", "--layers", "[2, 4]")
    (folder,) = tmp_path.glob("save/CKPT*")
    assert {p.name for p in folder.iterdir()} == {
        *("CKPT.yaml", "manifest.json", "brain.ckpt", "counter.ckpt", "dataloader-TRAIN.ckpt"),
        *(f"{n}.safetensors" for n in ("trained", "optimizers", "schedules", "rng", "meter")),
    }
    for name in ("brain.ckpt", "counter.ckpt", "dataloader-TRAIN.ckpt"):
        (folder / name).read_text()  # text, not a pickle
    with safe_open(str(folder / "trained.safetensors"), "pt") as file:
        assert all(name.startswith(("fusion.", "head.")) for name in file.keys())


def test_each_part_has_its_own_optimizer_and_rate(job, tmp_path, monkeypatch):
    seen = {}
    init = CTCBrain.init_optimizers

    def spy(brain):
        init(brain)
        seen.update({k: o.param_groups[0] for k, o in brain.optimizers_dict.items()})

    monkeypatch.setattr(CTCBrain, "init_optimizers", spy)
    rates = ["--lr_head", "0.4", "--lr_fusion", "0.3", "--lr_encoder", "0.2", "--lr_norms", "0.1"]
    stop = ["--number_of_epochs", "1", "--warmup", "0", "--layers", "[2, 4]"]
    job(tmp_path, *rates, *stop, "--adapters", "{top_k: {layers: last:1}}", count=2)
    initial = {name: group["lr"] for name, group in seen.items()}
    assert initial.keys() == {"head", "fusion", "encoder", "norms"}
    base = {"head": 0.4, "fusion": 0.3, "encoder": 0.2, "norms": 0.1}
    shares = [initial[name] / base[name] for name in base]
    assert all(math.isclose(share, shares[0]) for share in shares)


def test_utterances_too_short_for_their_targets_are_dropped_by_name(job, tmp_path, caplog):
    units = CharUnits.from_texts(["ABC"])
    make_speech(tmp_path, 4)
    dataset = read_speech([tmp_path / "train.csv"], tmp_path)
    dataset.data["u1"]["duration"] = 0.01
    dataset.data["u2"]["wrd"] = "?!"
    with caplog.at_level("WARNING"):
        kept = drop_unalignable(dataset, units, lambda samples: samples // 320)
    assert kept.data_ids == ["u0", "u3"]
    assert "2 of 4" in caplog.text
    assert "u1 (0 frames, 2 needed)" in caplog.text and "u2 (no targets)" in caplog.text
    with pytest.raises(ValueError, match="none of 4 .*first: u0"):
        drop_unalignable(dataset, units, lambda samples: samples * 0)


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_no_search_loses_the_last_frame_of_a_shorter_utterance(decoding):
    units = CharUnits.from_texts(["AB"])
    brain = CTCBrain.__new__(CTCBrain)
    brain.units, brain.searcher = units, None
    searcher = functools.partial(CTCPrefixBeamSearcher, beam_size=10)
    brain.hparams = SimpleNamespace(decoding=decoding, beam_searcher=searcher)
    lm = train_ngram([tokens("AB", "char")], 2)
    fused = Fused(lm, "char", units, 0.0, 0.0, 16)
    for frames in range(4, 30):
        for count in range(3, frames + 1):
            log_probs = torch.full((2, frames, units.size), -9.0)
            log_probs[:, :, 0] = -0.01
            for frame, unit in ((0, "A"), (count - 1, "B")):
                log_probs[1, frame, 0] = -9.0
                log_probs[1, frame, units.encode(unit)[0]] = -0.01
            lengths = torch.tensor([frames, count])
            assert brain.decode(log_probs, lengths, Stage.TEST)[1] == "AB", (count, frames)
            if decoding == "beam" and frames % 9 == 5:
                assert fused(log_probs, relative_lengths(lengths, log_probs))[1] == "AB"


def test_ctc_is_finite_with_the_needed_frames_and_infinite_with_one_less():
    targets = [1, 2, 2, 2, 1]
    for spare, finite in ((0, True), (-1, False)):
        frames = needed_frames(targets) + spare
        loss = torch.nn.functional.ctc_loss(
            torch.zeros(frames, 1, 3).log_softmax(-1),
            torch.tensor([targets]),
            torch.tensor([frames]),
            torch.tensor([len(targets)]),
        )
        assert bool(loss.isfinite()) == finite


def test_the_lstm_is_computed_in_single_precision_under_autocast():
    torch.manual_seed(0)
    head, seen = BLSTMHead(6, 4).eval(), []
    for lstm in (*head.onward, *head.reverse):
        lstm.register_forward_hook(lambda module, given, found: seen.append(found[0]))
    features, lengths = torch.randn(2, 9, 6), torch.tensor([9, 4])
    head(features, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(features.bfloat16(), lengths).dtype == torch.bfloat16
        head(features, lengths)
    assert {one.dtype for one in seen} == {torch.float32}
    torch.testing.assert_close(seen[4:], seen[:2], rtol=0, atol=0)


def test_a_batch_whose_loss_is_no_number_changes_nothing(job, tmp_path, monkeypatch):
    objectives, steps = CTCBrain.compute_objectives, []

    def diverging(brain, predictions, batch, stage):
        steps.append(stage)
        loss = objectives(brain, predictions, batch, stage)
        return loss * math.nan if len(steps) == 2 and stage == Stage.TRAIN else loss

    monkeypatch.setattr(CTCBrain, "compute_objectives", diverging)
    job(tmp_path, "--layers", "[2, 4]", "--batch_seconds", "1")
    assert all(tensor.isfinite().all() for tensor in trained_tensors(tmp_path).values())


def test_batches_that_stay_far_below_their_size_are_told(job, tmp_path, caplog):
    job(tmp_path, "--number_of_epochs", "1", "--num_buckets", "20", count=40)
    assert "raise --num_buckets" not in caplog.text
    job(tmp_path / "big", "--number_of_epochs", "1", "--batch_seconds", "40", count=40)
    assert "batch_seconds=40 allows more: raise --num_buckets, now 2" in caplog.text


@pytest.mark.parametrize("head", [LinearHead, DNNHead, BLSTMHead])
def test_padding_does_not_change_what_a_head_gives(head):
    torch.manual_seed(0)
    head = head(6, 4).eval()
    features = torch.randn(2, 9, 6)
    lengths = torch.tensor([9, 4])
    together = head(features, lengths)
    assert together.shape == (2, 9, 4)
    alone = head(features[1:, :4], torch.tensor([4]))
    torch.testing.assert_close(together[1, :4], alone[0])


def test_masking_stays_within_the_utterance_and_the_asked_share():
    torch.manual_seed(0)
    masking = FeatureMasking(time_masks=1, time_width=0.5, width_masks=0)
    lengths = torch.tensor([100, 20] * 200)
    masked = masking(torch.ones(400, 100, 3), lengths) == 0
    frames = masked.all(-1)
    assert torch.equal(frames, masked.any(-1))
    assert not frames[1::2, 20:].any()
    assert frames[0::2].sum(1).max() == 50 and frames[1::2].sum(1).max() == 10
    assert frames[1::2, :20].any(0).all(), "every frame can be masked"
    in_width = FeatureMasking(time_masks=0, width_masks=1, width_share=0.25)
    bands = in_width(torch.ones(50, 4, 8), torch.full((50,), 4)) == 0
    assert torch.equal(bands.any(1), bands.all(1)) and bands[:, 0].sum(1).max() == 2


def test_masking_can_be_left_out(job, tmp_path):
    assert job(tmp_path, "--masking", "null", "--number_of_epochs", "1")["epochs"] == 1


def test_masking_is_off_in_evaluation():
    features = torch.ones(2, 50, 20)
    assert FeatureMasking().eval()(features, torch.tensor([50, 50])) is features


DISTRIBUTED = """
import json, os, sys
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from hff_modules import adapters
from hff_modules.brains import CTCBrain
from hff_modules.config import load_config
from hff_modules.data import CharUnits
from hff_modules.data.loading import add_ctc_items, read_speech

data, base = sys.argv[1:3]
hparams, run_opts = load_config(sys.argv[3:], base)
units = CharUnits.from_texts(["ABC"])
dataset = read_speech([data + "/train.csv"], data)
encoder = hparams["ssl_encoder"]
adapters.attach(encoder, "top_k", layers="last:1")
add_ctc_items(dataset, units, encoder.minimum_samples)
for module in encoder.modules():  # chance differs between processes
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
fusion = hparams["fusion"](num_states=len(encoder.layers), input_size=encoder.hidden_size)
head = hparams["head"](input_size=fusion.output_size, num_units=units.size)
modules = {"encoder": encoder, "fusion": fusion, "masking": hparams["masking"], "head": head}
hparams["sorting"] = "ascending"  # for SpeechBrain: batches in the order given
brain = CTCBrain(units, modules=modules, hparams=hparams, run_opts=run_opts)
world, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
# Unequal halves: utterances differ in number, in length and in targets.
halves = [[0, 4], [1, 2, 3], [5], [6, 7, 8]] * 2
batches = halves if world == 2 else [a + b for a, b in zip(halves[::2], halves[1::2])]
loader = brain.make_dataloader(
    dataset, sb.Stage.TRAIN, batch_sampler=batches, collate_fn=PaddedBatch
)
losses, fit_batch = [], brain.fit_batch
brain.fit_batch = lambda batch: losses.append(float(fit_batch(batch))) or torch.tensor(losses[-1])
brain.fit(hparams["epoch_counter"], loader)
frozen = {n for n, p in encoder.named_parameters() if not p.requires_grad}
ddp = brain.modules["encoder"]
outcome = {
    "losses": losses,
    "audio": brain.meter.audio_seconds,
    "weights": fusion.output.weight.tolist(),
    "wrapped": type(ddp).__name__,
    "frozen_left_out": frozen <= set(getattr(ddp, "parameters_to_ignore", [])),
}
brain.scores = lambda stage: {"cer": float(rank)}
brain.on_stage_end(sb.Stage.TEST, 0.0)
outcome["scores"] = brain.test_scores
with open(f"{data}/{world}-{rank}.json", "w") as file:
    json.dump(outcome, file)
"""


def test_two_processes_train_as_one_with_the_double_batch(encoder_folder, tmp_path, monkeypatch):
    make_speech(tmp_path, 9)
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    (tmp_path / "base.yaml").write_text("extends: base/ctc.yaml\ndataset: tones\n")
    options = ["--layers", "[2, 4]", "--lr_encoder", "0.01", "--checkpointer", "null"]
    options += ["--masking", "{time_masks: 0, width_masks: 0}", "--distributed_backend", "gloo"]
    command = [str(script), str(tmp_path), str(tmp_path / "base.yaml")]
    command += arguments(tmp_path / "out", encoder_folder, "fusion", *options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # What torchrun sets, without the time it takes to start.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(script))  # the one process, meanwhile
    for process in processes:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told[-3000:]
    one, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert len(one["losses"]) == 8 and first["losses"] == second["losses"]
    torch.testing.assert_close(first["losses"], one["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(
        torch.tensor(first["weights"]), torch.tensor(one["weights"]), rtol=1e-3, atol=1e-4
    )
    assert first["audio"] == pytest.approx(one["audio"])
    assert first["scores"] == second["scores"] == {"cer": 0.0}, "those of the main process"
    assert first["wrapped"] == "DistributedDataParallel" and first["frozen_left_out"]
