"""Which recordings are heard, whose voices are held out, what is skipped and noticed."""

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

import masked_speech
import numpy as np
import pytest
import soundfile
import speech_prepare
import worker_pool
from transformers import SeamlessM4TFeatureExtractor

from tests import corpora
from tests.bestrq.runs import RECIPE, arguments_for, prepared_parts, recipe_main, utterance


def _copied(speech, folder, pattern):
    folder.mkdir(exist_ok=True)
    for path in speech.glob(pattern):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("pattern", ["00-*", "0[01]-*"])
def test_of_few_long_voices_single_recordings_are_held_out(speech, tmp_path, caplog, pattern):
    source = _copied(speech, tmp_path / "source", pattern)
    with caplog.at_level(logging.INFO):
        report = speech_prepare.prepare_speech(
            source, tmp_path / "prepared", valid_seconds=4.5, workers=1
        )
    train, valid = prepared_parts(tmp_path / "prepared")
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
    train, valid = prepared_parts(tmp_path / "prepared")
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
    wav = utterance(np.random.default_rng(0))
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
    assert any("at work here; waiting for its end" in m for m in caplog.messages)


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
    recipe_main()(arguments_for(speech, tmp_path, max_steps=2, sources=speech))
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


def test_stored_log_mels_are_those_of_transformers(trained):
    features, _ = masked_speech.load_prepared(trained / "prepared", "train")
    line = (trained / "prepared" / "train.csv").read_text().splitlines()[1].split(",")
    wav, start, count = line[2], int(line[4]), int(line[5])
    extractor = SeamlessM4TFeatureExtractor(stride=4)
    expected = extractor(soundfile.read(wav)[0], sampling_rate=16000).input_features[0]
    assert len(expected) == count
    assert np.abs(expected - features[start : start + count]).max() < 0.01


def test_held_out_speakers_are_not_trained_on(trained):
    train, valid = ({who for _, who in part} for part in prepared_parts(trained / "prepared"))
    assert train and valid and not train & valid


def test_useless_files_are_skipped_by_name_and_counted(tmp_path, caplog):
    rng = np.random.default_rng(0)
    rate = 16000
    soundfile.write(tmp_path / "a-good.wav", utterance(rng), rate)
    soundfile.write(tmp_path / "b-good.wav", utterance(rng), rate)
    soundfile.write(tmp_path / "c-silent.wav", np.zeros(rate), rate)
    soundfile.write(tmp_path / "c-clipped.wav", np.clip(9 * utterance(rng), -1, 1), rate)
    soundfile.write(tmp_path / "c-short.flac", utterance(rng, 0.2), rate)
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
