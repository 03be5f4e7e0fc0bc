"""The pretraining command: it learns, continues, refuses and exports."""

import json
import logging
import os
import shutil

import masked_speech
import numpy as np
import pytest
import speech_prepare
import torch
from speechbrain.utils.checkpoints import DEFAULT_SAVE_HOOKS
from transformers import AutoModel, SeamlessM4TFeatureExtractor, Wav2Vec2BertModel

from hff_modules.encoder import SSLEncoder
from hff_modules.files import locked
from tests import corpora
from tests.bestrq.runs import RECIPE, arguments_for, history_of, recipe_main, tiny_config


def test_a_short_pretraining_beats_the_most_frequent_code(trained):
    history = history_of(trained)
    codes = np.load(trained / "run" / "codes.npy")
    share = np.bincount(codes[:, 0], minlength=16) / len(codes)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    last = history[-1]["valid"]
    assert last["masked_loss"] < history[0]["valid"]["masked_loss"]
    assert last["masked_loss"] < entropy
    assert last["masked_accuracy"] > share.max()


def test_a_run_goes_on_where_it_stopped(speech, trained):
    before = history_of(trained)
    recipe_main()(arguments_for(speech, trained, max_steps=80))
    after = history_of(trained)
    assert after[: len(before)] == before
    assert before[-1]["steps"] == 75 and after[-1]["steps"] == 80
    assert after[-1]["valid"]["masked_loss"] < before[0]["valid"]["masked_loss"]
    assert after[-1]["hours"] > before[-1]["hours"]


def test_a_run_whose_budget_is_spent_is_not_trained_further(speech, tmp_path):
    recipe_main()(arguments_for(speech, tmp_path, max_steps=4))
    before = history_of(tmp_path)
    for steps in (4, 3):
        recipe_main()(arguments_for(speech, tmp_path, max_steps=steps))
    assert history_of(tmp_path) == before and before[-1]["steps"] == 4


def test_in_one_process_the_epochs_take_all_parts_of_the_speech(speech, tmp_path, monkeypatch):
    heard, collate = [], masked_speech.SpeechSegments.collate

    def noted(segments, indices):
        heard.extend(indices if segments.part == "train" else [])
        return collate(segments, indices)

    monkeypatch.setattr(masked_speech.SpeechSegments, "collate", noted)
    recipe_main()(arguments_for(speech, tmp_path, max_steps=40, epoch_hours=0.007))
    with open(tmp_path / "prepared" / "train.csv") as table:
        assert len(set(heard)) == len(table.readlines()) - 1
    assert len(history_of(tmp_path)) >= 3


def test_a_mistake_in_the_first_command_does_not_bind_the_second(speech, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a table"):
        recipe_main()(arguments_for(speech, tmp_path, max_steps=2, sources=f"[{speech}x]"))
    recipe_main()(arguments_for(speech, tmp_path, max_steps=2))


def test_of_two_runs_in_one_folder_the_second_is_refused(speech, tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run" / ".lock"):
        with pytest.raises(BlockingIOError, match="run: another process is at work here"):
            recipe_main()(arguments_for(speech, tmp_path, max_steps=0))
    assert not (tmp_path / "prepared").exists()


def test_settings_bind_as_soon_as_there_is_a_checkpoint_or_targets(tmp_path):
    path = tmp_path / "settings.json"
    train = corpora.load_train(RECIPE)
    train.check_settings(path, {"seed": 1}, [])
    train.check_settings(path, {"seed": 2}, [])
    (tmp_path / "save" / "CKPT+1").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a run with seed=2, now it is 3"):
        train.check_settings(path, {"seed": 3}, [])
    train.check_settings(path, {"seed": 2, "precision": "fp32"}, [])  # new to a run begun earlier
    with pytest.raises(ValueError, match="precision='fp32', now it is 'bf16'"):
        train.check_settings(path, {"seed": 2, "precision": "bf16"}, [])
    path.write_text('{"seed": ')
    with pytest.raises(ValueError, match="settings.json is damaged .*remove it if"):
        train.check_settings(path, {"seed": 2}, [])


def test_settings_are_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    train = corpora.load_train(RECIPE)
    train.check_settings(path, {"seed": 1}, [])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        train.check_settings(path, {"seed": 2}, [])
    assert json.loads(path.read_text()) == {"seed": 1}


def test_without_steps_speech_and_targets_are_prepared_and_nothing_is_trained(speech, tmp_path):
    recipe_main()(arguments_for(speech, tmp_path, max_steps=0))
    assert (tmp_path / "run" / "targets.json").exists()
    assert not (tmp_path / "run" / "encoder").exists()
    recipe_main()(arguments_for(speech, tmp_path, max_steps=2))
    assert history_of(tmp_path)[-1]["steps"] == 2


def test_codes_of_other_speech_are_not_taken(speech, tmp_path):
    recipe_main()(arguments_for(speech, tmp_path, max_steps=2))
    other = {"prepared_folder": f"{tmp_path}/other", "valid_seconds": 8, "max_steps": 3}
    path = tmp_path / "run" / "settings.json"
    path.write_text(path.read_text().replace('"valid_seconds": 16', '"valid_seconds": 8'))
    text = path.read_text().replace(f"{tmp_path}/prepared", f"{tmp_path}/other")
    path.write_text(text)
    with pytest.raises(ValueError, match="targets.json is of other speech than .*other holds now"):
        recipe_main()(arguments_for(speech, tmp_path, **other))


def test_what_cannot_work_is_refused_before_the_recordings_are_read(speech, tmp_path, monkeypatch):
    monkeypatch.setattr(speech_prepare, "_process", lambda job: pytest.fail("has read"))
    small = tmp_path / "small"
    Wav2Vec2BertModel(tiny_config(num_hidden_layers=2, hidden_size=48)).save_pretrained(small)
    states = {"objective": "states", "teacher": small, "teacher_layers": "[1]"}
    for changes, message in [
        ({"objective": "clusters"}, "objective='clusters': expected best_rq"),
        ({"codebooks": 4}, "codebooks=4.*at most three"),
        (states | {"teacher": "null"}, "teacher: .*expected the folder of an encoder"),
        (states | {"teacher": "r1/of/before"}, "teacher=r1/of/before: there is no encoder, of an"),
        (states | {"teacher_layers": "[3]"}, r"teacher_layers=\[3\]: .*small has 1 to 2"),
        (states | {"teacher_layers": 1}, "teacher_layers=1: expected a list"),
        (states | {"stride": 2}, "small: reads 320 values a frame, expected 160"),
        ({"init": small}, "init has intermediate_size=48, expected 96"),
        ({"hidden_size": 50}, "hidden_size=50: expected a multiple of the 4 attention heads"),
        ({"warp": 1}, "warp=1: expected 0 to below 1"),
        ({"bands": "{count: 1, width: 90}"}, "bands=.*'width': 90.*0 to 80 mels"),
        ({"dropout": 1.5}, "dropout=1.5: expected 0 to below 1"),
        ({"max_frames": 3}, "max_frames=3: expected no less than .*'frames': 4"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            recipe_main()(arguments_for(speech, tmp_path, **changes))
    (small / "config.json").write_text('{"model_type": "hubert"}')
    with pytest.raises(ValueError, match="init=.*expected a wav2vec2-bert, it is a hubert"):
        recipe_main()(arguments_for(speech, tmp_path, init=small))
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(speech / "00-0.wav", alone)
    with pytest.raises(ValueError, match="1 recordings; expected two at least"):
        speech_prepare.prepare_speech([alone], tmp_path / "prepared", workers=1)
    with pytest.raises(ValueError, match=r"sources=\[\]: 0 recordings"):
        speech_prepare.prepare_speech([], tmp_path / "prepared", workers=1)


def test_a_run_goes_on_after_a_kill_while_a_checkpoint_was_saved(speech, tmp_path, monkeypatch):
    recipe_main()(arguments_for(speech, tmp_path, max_steps=4))
    before = history_of(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(DEFAULT_SAVE_HOOKS, masked_speech.Progress, killed)
        with pytest.raises(KeyboardInterrupt):
            recipe_main()(arguments_for(speech, tmp_path, max_steps=8))
    recipe_main()(arguments_for(speech, tmp_path, max_steps=8))
    assert history_of(tmp_path)[:1] == before and history_of(tmp_path)[-1]["steps"] == 8


def test_a_kill_between_the_last_checkpoint_and_the_export_loses_nothing(
    speech, tmp_path, monkeypatch
):
    def killed(*_):
        raise KeyboardInterrupt

    for steps in (4, 8):  # without an encoder, with an older one
        with monkeypatch.context() as patch:
            patch.setattr(masked_speech.Pretrainer, "export", killed)
            with pytest.raises(KeyboardInterrupt):
                recipe_main()(arguments_for(speech, tmp_path, max_steps=steps))
        recipe_main()(arguments_for(speech, tmp_path, max_steps=steps))
        assert history_of(tmp_path)[-1]["steps"] == steps
    assert AutoModel.from_pretrained(tmp_path / "run" / "encoder").config.num_hidden_layers == 2


def test_a_run_goes_on_with_another_number_of_workers(speech, tmp_path):
    recipe_main()(arguments_for(speech, tmp_path, max_steps=2))
    recipe_main()(arguments_for(speech, tmp_path, max_steps=4, workers=2))
    assert history_of(tmp_path)[-1]["steps"] == 4


@pytest.mark.parametrize(
    "key, before, now",
    [
        ("lr_encoder", "0.005", 0.1),
        ("precision", "'fp32'", "bf16"),
        ("grad_accumulation_factor", "1", 2),
    ],
)
def test_a_run_is_not_continued_with_another_configuration(speech, trained, key, before, now):
    with pytest.raises(ValueError, match=f"{key}={before}.*{now}.*output_folder"):
        recipe_main()(arguments_for(speech, trained, max_steps=0, **{key: now}))


def test_the_result_is_a_folder_that_transformers_and_the_encoder_load(trained):
    folder = trained / "run" / "encoder"
    assert (folder / "model.safetensors").stat().st_size < 1e6
    model = AutoModel.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2
    assert SeamlessM4TFeatureExtractor.from_pretrained(folder).stride == 4
    encoder = SSLEncoder(str(folder), layers="all")
    states, lengths = encoder(torch.randn(1, 16000), torch.ones(1))
    assert states.shape == (3, 1, int(lengths[0]), 48)


def test_bf16_is_a_run_option(speech, trained, tmp_path, caplog):
    arguments = arguments_for(speech, tmp_path, max_steps=3, precision="bf16")
    with caplog.at_level(logging.INFO):
        recipe_main()(arguments + ["--prepared_folder", str(trained / "prepared")])
    assert any("training precision" in m and "bf16" in m for m in caplog.messages)
    losses = [row["train"]["masked_loss"] for row in history_of(tmp_path)]
    assert np.isfinite(losses).all()


def test_a_second_round_predicts_clusters_of_the_first_ones_states(speech, trained, tmp_path):
    changes = {"objective": "cepstra+states", "codebooks": 3, "teacher_layers": "[1, 2]"}
    changes |= {"teacher": trained / "run" / "encoder", "init": trained / "run" / "encoder"}
    prepared = {"prepared_folder": trained / "prepared", "max_frames": 20, "max_steps": 2}
    recipe_main()(arguments_for(speech, tmp_path, **changes, **prepared))
    codes = np.load(tmp_path / "run" / "codes.npy")
    assert codes.shape[1] == 3 and not (tmp_path / "run" / "states.f16").exists()
    assert (codes[:, 0] == np.load(trained / "run" / "codes.npy")[:, 0]).all()  # the cepstra's
    assert history_of(tmp_path)[-1]["steps"] == 2


def test_two_processes_train_one_encoder(speech, trained, tmp_path):
    arguments = arguments_for(speech, tmp_path, max_steps=3)
    arguments += ["--prepared_folder", str(trained / "prepared")]
    corpora.in_two_processes(RECIPE / "train.py", arguments)
    assert history_of(tmp_path)[-1]["steps"] == 3
