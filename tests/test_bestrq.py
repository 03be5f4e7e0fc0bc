"""The pretraining recipe: it learns, continues, refuses, skips and reports."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.utils.checkpoints import DEFAULT_SAVE_HOOKS
from transformers import (
    AutoModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
)

from hff_modules.encoder import SSLEncoder
from tests import corpora

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "BEST-RQ"
sys.path.insert(0, str(RECIPE))

import masked_speech  # noqa: E402
import publish  # noqa: E402
import speech_prepare  # noqa: E402
import targets  # noqa: E402
import worker_pool  # noqa: E402

LICENCES = RECIPE / "licences.json"
TINY = {
    "num_layers": 2,
    "hidden_size": 48,
    "intermediate_size": 96,
    "codebooks": 1,
    "codes": 16,
    "batch_frames": 150,
    "warmup_steps": 5,
    "lr_encoder": 0.005,
    "lr_head": 0.01,
    "epoch_hours": 0.03,
    "valid_seconds": 16,
    "workers": 1,
}


def _recipe_main():
    return corpora.load_train(RECIPE).main


def _utterance(rng, seconds=2.0):
    """Sounds of four kinds in a fixed order with random lengths: masked ones can be guessed."""
    parts, kind = [], rng.integers(4)
    while sum(map(len, parts)) < seconds * 16000:
        time = np.arange(rng.integers(3000, 5000)) / 16000
        pitch = (250, 600, 1300, 2900)[kind % 4]
        parts.append(0.2 * np.sin(2 * np.pi * pitch * time) + 0.01 * rng.standard_normal(len(time)))
        kind += 1
    return np.concatenate(parts)[: int(seconds * 16000)].astype(np.float32)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Twelve speakers with four utterances of two seconds each, in three formats."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    for speaker in range(12):
        for number in range(4):
            ending = ("wav", "flac", "ogg")[number % 3]
            soundfile.write(folder / f"{speaker:02d}-{number}.{ending}", _utterance(rng), 16000)
    return folder


def _arguments(speech, folder, **changes):
    settings = TINY | {"sources": f"[{speech}]", "output_folder": f"{folder}/run"}
    settings |= {"prepared_folder": f"{folder}/prepared"} | changes
    given = [str(RECIPE / "hparams" / "clusters.yaml")]
    for key, value in settings.items():
        given += [f"--{key}", str(value)]
    return given


@pytest.fixture(scope="module")
def trained(speech, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    _recipe_main()(_arguments(speech, folder, max_steps=75))
    return folder


def _history(folder):
    return json.loads((folder / "run" / "encoder" / "training.json").read_text())["history"]


def test_a_short_pretraining_beats_the_most_frequent_code(trained):
    history = _history(trained)
    codes = np.load(trained / "run" / "codes.npy")
    share = np.bincount(codes[:, 0], minlength=16) / len(codes)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    last = history[-1]["valid"]
    assert last["masked_loss"] < history[0]["valid"]["masked_loss"]
    assert last["masked_loss"] < entropy
    assert last["masked_accuracy"] > share.max()


def test_a_run_goes_on_where_it_stopped(speech, trained):
    before = _history(trained)
    _recipe_main()(_arguments(speech, trained, max_steps=80))
    after = _history(trained)
    assert after[: len(before)] == before
    assert before[-1]["steps"] == 75 and after[-1]["steps"] == 80
    assert after[-1]["valid"]["masked_loss"] < before[0]["valid"]["masked_loss"]
    assert after[-1]["hours"] > before[-1]["hours"]


def test_a_run_whose_budget_is_spent_is_not_trained_further(speech, tmp_path):
    _recipe_main()(_arguments(speech, tmp_path, max_steps=4))
    before = _history(tmp_path)
    for steps in (4, 3):
        _recipe_main()(_arguments(speech, tmp_path, max_steps=steps))
    assert _history(tmp_path) == before and before[-1]["steps"] == 4


def test_in_one_process_the_epochs_take_all_parts_of_the_speech(speech, tmp_path, monkeypatch):
    heard, collate = [], masked_speech.SpeechSegments.collate

    def noted(segments, indices):
        heard.extend(indices if segments.part == "train" else [])
        return collate(segments, indices)

    monkeypatch.setattr(masked_speech.SpeechSegments, "collate", noted)
    _recipe_main()(_arguments(speech, tmp_path, max_steps=40, epoch_hours=0.007))
    with open(tmp_path / "prepared" / "train.csv") as table:
        assert len(set(heard)) == len(table.readlines()) - 1
    assert len(_history(tmp_path)) >= 3


def test_a_mistake_in_the_first_command_does_not_bind_the_second(speech, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a table"):
        _recipe_main()(_arguments(speech, tmp_path, max_steps=2, sources=f"[{speech}x]"))
    _recipe_main()(_arguments(speech, tmp_path, max_steps=2))


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
    _recipe_main()(_arguments(speech, tmp_path, max_steps=0))
    assert (tmp_path / "run" / "targets.json").exists()
    assert not (tmp_path / "run" / "encoder").exists()
    _recipe_main()(_arguments(speech, tmp_path, max_steps=2))
    assert _history(tmp_path)[-1]["steps"] == 2


def test_codes_of_other_speech_are_not_taken(speech, tmp_path):
    _recipe_main()(_arguments(speech, tmp_path, max_steps=2))
    other = {"prepared_folder": f"{tmp_path}/other", "valid_seconds": 8, "max_steps": 3}
    path = tmp_path / "run" / "settings.json"
    path.write_text(path.read_text().replace('"valid_seconds": 16', '"valid_seconds": 8'))
    text = path.read_text().replace(f"{tmp_path}/prepared", f"{tmp_path}/other")
    path.write_text(text)
    with pytest.raises(ValueError, match="targets.json is of other speech than .*other holds now"):
        _recipe_main()(_arguments(speech, tmp_path, **other))


def test_what_cannot_work_is_refused_before_the_recordings_are_read(speech, tmp_path, monkeypatch):
    monkeypatch.setattr(speech_prepare, "_process", lambda job: pytest.fail("has read"))
    small = tmp_path / "small"
    Wav2Vec2BertModel(_tiny_config(num_hidden_layers=2, hidden_size=48)).save_pretrained(small)
    states = {"objective": "states", "teacher": small, "teacher_layers": "[1]"}
    for changes, message in [
        ({"objective": "clusters"}, "objective='clusters': expected best_rq"),
        ({"codebooks": 4}, "codebooks=4.*at most three"),
        (states | {"teacher": "null"}, "teacher: .*expected the folder of an encoder"),
        (states | {"teacher_layers": "[3]"}, r"teacher_layers=\[3\]: .*small has 1 to 2"),
        (states | {"teacher_layers": 1}, "teacher_layers=1: expected a list"),
        (states | {"stride": 2}, "small: reads 320 values a frame, expected 160"),
        ({"init": small}, "init has intermediate_size=48, expected 96"),
        ({"hidden_size": 50}, "hidden_size=50: expected a multiple of the 4 attention heads"),
        ({"max_frames": 3}, "max_frames=3: expected no less than .*'frames': 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            _recipe_main()(_arguments(speech, tmp_path, **changes))
    (small / "config.json").write_text('{"model_type": "hubert"}')
    with pytest.raises(ValueError, match="init=.*expected a wav2vec2-bert, it is a hubert"):
        _recipe_main()(_arguments(speech, tmp_path, init=small))
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(speech / "00-0.wav", alone)
    with pytest.raises(ValueError, match="1 recordings; expected two at least"):
        speech_prepare.prepare_speech([alone], tmp_path / "prepared", workers=1)
    with pytest.raises(ValueError, match=r"sources=\[\]: 0 recordings"):
        speech_prepare.prepare_speech([], tmp_path / "prepared", workers=1)


def test_a_run_goes_on_after_a_kill_while_a_checkpoint_was_saved(speech, tmp_path, monkeypatch):
    _recipe_main()(_arguments(speech, tmp_path, max_steps=4))
    before = _history(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(DEFAULT_SAVE_HOOKS, masked_speech.Progress, killed)
        with pytest.raises(KeyboardInterrupt):
            _recipe_main()(_arguments(speech, tmp_path, max_steps=8))
    _recipe_main()(_arguments(speech, tmp_path, max_steps=8))
    assert _history(tmp_path)[:1] == before and _history(tmp_path)[-1]["steps"] == 8


def test_a_kill_between_the_last_checkpoint_and_the_export_loses_nothing(
    speech, tmp_path, monkeypatch
):
    def killed(*_):
        raise KeyboardInterrupt

    for steps in (4, 8):  # without an encoder, with an older one
        with monkeypatch.context() as patch:
            patch.setattr(masked_speech.Pretrainer, "export", killed)
            with pytest.raises(KeyboardInterrupt):
                _recipe_main()(_arguments(speech, tmp_path, max_steps=steps))
        _recipe_main()(_arguments(speech, tmp_path, max_steps=steps))
        assert _history(tmp_path)[-1]["steps"] == steps
    assert AutoModel.from_pretrained(tmp_path / "run" / "encoder").config.num_hidden_layers == 2


def test_a_run_goes_on_with_another_number_of_workers(speech, tmp_path):
    _recipe_main()(_arguments(speech, tmp_path, max_steps=2))
    _recipe_main()(_arguments(speech, tmp_path, max_steps=4, workers=2))
    assert _history(tmp_path)[-1]["steps"] == 4


def _copied(speech, folder, pattern):
    folder.mkdir(exist_ok=True)
    for path in speech.glob(pattern):
        shutil.copy(path, folder)
    return folder


def _prepared_parts(folder):
    """Columns wav and spk_id of both parts."""
    parts = []
    for part in ("train", "valid"):
        lines = (folder / f"{part}.csv").read_text().splitlines()[1:]
        parts.append([line.split(",")[2:4] for line in lines])
    return parts


@pytest.mark.parametrize("pattern", ["00-*", "0[01]-*"])
def test_of_few_long_voices_single_recordings_are_held_out(speech, tmp_path, caplog, pattern):
    source = _copied(speech, tmp_path / "source", pattern)
    with caplog.at_level(logging.INFO):
        report = speech_prepare.prepare_speech(
            source, tmp_path / "prepared", valid_seconds=4.5, workers=1
        )
    train, valid = _prepared_parts(tmp_path / "prepared")
    assert len(valid) == (2 if "1" in pattern else 1)  # 4.5 s, or a quarter of 8 s
    assert len(train) + len(valid) == report["files"] and report["held_out"] == "recordings"
    assert any("their voices are trained on, too" in m for m in caplog.messages)
    assert any("hours to train on" in m for m in caplog.messages)


def test_no_more_than_a_quarter_is_held_out(speech, tmp_path):
    report = speech_prepare.prepare_speech(
        speech, tmp_path / "prepared", valid_seconds=600, workers=1
    )
    hours = report["hours"]
    assert 0 < hours["valid"] < 0.3 * (hours["train"] + hours["valid"])
    train, valid = _prepared_parts(tmp_path / "prepared")
    assert not {speaker for _, speaker in train} & {speaker for _, speaker in valid}


def test_two_long_speakers_do_not_lose_one_of_them():
    hour = 90000
    rows = [(f"{who}-{n}.wav", who, n, hour) for who in "ab" for n in range(30)]
    rows += [(f"a-{n}.wav", "a", n, 5000) for n in range(60, 70)]
    held = speech_prepare._hold_out(rows, 15000, seed=0)
    assert sum(row[3] for row in held) == 15000


@pytest.mark.parametrize(
    "error", [ValueError("array is too big"), MemoryError(), PermissionError(13, "denied")]
)
def test_a_file_that_breaks_the_decoder_is_one_unreadable_file(
    speech, tmp_path, monkeypatch, error
):
    read = speech_prepare.read_audio

    def broken(path, rate):
        if path.endswith("00-2.ogg"):
            raise error
        return read(path, rate)

    monkeypatch.setattr(speech_prepare, "read_audio", broken)
    report = speech_prepare.prepare_speech([speech], tmp_path / "prepared", workers=1)
    assert report["skipped"] == {"unreadable": 1} and report["files"] == 47


def test_samples_beyond_any_scale_and_too_few_of_them_cost_one_file_each(speech, tmp_path, caplog):
    source = _copied(speech, tmp_path / "source", "0[01]-0.wav")
    wav = _utterance(np.random.default_rng(0))
    wav[9000] = 1e20
    soundfile.write(source / "mad.wav", wav, 16000, subtype="FLOAT")
    soundfile.write(source / "tiny.wav", wav[:879], 16000)
    with caplog.at_level(logging.WARNING):
        report = speech_prepare.prepare_speech(
            source, tmp_path / "prepared", workers=1, rules={"min_seconds": 0.01}
        )
    assert report["skipped"] == {"unreadable": 1, "too short": 1} and report["files"] == 2
    assert any("unreadable" in m and "mad.wav" in m for m in caplog.messages)
    features = np.fromfile(tmp_path / "prepared" / "features.f16", np.float16)
    assert np.isfinite(features).all()


def test_pieces_shorter_than_a_mask_are_counted_and_nothing_but_them_is_refused(trained, caplog):
    prepared, codes = trained / "prepared", trained / "run" / "codes.npy"
    mask = {"share": 0.5, "frames": 17}
    with caplog.at_level(logging.WARNING):
        segments = masked_speech.SpeechSegments(prepared, "valid", codes, 17, mask)
    number = caplog.records[-1].getMessage().split()[0]
    assert f"{number} of " in caplog.messages[-1] and "mask.frames=17 and left out" in caplog.text
    assert len(segments) and int(number) > 0
    with pytest.raises(ValueError, match="shorter than mask.frames=99: nothing is left"):
        masked_speech.SpeechSegments(prepared, "valid", codes, 100, mask | {"frames": 99})


def test_of_two_that_prepare_one_folder_the_second_waits(speech, tmp_path, monkeypatch, caplog):
    source, prepared = _copied(speech, tmp_path / "source", "0[0-2]-*"), tmp_path / "prepared"
    process, reports, done = speech_prepare._process, [], []

    def prepare():
        reports.append(speech_prepare.prepare_speech(source, prepared, workers=1))

    second = threading.Thread(target=prepare)

    def slow(job):
        done.append(job)
        if len(done) == 1:
            second.start()
            second.join(0.5)
        return process(job)

    monkeypatch.setattr(speech_prepare, "_process", slow)
    prepare()
    second.join()
    assert len(done) == 12 and reports[0] == reports[1] and reports[0]["files"] == 12
    assert any("another process prepares it" in m for m in caplog.messages)


def test_a_voice_has_one_name_whatever_lists_it(tmp_path):
    names = ["id1/v1/00001.wav", "id1/v2/00001.wav", "id2/v3/00001.wav", "id2/7-1.wav"]
    for name in names:
        corpora.write_audio(tmp_path / "vox" / "dev" / name, 0.02)
    vox, voices = str(tmp_path / "vox"), speech_prepare._voices
    found = voices(speech_prepare._list_all([vox, f"{vox}/dev/id2"]))
    expected = dict(zip(names, ["id1", "id1", "id2", "7"], strict=True))
    assert found == {f"{vox}/dev/{name}": f"{vox}/{who}" for name, who in expected.items()}

    (tmp_path / "vox" / "t.csv").write_text(f"wav,speaker\ndev/{names[3]},x\n")
    found = voices(speech_prepare._list_all([vox, f"{vox}/t.csv"]))
    assert found[f"{vox}/dev/{names[3]}"] == f"{vox}/x" and len(found) == 4

    for number, part in enumerate(("train", "other")):
        (tmp_path / f"{part}.tsv").write_text(f"client_id\tpath\nx\ta.mp3\ny\t{number}.mp3\n")
    found = voices(speech_prepare._list_all([f"{tmp_path}/{p}.tsv" for p in ("train", "other")]))
    expected = {"a.mp3": "x", "0.mp3": "y", "1.mp3": "y"}
    assert found == {f"{tmp_path}/{name}": f"{tmp_path}/{who}" for name, who in expected.items()}


def test_speech_prepared_before_speakers_were_named_otherwise_is_still_known(tmp_path):
    (tmp_path / "id1").mkdir()
    (tmp_path / "id1" / "00001.wav").write_bytes(b"12345")
    lines = f"{tmp_path}/id1/00001.wav\t{tmp_path}/00001\t5\n"
    expected = hashlib.sha256(lines.encode()).hexdigest()[:16]
    assert speech_prepare._fingerprint(speech_prepare._list_all([str(tmp_path)])) == expected


def test_new_and_changed_recordings_are_noticed(speech, tmp_path):
    source, prepared = _copied(speech, tmp_path / "source", "0[0-2]-*"), tmp_path / "prepared"
    (source / "table.csv").write_text("wav\n00-0.wav\n01-0.wav\nlater.wav\n")
    sources = [str(source), str(source / "table.csv")]

    def prepare():
        return speech_prepare.prepare_speech(sources, prepared, workers=1)

    assert prepare()["skipped"] == {"listed twice": 2, "missing": 1}
    assert prepare()["files"] == 12
    shutil.copy(speech / "03-0.wav", source)
    with pytest.raises(ValueError, match="prepared from 15 files, now there are 16"):
        prepare()
    (source / "03-0.wav").rename(source / "02-0.flac.wav")
    os.replace(source / "02-0.flac.wav", source / "02-0.wav")
    assert prepare()["files"] == 12
    soundfile.write(source / "02-0.wav", np.zeros(9999), 16000)
    with pytest.raises(ValueError, match="15 files, of which some have now another name"):
        prepare()
    shutil.copy(speech / "02-0.wav", source)
    prepare()
    os.rename(source, tmp_path / "gone")
    assert prepare()["files"] == 12  # what was prepared is all that is needed
    source.mkdir()
    assert prepare()["files"] == 12  # a mount point without its disk


def test_a_recording_that_was_missing_and_has_come_is_noticed(speech, tmp_path):
    table = _copied(speech, tmp_path / "source", "0[0-2]-*") / "table.csv"
    table.write_text("wav\n00-0.wav\n01-0.wav\nlater.wav\n")
    speech_prepare.prepare_speech(table, tmp_path / "prepared", workers=1)
    shutil.copy(speech / "03-0.wav", table.parent / "later.wav")
    with pytest.raises(ValueError, match="3 files, of which some .* missing then"):
        speech_prepare.prepare_speech(table, tmp_path / "prepared", workers=1)


def test_speech_prepared_by_an_earlier_version_is_used_with_a_warning(speech, tmp_path, caplog):
    source, prepared = _copied(speech, tmp_path / "source", "0[0-2]-*"), tmp_path / "prepared"
    report = speech_prepare.prepare_speech([source], prepared, workers=1)
    del report["settings"]["fingerprint"]
    (prepared / "prepared.json").write_text(json.dumps(report))
    shutil.copy(speech / "03-0.wav", source)
    assert speech_prepare.prepare_speech([source], prepared, workers=1) == report
    assert any("from 12 files and does not tell which; there are 13" in m for m in caplog.messages)


def test_links_to_folders_are_followed_and_hidden_files_left_out(speech, tmp_path):
    source, far = tmp_path / "source", _copied(speech, tmp_path / "far", "00-*.wav")
    (source / "deep").mkdir(parents=True)
    shutil.copy(speech / "01-0.wav", source / "deep")
    shutil.copy(speech / "01-0.wav", source / "._01-0.wav")
    (source / "linked").symlink_to(far)
    (far / "back").symlink_to(source)  # a circle
    found = [path for path, _ in speech_prepare.find_audio(source)]
    names = ["deep/01-0.wav", "linked/00-0.wav", "linked/00-3.wav"]
    assert found == [str(source / name) for name in names]


def test_one_source_needs_no_brackets(speech, tmp_path):
    _recipe_main()(_arguments(speech, tmp_path, max_steps=2, sources=speech))
    report = json.loads((tmp_path / "run" / "encoder" / "training.json").read_text())
    assert report["data"]["settings"]["sources"] == report["config"]["sources"] == [str(speech)]


def test_a_table_may_begin_with_a_bom_but_not_end_in_the_middle_of_a_line(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("wav,spk_id\na.wav,x\n", encoding="utf-8-sig")
    assert speech_prepare.find_audio(table) == [(str(tmp_path / "a.wav"), "x")]
    table = tmp_path / "train.tsv"
    table.write_text("client_id\tpath\nx\ta.mp3\ny")
    with pytest.raises(ValueError, match="train.tsv, line 3: expected 2 fields"):
        speech_prepare.find_audio(table)


def test_results_of_several_processes_come_in_order():
    assert list(worker_pool.in_order(abs, range(-20, 0), workers=2)) == list(range(20, 0, -1))


def test_a_killed_worker_ends_the_run():
    with pytest.raises(OSError, match="a worker process was killed .*fewer --workers"):
        list(worker_pool.in_order(os._exit, [1], workers=2))


def test_workers_end_with_a_parent_that_is_killed():
    job = "print('begun', flush=True) or __import__('time').sleep(60)"
    code = f"import worker_pool; list(worker_pool.in_order(eval, [{job!r}] * 2, 2))"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=RECIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout.readline() == b"begun\n"
    parent.kill()
    try:
        parent.communicate(timeout=20)  # until nobody has its output open
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


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
        _recipe_main()(_arguments(speech, trained, max_steps=0, **{key: now}))


def test_the_result_is_a_folder_that_transformers_and_the_encoder_load(trained):
    folder = trained / "run" / "encoder"
    assert (folder / "model.safetensors").stat().st_size < 1e6
    model = AutoModel.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2
    assert SeamlessM4TFeatureExtractor.from_pretrained(folder).stride == 4
    encoder = SSLEncoder(str(folder), layers="all")
    states, lengths = encoder(torch.randn(1, 16000), torch.ones(1))
    assert states.shape == (3, 1, int(lengths[0]), 48)


def test_a_published_encoder_names_the_licences_of_its_data(speech, trained, tmp_path):
    rounds, root, folder = [trained / "run" / "encoder"], speech.parent, tmp_path / "mine"
    with pytest.raises(ValueError, match=f"sets begins {speech.name}"):
        publish.publish(folder, rounds, root, json.loads(LICENCES.read_text()), "a core")
    with pytest.raises(ValueError, match="data_root: .* is not in"):
        publish.publish(folder, rounds, tmp_path, {}, "a core")
    assert not folder.exists()

    sets = [[speech.name, "Tones", "MIT"], [speech.name[:2], "Others", "CC0"]]
    own = {"licence": "mit", "sets": sets, "remarks": "None of it is speech."}
    publish.publish(folder, rounds, root, own, "a core")
    card = (folder / "README.md").read_text()
    assert f"| Tones: {speech.name} | MIT |" in card and "license: mit\n" in card
    assert card.endswith("\nNone of it is speech.\n") and "CC" not in card and "EmoDB" not in card
    assert str(root) not in (folder / "training.json").read_text() + card
    assert "hours were held out, by speaker, for the curves." in card
    assert (folder / "curves.png").stat().st_size > 0
    assert SSLEncoder(str(folder), layers=2).hidden_size == 48


def test_a_card_names_all_that_its_rounds_heard_and_claims_nothing_else(trained, tmp_path):
    def trained_on(name, init, **changes):
        folder = shutil.copytree(trained / "run" / "encoder", tmp_path / name)
        report = json.loads((folder / "training.json").read_text())
        report["config"] |= {"sources": [f"/data/{name}"], "init": init, "objective": "best_rq"}
        report["targets"] |= {"objective": "best_rq"}
        report["targets"]["learned_from"] = speech_prepare.learned_from(report["config"])
        report["data"] |= changes
        (folder / "training.json").write_text(json.dumps(report))
        return str(folder)

    first = trained_on("private", None, held_out="recordings")
    second = trained_on("open", first)
    other = trained_on("far", "maker/model", held_out=None)
    own = {"licence": "mit", "remarks": "", "sets": [["open", "Open", "MIT"]]}
    for rounds in ([second], [first, second]):  # the first one counts even if nobody names it
        with pytest.raises(ValueError, match="none of the sets begins private"):
            publish.publish(tmp_path / "card", rounds, "/data", own, "a core")
    own["sets"].append(["private", "Mine", "all rights reserved"])
    publish.publish(tmp_path / "card", [first, second], "/data", own, "a core")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| Mine: private | all rights reserved |" in card and "| Open: open | MIT |" in card
    assert "| 1 | fresh weights |" in card and "| 2 | round 1 |" in card
    assert "round 1: " in card and "held out, single recordings, for the curves" in card
    assert "cluster" not in card and str(tmp_path) not in card
    text = (tmp_path / "card" / "training.json").read_text()
    assert "learned_from" not in text and str(tmp_path) not in text

    own["sets"].append(["far", "Far", "MIT"])
    with pytest.raises(ValueError, match="maker/model is not in /data, and no set"):
        publish.publish(tmp_path / "card", [other], "/data", own, "a core")
    own["sets"].append(["maker/model", "A model", "Apache 2.0"])
    publish.publish(tmp_path / "card", [first, other], "/data", own, "a core")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| A model: maker/model | Apache" in card and "| Mine: private |" in card
    assert "| 2 | another encoder |" in card and "hours were held out for the curves" in card


def test_bf16_is_a_run_option(speech, trained, tmp_path, caplog):
    arguments = _arguments(speech, tmp_path, max_steps=3, precision="bf16")
    with caplog.at_level(logging.INFO):
        _recipe_main()(arguments + ["--prepared_folder", str(trained / "prepared")])
    assert any("training precision" in m and "bf16" in m for m in caplog.messages)
    losses = [row["train"]["masked_loss"] for row in _history(tmp_path)]
    assert np.isfinite(losses).all()


def test_stored_log_mels_are_those_of_transformers(trained):
    features, _ = masked_speech.load_prepared(trained / "prepared", "train")
    line = (trained / "prepared" / "train.csv").read_text().splitlines()[1].split(",")
    wav, start, count = line[2], int(line[4]), int(line[5])
    extractor = SeamlessM4TFeatureExtractor(stride=4)
    expected = extractor(soundfile.read(wav)[0], sampling_rate=16000).input_features[0]
    assert len(expected) == count
    assert np.abs(expected - features[start : start + count]).max() < 0.01


def test_held_out_speakers_are_not_trained_on(trained):
    train, valid = ({who for _, who in part} for part in _prepared_parts(trained / "prepared"))
    assert train and valid and not train & valid


def test_useless_files_are_skipped_by_name_and_counted(tmp_path, caplog):
    rng = np.random.default_rng(0)
    rate = 16000
    soundfile.write(tmp_path / "a-good.wav", _utterance(rng), rate)
    soundfile.write(tmp_path / "b-good.wav", _utterance(rng), rate)
    soundfile.write(tmp_path / "c-silent.wav", np.zeros(rate), rate)
    soundfile.write(tmp_path / "c-clipped.wav", np.clip(9 * _utterance(rng), -1, 1), rate)
    soundfile.write(tmp_path / "c-short.flac", _utterance(rng, 0.2), rate)
    (tmp_path / "c-broken.mp3").write_bytes(b"no audio" * 100)
    (tmp_path / "table.csv").write_text("wav,spk_id\na-good.wav,a\nnowhere.wav,b\n")
    with caplog.at_level(logging.WARNING):
        report = speech_prepare.prepare_speech(
            [str(tmp_path), str(tmp_path / "table.csv")], tmp_path / "prepared", workers=1
        )
    expected = {"silent": 1, "clipped": 1, "too short": 1, "unreadable": 1, "missing": 1}
    assert report["skipped"] == expected | {"listed twice": 1} and report["files"] == 2
    for reason, name in [
        ("silent", "c-silent.wav"),
        ("clipped", "c-clipped.wav"),
        ("too short", "c-short.flac"),
        ("unreadable", "c-broken.mp3"),
        ("missing", "nowhere.wav"),
    ]:
        assert any(reason in m and name in m for m in caplog.messages)


def test_prepared_speech_is_not_used_for_other_sources(speech, trained):
    with pytest.raises(ValueError, match="sources=.*prepared"):
        speech_prepare.prepare_speech(["/elsewhere"], trained / "prepared")


def test_a_collapsed_quantizer_is_reported(trained, tmp_path, caplog):
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    for name in ("prepared.json", "train.csv", "valid.csv"):
        (prepared / name).write_text((trained / "prepared" / name).read_text())
    features = np.memmap(trained / "prepared" / "features.f16", np.float16, mode="r")
    np.ones_like(features).tofile(prepared / "features.f16")
    settings = {"objective": "best_rq", "codebooks": 1, "codes": 64, "seed": 0, "sources": []}
    settings |= {"output_folder": str(tmp_path), "prepared_folder": str(prepared)}
    with caplog.at_level(logging.WARNING):
        masked_speech.make_codes(settings)
    assert any("collapsed: 1.6 %" in message for message in caplog.messages)
    assert json.loads((tmp_path / "targets.json").read_text())["codebooks"][0]["used"] == 1 / 64


def test_random_projection_codes_are_those_of_speechbrain():
    from speechbrain.nnet.quantisers import RandomProjectionQuantizer

    features = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float32)
    codes = targets.random_projection(features, codebooks=2, codes=32, seed=3)
    torch.manual_seed(3)
    for book in range(2):
        quantizer = RandomProjectionQuantizer(24, 16, 32)
        assert quantizer(torch.from_numpy(features)[None])[0].tolist() == codes[:, book].tolist()


def test_cepstral_views_do_not_look_across_utterances():
    features = np.random.default_rng(0).standard_normal((30, 320)).astype(np.float16)
    other = features.copy()
    other[20:] += 5
    bounds = [(0, 20), (20, 10)]
    views, others = (targets.cepstral_views(f, bounds)(0, 30) for f in (features, other))
    for view, changed in zip(views, others, strict=True):
        scale = (changed[0] / view[0])[None]
        np.testing.assert_allclose(view[:20] * scale, changed[:20], rtol=1e-3, atol=1e-4)


def test_codes_do_not_depend_on_the_size_of_blocks(monkeypatch):
    features = np.random.default_rng(0).standard_normal((300, 320)).astype(np.float16)
    bounds = [(0, 5), (5, 100), (105, 1), (106, 194)]
    read = []

    class OnDisk:
        def __len__(self):
            return len(features)

        def __getitem__(self, span):
            read.append(len(features[span]))
            return features[span]

    def codes():
        views_at = targets.cepstral_views(OnDisk(), bounds)
        return targets.cluster(views_at, 300, 4, sample=200)

    expected = codes()
    projected = targets.random_projection(features, 2, 16)
    read.clear()
    monkeypatch.setattr(targets, "BLOCK", 7)
    assert (codes() == expected).mean() > 0.99
    assert (targets.random_projection(features, 2, 16) == projected).all()
    assert max(read) <= 7 + 4  # memory does not grow with the hours


def test_clusters_of_a_sample_name_all_frames():
    points = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    codes = targets.cluster(lambda a, b: [points[a:b], points[a:b, :1]], 50, 4, sample=20, seed=1)
    drawn = np.random.default_rng(1).permutation(50)[:20]
    for book, view in enumerate([points, points[:, :1]]):
        view = torch.from_numpy(view)
        centres = targets.kmeans(view[drawn], 4, seed=1)
        assert targets.assign(view, centres).tolist() == codes[:, book].tolist()


def test_teacher_states_are_those_of_each_utterance_or_piece_of_it_alone(tmp_path):
    model = Wav2Vec2BertModel(_tiny_config(num_hidden_layers=3)).eval()
    model.save_pretrained(tmp_path)
    features = np.memmap(tmp_path / "features", np.float16, mode="w+", shape=(30, 320))
    features[:] = np.random.default_rng(0).standard_normal((30, 320))
    bounds = [(0, 20), (20, 10)]
    states = targets.states_of(
        str(tmp_path), features, bounds, [1, 2], tmp_path / "s", max_frames=12, workers=1
    )
    for start, stop in ((0, 10), (10, 20), (20, 30)):
        with torch.no_grad():
            inputs = torch.from_numpy(features[start:stop].astype(np.float32))[None]
            alone = model(inputs, output_hidden_states=True).hidden_states
        for layer in (1, 2):
            np.testing.assert_allclose(states[layer - 1, start:stop], alone[layer][0], atol=5e-3)


def test_a_disk_too_full_for_states_is_said_before_they_are_made(tmp_path, monkeypatch):
    Wav2Vec2BertModel(_tiny_config(num_hidden_layers=1)).save_pretrained(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="GB for the teacher's states .No space.*states.f16"):
        path = tmp_path / "states.f16"
        targets.states_of(str(tmp_path), np.zeros((9, 320)), [(0, 9)], [1], path, 9, workers=1)
    assert not path.exists()


def test_an_epoch_has_its_hours_at_any_stride():
    class Segments(list):
        segments = [(0, 100)] * 360

    given, parts = Segments(Segments.segments), []
    for stride in (2, 4):
        hparams = {"epoch_hours": 0.1, "seed": 0, "stride": stride}
        parts.append(masked_speech.sampler(given, 1000, hparams).parts)
    assert parts == [2, 4]


def test_a_second_round_predicts_clusters_of_the_first_ones_states(speech, trained, tmp_path):
    changes = {"objective": "cepstra+states", "codebooks": 3, "teacher_layers": "[1, 2]"}
    changes |= {"teacher": trained / "run" / "encoder", "init": trained / "run" / "encoder"}
    prepared = {"prepared_folder": trained / "prepared", "max_frames": 20, "max_steps": 2}
    _recipe_main()(_arguments(speech, tmp_path, **changes, **prepared))
    codes = np.load(tmp_path / "run" / "codes.npy")
    assert codes.shape[1] == 3 and not (tmp_path / "run" / "states.f16").exists()
    assert (codes[:, 0] == np.load(trained / "run" / "codes.npy")[:, 0]).all()  # the cepstra's
    assert _history(tmp_path)[-1]["steps"] == 2


def test_attention_starts_with_heads_that_look_ahead_and_around():
    sides = {"left_max_position_embeddings": 16, "right_max_position_embeddings": 16}
    config = _tiny_config(
        num_hidden_layers=1, position_embeddings_type="relative_key", hidden_size=64, **sides
    )
    model = Wav2Vec2BertModel(config).eval()
    masked_speech.start_with_local_attention(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(torch.randn(1, 40, 320), output_attentions=True).attentions[0][0]
    away = torch.arange(40)[None] - torch.arange(40)[:, None]
    looked = (attention * away)[:, 10:30].sum(-1).mean(-1)
    assert 1 < looked[0] < 3 and 3 < looked[1] < 6 and -2 < looked[2] < 2


def _tiny_config(**changes):
    shape = {"hidden_size": 32, "output_hidden_size": 32, "intermediate_size": 48}
    shape |= {"num_attention_heads": 4, "feature_projection_input_dim": 320}
    shape |= {"position_embeddings_type": "rotary", "mask_time_prob": 0.0, "layerdrop": 0.0}
    return Wav2Vec2BertConfig(**shape | changes)


def test_a_grown_encoder_gives_the_same_output_as_the_small_one():
    torch.manual_seed(0)
    small = Wav2Vec2BertModel(_tiny_config(num_hidden_layers=2)).eval()
    for param in small.parameters():  # as after training: scales and shifts too
        torch.nn.init.normal_(param, std=0.3)
    large = Wav2Vec2BertModel(_tiny_config(num_hidden_layers=6)).eval()
    masked_speech.start_as_identity(large)
    masked_speech.grow_from(small, large)
    inputs = torch.randn(2, 9, 320)
    with torch.no_grad():
        expected = small(inputs).last_hidden_state
        assert expected.std() > 0.1
        torch.testing.assert_close(large(inputs).last_hidden_state, expected, rtol=1e-3, atol=1e-3)


def test_growing_to_a_depth_that_is_no_multiple_is_refused():
    small = Wav2Vec2BertModel(_tiny_config(num_hidden_layers=2))
    large = Wav2Vec2BertModel(_tiny_config(num_hidden_layers=3))
    with pytest.raises(ValueError, match="2 blocks.*3"):
        masked_speech.grow_from(small, large)


def test_two_processes_train_one_encoder(speech, trained, tmp_path):
    arguments = _arguments(speech, tmp_path, max_steps=3)
    arguments += ["--prepared_folder", str(trained / "prepared")]
    corpora.in_two_processes(RECIPE / "train.py", arguments)
    assert _history(tmp_path)[-1]["steps"] == 3


def test_position_scores_are_those_of_an_embedding_for_every_pair_of_frames():
    shape = {"position_embeddings_type": "relative_key", "left_max_position_embeddings": 3}
    model = Wav2Vec2BertModel(_tiny_config(num_hidden_layers=1, **shape))
    attention = model.encoder.layers[0].self_attn
    query = torch.randn(2, 4, 15, 8)
    pairs = (torch.arange(15)[None] - torch.arange(15)[:, None]).clamp(-3, 8) + 3
    embedded = attention.distance_embedding(pairs)
    expected = torch.einsum("bhld,lrd->bhlr", query, embedded) * attention.scaling
    torch.testing.assert_close(
        masked_speech.relative_key_scores(attention, query, query)[1], expected
    )
