"""Audio files and manifests: what is read, and what is said when something is wrong."""

import logging
import os

import numpy
import pytest
import soundfile
import torch
import torchaudio
from speechbrain.dataio.dataset import DynamicItemDataset

from hff_modules.data import audio
from hff_modules.data.audio import AudioError, audio_info, check_all, read_audio
from hff_modules.data.manifest import (
    ManifestError,
    read_rows,
    summarize_manifest,
    write_manifest,
)
from hff_modules.data.prepare import read_durations
from hff_modules.files import open_atomically
from hff_modules.recordings import read_pieces


@pytest.fixture(autouse=True)
def nothing_said_yet():
    for said in audio._SAID.values():
        said.value = 0


def tone(seconds=0.5, rate=16000, hz=440.0):
    return 0.5 * numpy.sin(2 * numpy.pi * hz * numpy.arange(int(seconds * rate)) / rate)


def row(name, **others):
    return {
        "ID": name, "duration": 0.5, "wav": f"$data_root/{name}.wav", "spk_id": "s1", "wrd": "HI",
        **others,
    }  # fmt: skip


def test_pcm_wav_gives_exactly_the_samples_that_were_written(tmp_path):
    stored = numpy.array([0, 1, -1, 16384, -32768, 32767], dtype=numpy.int16)
    soundfile.write(tmp_path / "a.wav", stored, 16000, subtype="PCM_16")
    signal = read_audio(tmp_path / "a.wav")
    assert signal.dtype == torch.float32
    assert torch.equal(signal, torch.from_numpy(stored.astype(numpy.float32) / 32768))


@pytest.mark.parametrize(
    ("ending", "options"),
    [("wav", {}), ("flac", {}), ("mp3", {}), ("ogg", {}), ("opus", {"format": "OGG"})],
)
def test_every_promised_format_gives_the_tone_and_its_duration(tmp_path, ending, options):
    path = tmp_path / f"a.{ending}"
    subtype = {"subtype": "OPUS"} if ending == "opus" else {}
    soundfile.write(path, tone(1.0), 16000, **options, **subtype)
    signal = read_audio(path)
    spectrum = torch.fft.rfft(signal[2000:14000]).abs()
    assert spectrum.argmax().item() * 16000 / 12000 == pytest.approx(440, abs=2)
    # MP3 adds its encoder's delay.
    assert audio_info(path).duration == pytest.approx(1.0, abs=0.15 if ending == "mp3" else 1e-3)
    assert len(signal) == audio_info(path).frames


def test_stereo_becomes_the_mean_of_its_channels_and_is_said_once(tmp_path, caplog):
    channels = numpy.stack([tone(), 0.25 * tone(hz=100.0)], axis=1)
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, channels, 16000, subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        signal = read_audio(tmp_path / "a.wav")
        read_audio(tmp_path / "b.wav")
    expected = torch.from_numpy(channels.mean(axis=1)).float()
    torch.testing.assert_close(signal, expected)
    assert [record.args[0] for record in caplog.records] == [
        f"{tmp_path}/a.wav has 2 channels: averaged to one"
    ]


def test_other_rates_are_resampled_as_torchaudio_does_and_said_once(tmp_path, caplog):
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, tone(rate=22050), 22050, subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        signal = read_audio(tmp_path / "a.wav", sample_rate=16000)
        read_audio(tmp_path / "b.wav")
    original = torch.from_numpy(tone(rate=22050)).float()
    torch.testing.assert_close(signal, torchaudio.functional.resample(original, 22050, 16000))
    assert len(caplog.records) == 1
    assert "a.wav has 22050 Hz: resampled to 16000 Hz" in caplog.text


def test_workers_forked_from_a_run_do_not_say_it_again(tmp_path, capfd):
    soundfile.write(tmp_path / "a.wav", tone(rate=8000), 8000)
    for _ in range(2):
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)  # as workers do: a fork has no threads to share work with
            logging.basicConfig(force=True)  # to stderr, which capfd sees
            read_audio(tmp_path / "a.wav")
            os._exit(0)
        os.waitpid(child, 0)
    assert capfd.readouterr().err.count("resampled") == 1


@pytest.mark.parametrize("read", [read_audio, audio_info])
@pytest.mark.parametrize("trouble", ["missing", "folder", "no bytes", "text", "no samples"])
def test_unusable_files_raise_an_error_that_names_them(tmp_path, read, trouble):
    path = tmp_path / "bad.wav"
    if trouble == "folder":
        path.mkdir()
    elif trouble == "no bytes":
        path.touch()
    elif trouble == "text":
        path.write_text("this is not audio, whatever its name says")
    elif trouble == "no samples":
        soundfile.write(path, numpy.zeros(0), 16000)
    with pytest.raises(AudioError, match=r"bad\.wav"):
        read(path)


@pytest.mark.parametrize("ending", ["flac", "mp3", "wav", "aiff"])
def test_a_file_cut_short_is_an_error_and_not_a_shorter_utterance(tmp_path, ending):
    noise = numpy.random.default_rng(0).uniform(-0.5, 0.5, 48000)
    path = tmp_path / f"cut.{ending}"
    soundfile.write(path, noise, 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=rf"cut\.{ending}"):
        read_audio(path)
    for whole in (False, True):
        known, (problem,) = read_durations({"a": path}, whole=whole)
        assert not known and f"cut.{ending}" in problem


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_file_that_was_written_to_a_pipe_names_no_size(tmp_path, size):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), 16000)
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = size.to_bytes(4, "little")
    path.write_bytes(data)
    with open(path, "rb") as file:
        assert audio.fault_in(file) is None


@pytest.mark.parametrize("ending", ["ogg", "mp3"])
def test_joined_files_of_which_only_the_first_would_be_read_are_an_error(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, numpy.random.default_rng(0).uniform(-0.5, 0.5, 48000), 16000)
    tag = b"ID3\x03\0\0\0\0\1\0" + bytes(128) if ending == "mp3" else b""
    single = tag + path.read_bytes()
    path.write_bytes(single + b"TAG" + bytes(125))
    assert audio_info(path).frames == len(read_audio(path)) == 48000
    path.write_bytes(single + single)
    for read in (audio_info, read_audio):
        with pytest.raises(AudioError, match=rf"a\.{ending}: holds several streams"):
            read(path)


@pytest.mark.parametrize("size", [4, 10, 60, 300])
def test_stubs_of_mp3_files_are_errors_by_name(tmp_path, size):
    path = tmp_path / "a.mp3"
    soundfile.write(path, numpy.random.default_rng(0).uniform(-0.5, 0.5, 48000), 16000)
    frames = path.read_bytes()
    cut = frames.index(b"Info" if b"Info" in frames else b"Xing") + 10  # within its table
    for data in (b"ID3\x03" + frames[:size], frames[:cut]):
        path.write_bytes(data[:size] if size < 60 else data)
        known, (problem,) = read_durations({"a": path})
        assert not known and "a.mp3" in problem and "several" not in problem


def test_a_file_that_may_not_be_read_is_one_of_the_bad_ones(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", tone(), 16000)

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(audio, "open", refused, raising=False)  # root may read anything
    with pytest.raises(AudioError, match=r"a\.wav: cannot be read \(Permission denied\)"):
        audio_info(tmp_path / "a.wav")


def test_damage_in_the_middle_is_found_by_decoding_all(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, numpy.random.default_rng(0).uniform(-0.5, 0.5, 160000), 16000)
    assert read_durations({"a": path}, whole=True) == ({"a": 10.0}, [])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20000] = bytes(20000)
    path.write_bytes(data)
    assert read_durations({"a": path})[0], "which headers and ends do not tell"
    known, (problem,) = read_durations({"a": path}, whole=True)
    assert not known and "a.flac" in problem


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, 3e38])
def test_samples_that_are_no_sound_are_an_error(tmp_path, value):
    signal = tone()
    signal[100] = value
    soundfile.write(tmp_path / "nan.wav", signal, 16000, subtype="FLOAT")
    for read in (read_audio, check_all, lambda path: list(read_pieces(path))):
        with pytest.raises(AudioError, match=r"nan\.wav.*no sound"):
            read(tmp_path / "nan.wav")


def test_manifest_reads_back_what_was_written_also_through_speechbrain(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 16000)
    rows = [row("a", wrd='SAID "HI", HE'), row("b", wrd="ÜBER DEN FLUSS", spk_id="s2")]
    write_manifest(tmp_path / "m.csv", rows)
    ours = read_rows(tmp_path / "m.csv", data_root=tmp_path)
    theirs = DynamicItemDataset.from_csv(tmp_path / "m.csv", {"data_root": tmp_path})
    assert ours == theirs.data
    assert ours["a"]["wav"] == str(tmp_path / "a.wav")
    assert [ours[name]["wrd"] for name in "ab"] == ['SAID "HI", HE', "ÜBER DEN FLUSS"]


def test_a_dollar_in_a_transcript_is_just_a_character(tmp_path):
    write_manifest(tmp_path / "m.csv", [row("a", wrd="$FIVE AND $data_root")])
    assert read_rows(tmp_path / "m.csv", "/x")["a"]["wrd"] == "$FIVE AND $data_root"


def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left.*results.json"):
        with open_atomically(tmp_path / "results.json") as file:
            file.write("{")
            raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_manifest_and_no_rests(tmp_path, monkeypatch):
    write_manifest(tmp_path / "m.csv", [row("a")])
    before = (tmp_path / "m.csv").read_bytes()

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(tmp_path / "m.csv", [row("b")])
    assert (tmp_path / "m.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no utterances"),
        ([row("a"), row("a")], "'a' is there twice"),
        ([row("a", wrd=None)], "'a' has no wrd"),
        ([row("a", duration=0)], "'a': duration is 0"),
        ([row("a", duration=float("nan"))], "'a': duration is nan"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_when_writing(tmp_path, rows, message):
    with pytest.raises(ManifestError, match=f"m.csv: .*{message}"):
        write_manifest(tmp_path / "m.csv", rows)
    assert not (tmp_path / "m.csv").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such manifest"),
        ("", "no column ID, duration, wav, spk_id, wrd; it has nothing"),
        ("ID,duration,wav,spk_id\n", "no column wrd; it has ID, duration, wav, spk_id"),
        ("ID,duration,wav,spk_id,wrd\n", "no utterances"),
        ("ID,duration,wav,spk_id,wrd\na,1,x.wav\n", "line 2: expected 5 fields"),
        ("ID,duration,wav,spk_id,wrd\na,1,x.wav,s,HI,YOU\n", "line 2: expected 5 fields"),
        ("ID,duration,wav,spk_id,wrd\na,long,x.wav,s,HI\n", "line 2: duration is 'long'"),
        ("ID,duration,wav,spk_id,wrd\na,1,x,s,A\na,1,x,s,A\n", "line 3: the ID 'a'"),
        ("ID,duration,wav,spk_id,wrd\na,1,$data_root/x.wav,s,A\n", "needs a data_root"),
    ],
)
def test_broken_manifests_are_refused_with_file_line_and_column(tmp_path, content, message):
    if content is not None:
        (tmp_path / "m.csv").write_text(content)
    with pytest.raises(ManifestError, match=rf"m\.csv.*{message}"):
        read_rows(tmp_path / "m.csv")


def test_summary_counts_hours_utterances_and_speakers(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 16000)
    rows = [row("a", duration=1800), row("b", duration=900), row("c", duration=9, spk_id="s2")]
    write_manifest(tmp_path / "m.csv", rows)
    whole = summarize_manifest(tmp_path / "m.csv")
    assert (whole.hours, whole.utterances, whole.speakers) == (2709 / 3600, 3, 2)
    assert str(whole) == "0.75 h, 3 utterances of 9.0 to 1800.0 s, 2 speakers"
