"""LibriSpeech preparation on small folders of the same shape."""

import csv
import logging
import sys
from pathlib import Path

import numpy
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes/LibriSpeech/ASR"))
import librispeech_prepare  # noqa: E402
from librispeech_prepare import (  # noqa: E402
    check_splits,
    choose_subset,
    prepare_librispeech,
)


def add_chapter(folder, speaker, chapter, count=2, ending="flac", seconds=0.2):
    chapter_folder = folder / speaker / chapter
    chapter_folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        name = f"{speaker}-{chapter}-{number:04d}"
        options = {"format": "OGG", "subtype": "OPUS"} if ending == "opus" else {}
        samples = numpy.zeros(int(16000 * seconds))
        soundfile.write(chapter_folder / f"{name}.{ending}", samples, 16000, **options)
        lines.append(f"{name} WORDS OF {name.replace('-', ' ')}\n")
    (chapter_folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return chapter_folder


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "LibriSpeech"
    for speaker, chapter, ending in [("19", "198", "flac"), ("26", "495", "wav")]:
        add_chapter(folder / "train-clean-5", speaker, chapter, ending=ending)
    add_chapter(folder / "dev-mini", "84", "121", ending="opus", count=3)
    (folder / "SPEAKERS.TXT").write_text("; ID |SEX\n")
    return folder


@pytest.fixture
def save(tmp_path):
    return tmp_path / "save"


def test_each_split_gets_a_manifest_with_relative_paths_and_words_as_written(data, save):
    manifests = prepare_librispeech(data, save, ["train-clean-5", "dev-mini"])
    assert manifests == {
        "train-clean-5": save / "train-clean-5.csv",
        "dev-mini": save / "dev-mini.csv",
    }
    assert read(manifests["train-clean-5"])[3] == {
        "ID": "26-495-0001",
        "duration": "0.2000",
        "wav": "$data_root/train-clean-5/26/495/26-495-0001.wav",
        "spk_id": "26",
        "wrd": "WORDS OF 26 495 0001",
    }
    rows = read(manifests["dev-mini"])
    assert [row["ID"] for row in rows] == ["84-121-0000", "84-121-0001", "84-121-0002"]
    assert all(row["wav"].endswith(".opus") for row in rows)
    assert [float(row["duration"]) for row in rows] == pytest.approx([0.2] * 3, abs=0.01)
    assert str(data) not in manifests["dev-mini"].read_text()


def test_manifests_that_are_up_to_date_stay_and_others_are_made_again(data, save, tmp_path):
    def made(folder, splits=("dev-mini",), **options):
        path = prepare_librispeech(folder, save, splits, **options)["dev-mini"]
        return path.stat().st_ino  # every writing is a new file

    first = made(data)
    assert made(data) == first
    assert made(data, splits=["train-clean-5", "dev-mini"]) == first
    moved = data.rename(tmp_path / "moved")
    second = made(moved)
    assert second != first
    third = made(moved, max_bad_share=0.5)
    assert third != second
    assert made(moved, max_bad_share=0.5, redo=True) != third


def test_data_that_has_come_or_been_corrected_since_is_noticed(data, save):
    first = len(read(prepare_librispeech(data, save, ["dev-mini"])["dev-mini"]))
    add_chapter(data / "dev-mini", "84", "999", ending="opus", count=1)
    assert len(read(prepare_librispeech(data, save, ["dev-mini"])["dev-mini"])) == first + 1
    transcript = next((data / "dev-mini/84/121").glob("*.trans.txt"))
    transcript.write_text(transcript.read_text().replace("WORDS", "CORRECTED"))
    rows = read(prepare_librispeech(data, save, ["dev-mini"])["dev-mini"])
    assert rows[0]["wrd"].startswith("CORRECTED OF")


def test_splits_that_share_recordings_are_refused_and_shared_speakers_named(data, save, caplog):
    add_chapter(data / "more", "84", "5", count=1)
    manifests = prepare_librispeech(data, save, ["train-clean-5", "dev-mini", "more"])
    check_splits(manifests, ["train-clean-5"], ["dev-mini", "more"])
    assert "in train, too" not in caplog.text
    check_splits(manifests, ["more"], ["dev-mini"])
    assert "dev-mini: 1 speakers (84) are in train, too" in caplog.text
    with pytest.raises(
        ValueError, match="dev-mini: 3 of its recordings are in more, dev-mini, too"
    ):
        check_splits(manifests, ["more", "dev-mini"], ["dev-mini"])


def test_a_manifest_whose_writing_was_interrupted_is_made_again(data, save, monkeypatch):
    path = prepare_librispeech(data, save, ["dev-mini"])["dev-mini"]
    before = path.read_bytes()

    def killed(path, rows):
        path.write_text("ID,dur")
        raise KeyboardInterrupt

    monkeypatch.setattr(librispeech_prepare, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_librispeech(data, save, ["dev-mini"], redo=True)
    monkeypatch.undo()
    prepare_librispeech(data, save, ["dev-mini"])
    assert path.read_bytes() == before


@pytest.mark.parametrize("inside", ["", "librispeech_finetuning"])
def test_libri_light_lists_are_the_unions_that_its_paper_defines(tmp_path, save, inside):
    root = tmp_path / "data" / inside
    for part in range(6):
        kind = "clean" if part % 2 else "other"
        add_chapter(root / "1h" / str(part) / kind, str(10 + part), "1", count=1)
    add_chapter(root / "9h" / "clean", "05", "1", count=2)
    # The lists come with the transcripts of whole chapters.
    with open(root / "9h/clean/05/1/05-1.trans.txt", "a") as file:
        file.write("05-1-0007 NOT IN THE LIST\n")
    manifests = prepare_librispeech(tmp_path / "data", save, ["10h", "1h", "10min"])
    ids = {split: [row["ID"] for row in read(path)] for split, path in manifests.items()}
    assert ids["10min"] == ["10-1-0000"]
    assert ids["1h"] == [f"{10 + part}-1-0000" for part in range(6)]
    assert ids["10h"] == ["05-1-0000", "05-1-0001", *ids["1h"]]  # sorted
    first = read(manifests["10min"])[0]["wav"]
    assert first.replace("$data_root", str(tmp_path / "data")) == str(
        root / "1h/0/other/10/1/10-1-0000.flac"
    )


def test_a_subset_takes_speakers_and_chapters_in_turn_and_is_always_the_same():
    rows = [
        {"ID": f"{speaker}-{chapter}-{number:04d}", "spk_id": speaker, "duration": 10.0}
        for speaker in "abc"
        for chapter in (1, 2)
        for number in range(50)
    ]
    chosen = choose_subset(rows, hours=120 / 3600)
    assert [row["ID"] for row in chosen] == [
        f"{speaker}-{chapter}-{number:04d}"
        for speaker in "abc"
        for chapter in (1, 2)
        for number in range(2)
    ]
    assert choose_subset(rows[::-1], hours=120 / 3600) == chosen[::-1]
    assert choose_subset(rows, hours=100) == rows


def test_a_subset_of_a_split_has_its_own_file_and_about_the_hours_asked_for(data, save):
    whole = prepare_librispeech(data, save, ["train-clean-5"])["train-clean-5"]
    part = prepare_librispeech(data, save, ["train-clean-5"], {"train-clean-5": 0.0001})
    part = part["train-clean-5"]
    assert (whole.name, part.name) == ("train-clean-5.csv", "train-clean-5-0.0001h.csv")
    assert len(read(whole)) == 4
    assert [row["ID"] for row in read(part)] == ["19-198-0000", "26-495-0000"]


def test_missing_and_empty_folders_say_what_was_looked_for_and_what_is_there(data, save, tmp_path):
    with pytest.raises(FileNotFoundError, match="data_folder .*/nowhere: no such folder"):
        prepare_librispeech(tmp_path / "nowhere", save, ["dev-mini"])
    with pytest.raises(
        FileNotFoundError,
        match="looked for test-clean .* holds SPEAKERS.TXT, dev-mini, train-clean-5",
    ):
        prepare_librispeech(data, save, ["test-clean"])
    with pytest.raises(FileNotFoundError, match="librispeech_finetuning/1h and .*/9h"):
        prepare_librispeech(data, save, ["10h"])
    (data / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"/empty: no speaker/chapter/\*.trans.txt .*not"):
        prepare_librispeech(data, save, ["empty"])
    assert not save.exists() or not list(save.iterdir())


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("no audio", r"transcript without audio: 1 \(84-121-0001\)"),
        ("no transcript", r"audio without transcript: 1 \(.*84-121-0001.opus\)"),
        ("no words", r"transcript without words: 1 \(.*84-121-0001.opus\)"),
        ("empty", r"unreadable or empty audio: 1 \(.*84-121-0001.opus: .*0 bytes"),
        ("unreadable", r"unreadable or empty audio: 1 \(.*84-121-0001.opus: not a readable"),
    ],
)
def test_unusable_utterances_are_named_and_refused_above_the_allowed_share(
    data, save, caplog, trouble, message
):
    chapter = data / "dev-mini/84/121"
    audio, transcript = chapter / "84-121-0001.opus", chapter / "84-121.trans.txt"
    lines = transcript.read_text().splitlines(keepends=True)
    if trouble == "no audio":
        audio.unlink()
    elif trouble == "no transcript":
        transcript.write_text(lines[0] + lines[2])
    elif trouble == "no words":
        transcript.write_text(lines[0] + "84-121-0001\n" + lines[2])
    elif trouble == "empty":
        audio.write_bytes(b"")
    else:
        audio.write_bytes(b"not audio at all")
    with pytest.raises(
        ValueError, match=f"dev-mini: 1 of 3 .*{message}.*33.3%, and at most 2.0% may be$"
    ):
        prepare_librispeech(data, save, ["dev-mini"])
    assert not (save / "dev-mini.csv").exists()
    with caplog.at_level(logging.WARNING):
        path = prepare_librispeech(data, save, ["dev-mini"], max_bad_share=0.4)["dev-mini"]
    assert "dev-mini: 1 of 3 utterances cannot be used" in caplog.text
    assert [row["ID"] for row in read(path)] == ["84-121-0000", "84-121-0002"]


def test_many_unusable_utterances_are_counted_but_only_the_first_are_named(data, save):
    chapter = add_chapter(data / "dev-mini", "85", "1", count=9)
    for path in chapter.glob("*.flac"):
        path.unlink()
    with pytest.raises(ValueError, match=r"audio: 9 \(85-1-0000, 85-1-0001, 85-1-0002, ...\)"):
        prepare_librispeech(data, save, ["dev-mini"])


def test_a_split_without_one_usable_utterance_is_refused_whatever_the_share(data, save):
    for path in (data / "dev-mini").rglob("*.opus"):
        path.unlink()
    with pytest.raises(ValueError, match="3 of 3 utterances cannot be used"):
        prepare_librispeech(data, save, ["dev-mini"], max_bad_share=1.0)


def test_the_same_utterance_in_two_chapters_is_refused(data, save):
    add_chapter(data / "dev-mini" / "copy", "84", "121")
    with pytest.raises(ValueError, match="84-121-0000 is there twice"):
        prepare_librispeech(data, save, ["dev-mini"])


def test_a_transcript_that_is_not_utf8_is_named(data, save):
    path = data / "dev-mini/84/121/84-121.trans.txt"
    path.write_bytes("84-121-0000 ÄÖ\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"84-121\.trans\.txt: the transcript is not UTF-8"):
        prepare_librispeech(data, save, ["dev-mini"])


def test_hours_for_a_split_that_is_not_asked_for_or_not_positive_are_refused(data, save):
    with pytest.raises(ValueError, match=r"max_hours names \['train'\]"):
        prepare_librispeech(data, save, ["dev-mini"], max_hours={"train": 1})
    with pytest.raises(ValueError, match="max_hours must be above 0"):
        prepare_librispeech(data, save, ["dev-mini"], max_hours={"dev-mini": 0})
