import io
import itertools
import types
import wave
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
import torchaudio

from hff_modules.data.audio import AudioError, read_audio
from hff_modules.data.batches import by_length, padded
from hff_modules.recordings import (
    Failure,
    Recording,
    Resampler,
    audio_below,
    find_recordings,
    read_pieces,
    windows,
)


def noise(count, seed=0):
    return 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 16000])
@pytest.mark.parametrize("piece", [7, 1000, 30011])
def test_resampling_in_pieces_gives_what_resampling_at_once_gives(rate, piece):
    signal = noise(30011 if piece > 7 else 3001)
    expected = torchaudio.functional.resample(signal, rate, 16000)
    given = torch.cat(list(Resampler(rate)(signal.split(piece))))
    assert given.shape == expected.shape
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rate", "channels", "kind"),
    [(8000, 1, "wav"), (44100, 2, "flac"), (48000, 6, "wav"), (16000, 1, "ogg")],
)
def test_pieces_of_a_recording_are_the_whole(tmp_path, rate, channels, kind):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, noise(2 * rate * channels).view(-1, channels).numpy(), rate)
    pieces = list(read_pieces(path, seconds=0.3))
    assert max(map(len, pieces)) < 0.6 * 16000 and len(pieces) > 4
    torch.testing.assert_close(torch.cat(pieces), read_audio(path), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0, 5, 100, 101, 180, 181, 500])
def test_windows_overlap_and_cover_everything_once_when_the_overlaps_are_taken_off(count):
    signal = torch.arange(float(count))
    found = list(windows(signal.split(7), size=100, overlap=20))
    assert all(len(window) == 100 for window in found[:-1])
    assert len(found) == 1 or len(found[-1]) > 20
    assert torch.equal(torch.cat([found[0], *(w[20:] for w in found[1:])]), signal)


def test_of_twelve_hours_only_what_is_asked_for_is_read(tmp_path):
    path = tmp_path / "day.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(b"")
    hours = 12 * 3600 * 16000
    header = bytearray(path.read_bytes())
    header[4:8], header[40:44] = (
        (36 + 2 * hours).to_bytes(4, "little"),
        (2 * hours).to_bytes(4, "little"),
    )
    path.write_bytes(header)
    with open(path, "r+b") as file:
        file.truncate(len(header) + 2 * hours)  # sparse: it takes no room
    (recording,) = find_recordings([str(path)])
    assert recording.seconds == 12 * 3600
    read = []

    def counted(pieces):
        for piece in pieces:
            read.append(len(piece))
            yield piece

    found = windows(counted(read_pieces(path)), size=640000, overlap=128000)
    for index, window in enumerate(itertools.islice(found, 5), start=1):
        assert len(window) == 640000
        assert sum(read) <= index * (640000 - 128000) + 128000 + 160000


def test_files_folders_patterns_and_standard_input_are_found(tmp_path, monkeypatch):
    for name in ("b.wav", "a.flac", "deep/er/c.ogg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, numpy.zeros(1600), 16000)
    (tmp_path / "notes.txt").write_text("no audio")
    given = [str(tmp_path), str(tmp_path / "*.wav"), str(tmp_path / "a.flac"), "-"]
    stdin = types.SimpleNamespace(buffer=io.BytesIO((tmp_path / "b.wav").read_bytes()))
    monkeypatch.setattr("sys.stdin", stdin)
    found = list(find_recordings(given, tmp_path))
    assert all(isinstance(one, Recording) and one.seconds == 0.1 for one in found)
    assert [str(one.place) for one in found] == ["a", "b", "deep/er/c", "b", "a", "stdin"]
    assert found[-1].name == "-" and found[2].name == str(tmp_path / "deep/er/c.ogg")


def broken_files(folder: Path) -> dict[str, str]:
    """Files that are no recordings, and what is to be said about each."""
    (folder / "text.wav").write_text("this is no audio" * 100)
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "silent.wav", numpy.zeros(0), 16000)
    return {
        "gone.wav": "no such audio file",
        "text.wav": "not a readable audio file",
        "empty.wav": "0 bytes",
        "silent.wav": "no samples",
        "*.mp3": "no file matches",
        "nothing": "no audio file in this folder",
    }


def test_sound_that_cannot_be_read_is_named(tmp_path, caplog):
    for name in ("a.wav", "b.m4a", "deep/c.AMR", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"something")
    assert audio_below(tmp_path) == [tmp_path / "a.wav"]
    assert "2 files (b.m4a, ...) cannot be read and are left out; make them wav" in caplog.text


def test_links_to_folders_are_followed_once_and_what_is_hidden_is_left_out(tmp_path):
    (tmp_path / "calls").mkdir()
    (tmp_path / "disk").mkdir()
    soundfile.write(tmp_path / "disk/a.wav", [0.1] * 800, 16000)
    (tmp_path / "disk/._a.wav").write_bytes(b"of a Mac")
    (tmp_path / "calls/more").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(tmp_path / "calls")
    found = [recording.name for recording in find_recordings([str(tmp_path / "calls")])]
    assert found == [str(tmp_path / "calls/more/a.wav")]


def test_what_is_no_recording_is_a_failure_of_its_own_and_named(tmp_path):
    expected = broken_files(tmp_path)
    (tmp_path / "nothing").mkdir()
    found = list(find_recordings(str(tmp_path / name) for name in expected))
    assert len(found) == len(expected)
    for failure, (name, reason) in zip(found, expected.items(), strict=True):
        assert isinstance(failure, Failure) and failure.name == str(tmp_path / name)
        assert reason in str(failure) and "\n" not in str(failure)
        assert str(failure).startswith(str(tmp_path / name))


def test_standard_input_that_is_no_audio_is_called_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"words " * 99)))
    (failure,) = find_recordings(["-"], tmp_path)
    assert str(failure).startswith("-: not a readable audio file")


def test_a_recording_that_breaks_off_or_holds_no_numbers_is_noticed(tmp_path):
    soundfile.write(tmp_path / "a.flac", noise(160000).numpy(), 16000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match="a.flac"):
        list(read_pieces(tmp_path / "a.flac", seconds=1))
    soundfile.write(tmp_path / "b.wav", numpy.full(1600, numpy.nan), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match="b.wav: .*no sound"):
        list(read_pieces(tmp_path / "b.wav"))


def test_batches_are_of_like_length_and_within_the_limit():
    batches = list(by_length([1, 9, 2, 30, 1.5, 8, 2.5], float, 10))
    assert batches == [[1, 1.5, 2, 2.5], [8], [9], [30]] and not list(by_length([], float, 10))


def test_a_padded_batch_has_silence_behind_short_signals():
    wavs, wav_lens = padded([torch.ones(2), torch.ones(4)], minimum_samples=3)
    assert wavs.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]] and wav_lens.tolist() == [0.75, 1]
