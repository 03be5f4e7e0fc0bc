"""The built-in corpus: repeatable, disjoint, all there or not there."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import soundfile

from hff_modules.data import spoken
from hff_modules.data.espeak import resample
from hff_modules.data.manifest import read_rows, summarize_manifest

pytest.importorskip("espeakng_loader")
SMALL = {"train": 2, "dev": 1, "test": 1}
SIZES = {"train": 660, "dev": 54, "test": 90}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "spoken"
    spoken.prepare_spoken(folder, **SMALL)
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_manifests_describe_the_files_that_are_there(corpus):
    for split, count in SMALL.items():
        rows = read_rows(corpus / f"{split}.csv", corpus)
        assert len(rows) == count
        for row in rows.values():
            info = soundfile.info(row["wav"])
            assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
            assert info.duration == pytest.approx(row["duration"], abs=1e-4)
            assert re.fullmatch(r"[A-Z']+( [A-Z']+)*", row["wrd"])


def test_the_audio_is_speech_of_a_fitting_length_at_a_sane_level(corpus):
    for split in SMALL:
        for name, row in read_rows(corpus / f"{split}.csv", corpus).items():
            signal, _ = soundfile.read(row["wav"])
            rms = 20 * numpy.log10(numpy.sqrt(numpy.mean(signal**2)))
            assert -31 < rms < -19, name
            assert numpy.abs(signal).max() < 0.96, name
            assert 8 < len(row["wrd"]) / row["duration"] < 25, name  # characters per second
            power = numpy.abs(numpy.fft.rfft(signal)) ** 2
            band = slice(len(power) * 100 // 8000, len(power) * 4000 // 8000)
            assert power[band].sum() > 0.8 * power.sum(), name


def test_the_same_seed_gives_the_same_bytes_however_many_processes_speak(corpus, tmp_path):
    spoken.prepare_spoken(tmp_path / "again", num_workers=1, **SMALL)
    assert contents(tmp_path / "again") == contents(corpus)


def test_another_seed_gives_other_sentences_in_other_pitch(corpus):
    ours, others = spoken.plan(1234, SMALL), spoken.plan(4321, SMALL)
    assert [job["variant"] for job in ours] == [job["variant"] for job in others]
    assert [job["parameters"] for job in ours] != [job["parameters"] for job in others]
    assert [job["items"][0]["text"] for job in ours] != [job["items"][0]["text"] for job in others]


def test_voices_and_sentences_are_disjoint_and_voices_differ(corpus):
    voices, texts = {}, {}
    for job in spoken.plan(1234, SIZES):
        voices.setdefault(job["split"], set()).add((job["accent"], job["variant"]))
        texts.setdefault(job["split"], set()).update(item["text"] for item in job["items"])
    assert sum(map(len, voices.values())) >= 20
    variants = [variant for split in voices.values() for _, variant in split]
    assert len(set(variants)) == len(variants)
    for one, other in [("train", "dev"), ("train", "test"), ("dev", "test")]:
        assert not texts[one] & texts[other]
    settings = [
        (job["parameters"]["rate"], job["parameters"]["pitch"]) for job in spoken.plan(1234, SIZES)
    ]
    assert len(set(settings)) == len(settings)


def test_voices_speak_and_no_two_sound_alike(tmp_path):
    counts = {split: len(voices) for split, voices in spoken.VOICES.items()}
    jobs = spoken.plan(1234, counts)
    assert len(jobs) == sum(counts.values())
    jobs = jobs[::2]  # half of them, to stay fast
    signals = []
    for job in jobs:
        job["items"] = [{**job["items"][0], "text": "Tea.", "snr_db": 60, "level_db": -20}]
        job["items"][0]["path"] = str(tmp_path / f"{job['speaker']}.wav")
        assert spoken._speak(job)[0] > 2000
        signal, _ = soundfile.read(job["items"][0]["path"])
        signals.append(numpy.abs(numpy.fft.rfft(signal, 16000))[:4000])
    signals = numpy.stack(signals)
    signals /= numpy.linalg.norm(signals, axis=1, keepdims=True)
    likeness = signals @ signals.T - 2 * numpy.eye(len(jobs))
    assert likeness.max() < 0.95


def test_a_second_call_speaks_nothing(corpus, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    monkeypatch.setattr(spoken, "_speak", lambda job: pytest.fail("spoke again"))
    manifests = spoken.prepare_spoken(corpus, **SMALL)
    assert manifests == {split: corpus / f"{split}.csv" for split in SMALL}
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


@pytest.mark.parametrize("damage", ["no stamp", "no file", "cut file", "older version"])
def test_a_half_made_or_older_corpus_is_made_again(corpus, tmp_path, damage):
    folder = tmp_path / "spoken"
    whole = contents(corpus)
    shutil.copytree(corpus, folder)
    wav = next(folder.glob("wavs/*/*.wav"))
    stamp = folder / "corpus.json"
    if damage == "no stamp":
        stamp.unlink()
    elif damage == "no file":
        wav.unlink()
    elif damage == "cut file":
        wav.write_bytes(wav.read_bytes()[:1000])
    else:
        stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "version": 0}))
    spoken.prepare_spoken(folder, **SMALL)
    assert contents(folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["spoken"]


def test_a_failing_espeak_leaves_nothing_and_says_what_it_said(tmp_path, monkeypatch):
    monkeypatch.setitem(spoken.VOICES, "dev", (("en-us", "nobody"),))
    with pytest.raises(RuntimeError, match="(?s)en-us\\+nobody.*no voice variant 'nobody'"):
        spoken.prepare_spoken(tmp_path / "spoken", train=1, dev=1, test=1)
    assert list(tmp_path.iterdir()) == []


def test_espeak_speaks_from_a_package_in_a_deep_folder(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 120) / ("e" * 120)
    source = Path(importlib.util.find_spec("espeakng_loader").origin).parent
    names = shutil.ignore_patterns("*_dict")
    shutil.copytree(source, deep / "espeakng_loader", ignore=names)
    shutil.copy(source / "espeak-ng-data/en_dict", deep / "espeakng_loader/espeak-ng-data")
    monkeypatch.setenv("PYTHONPATH", str(deep))
    job = spoken.plan(1234, {"train": 1, "dev": 1, "test": 1})[0]
    job["items"][0]["path"] = str(tmp_path / "a.wav")
    assert spoken._speak(job)[0] > 16000


def test_a_folder_of_somebody_else_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds thesis\.tex"):
        spoken.prepare_spoken(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileExistsError, match="this is a file"):
        spoken.prepare_spoken(tmp_path / "thesis.tex", **SMALL)


def test_a_missing_espeakng_loader_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match="pip install espeakng-loader"):
        spoken.prepare_spoken(tmp_path / "spoken", **SMALL)


def test_a_split_without_utterances_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every split needs an utterance"):
        spoken.prepare_spoken(tmp_path / "spoken", train=4, dev=0, test=1)


def test_sentences_are_many_different_and_plain():
    sentences = spoken.read_sentences()
    assert len(sentences) == len({spoken.transcript(s) for s in sentences}) > 400
    assert not [s for s in sentences if re.search(r"[^A-Za-z',.? ]", s)]
    assert {c for s in sentences for c in spoken.transcript(s)} == set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ' "
    )


def test_resampling_keeps_a_tone_and_removes_what_the_new_rate_cannot_hold():
    time = numpy.arange(22050) / 22050
    low, high = numpy.sin(2 * numpy.pi * 500 * time), numpy.sin(2 * numpy.pi * 9000 * time)
    result = resample(low + high, 22050, 16000)
    expected = numpy.sin(2 * numpy.pi * 500 * numpy.arange(16000) / 16000)
    assert len(result) == 16000
    numpy.testing.assert_allclose(result, expected, atol=1e-9)


def test_the_summary_of_a_split_counts_its_voices(corpus):
    summary = summarize_manifest(corpus / "train.csv")
    assert (summary.utterances, summary.speakers) == (2, 2)
