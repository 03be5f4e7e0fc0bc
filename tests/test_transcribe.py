import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jiwer
import numpy
import pytest
import soundfile
import torch
from tqdm import tqdm

from hff_modules.alignment import Span, words
from hff_modules.data import CharUnits
from hff_modules.export import export
from hff_modules.export_format import ExportError
from hff_modules.exported import load_exported
from hff_modules.ngram import Fused, tokens, train_ngram, write_arpa
from hff_modules.recordings import Recording
from hff_modules.transcribe import (
    Decoder,
    Transcriber,
    _short,
    joined,
    main,
    transcribe,
)
from hff_modules.transcripts import TimedWord, write_srt, write_text
from tests.test_export import learned, read_tones, recognised, tones, trained  # noqa: F401
from tests.test_recordings import broken_files

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STRIDE = 640
UNITS = CharUnits.from_texts(["ABCDEFGHIJ"])


class Heard:
    """A recogniser that hears what the samples say: each frame has one unit, as its amplitude.

    As real ones do, it hears badly near the ends of what it is given, and a bit early or late
    depending on where the window starts.
    """

    task, units, device, folder = "asr", UNITS, torch.device("cpu"), "heard"

    def __init__(self, deaf=0, late=0):
        self.deaf, self.late, self.calls = deaf, late, []
        self.encoder = types.SimpleNamespace(
            frame_rate=25.0, minimum_samples=STRIDE, maximum_samples=None
        )

    def states(self, wavs, wav_lens):
        self.calls.append(tuple(wavs.shape))
        return wavs, (wav_lens * wavs.shape[1]).round().long() // STRIDE

    def outputs(self, wavs, lengths):
        frames = wavs[:, : int(lengths.max()) * STRIDE].unflatten(1, (-1, STRIDE))
        labels = (frames.mean(-1) * 100).round().long().clamp(0, UNITS.size - 1)
        for row, length in zip(labels, lengths.tolist(), strict=True):
            if len(self.calls) % 2:
                row[:length] = row[:length].roll(self.late)
            if length > 2 * self.deaf:
                row[: self.deaf] = 0
                row[length - self.deaf : length] = 0
        return torch.nn.functional.one_hot(labels, UNITS.size).float().clamp(min=1e-4).log()


def spoken(text, seed=0, spread=3):
    """Samples for :class:`Heard`, and the units of the frames; a word starts behind a space."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for word in text.split():
        labels += [0] * int(torch.randint(1, 30, (1,), generator=generator)) + [1]
        for unit in UNITS.encode(word):
            blanks = int(torch.randint(1, spread + 1, (1,), generator=generator))
            labels += [0] * blanks + [unit]
    frames = torch.tensor(labels + [0] * 9).float() / 100
    return frames.repeat_interleave(STRIDE), labels


def sentence(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, 10, (count, 4), generator=generator).tolist()
    return " ".join("".join("ABCDEFGHIJ"[i] for i in word) for word in letters)


@pytest.mark.parametrize(("deaf", "late"), [(0, 0), (25, 0), (25, 2), (40, -3)])
@pytest.mark.parametrize("batch_seconds", [40, 130])
def test_long_recordings_are_heard_once_and_whole_across_windows(deaf, late, batch_seconds):
    text = sentence(400)
    signal, labels = spoken(text)
    assert len(signal) > 6 * 40 * 16000
    padding = torch.zeros(deaf * STRIDE)  # the ends of the recording itself are heard badly, too
    signal = torch.cat([padding, signal, padding])
    model = Heard(deaf, late)
    transcriber = Transcriber(model, batch_seconds=batch_seconds)
    found = list(transcriber.stream(signal.split(9999)))
    assert " ".join(word.text for word in found) == text
    assert max(samples for _, samples in model.calls) == 40 * 16000
    assert len(model.calls) > 3
    starts = [index for index, label in enumerate(labels) if label == 1]
    for word, start in zip(found, starts, strict=True):
        assert 1 - abs(late) <= round(word.start * 25) - deaf - start <= 4 + abs(late)
        assert word.start < word.end


def test_a_recording_that_fits_a_window_is_heard_as_a_whole():
    signal, _ = spoken(sentence(20))
    model = Heard()
    at_once = Transcriber(model, window=len(signal) / 16000).stream([signal])
    assert [word.text for word in at_once] == sentence(20).split() and len(model.calls) == 1


def test_words_without_spaces_between_them_do_not_pile_up():
    text = sentence(300)
    signal, _ = spoken(text)
    frames = signal.view(-1, STRIDE)
    frames[(frames[:, 0] * 100).round() == 1] = 0  # no spaces
    transcriber = Transcriber(Heard())
    held = []
    complete = transcriber._complete
    transcriber._complete = lambda frames: held.append(len(frames)) or complete(frames)
    found = list(transcriber.stream([signal]))
    assert "".join(word.text for word in found) == text.replace(" ", "")
    assert max(held) <= 3 * 40 * 25


def test_a_beam_gives_words_with_times_too():
    signal, _ = spoken(sentence(150))
    greedy = list(Transcriber(Heard()).stream([signal]))
    beam = list(Transcriber(Heard(), beam=4).stream([signal]))
    assert beam == greedy


def test_windows_are_joined_where_both_are_silent():
    blank, a, b = torch.eye(3).clamp(min=1e-3).log()
    before = torch.stack([b, b, b, b, blank, blank, a, blank, blank, blank, b, b])
    after = torch.stack([b, b, a, blank, blank, blank, blank, b, a, a, a, a])
    (first, second) = joined([before, after], hop=4, overlap=8, blank=0)
    # What both have of the overlap, without its outer quarters: a - _ _ | and  a _ _ _.
    assert len(first) == 4 + 4 and len(second) == 12 - 4
    assert torch.equal(torch.cat([first, second])[:8], before[:8])


def test_the_window_is_no_longer_than_the_encoder_takes_at_once():
    model = Heard()
    model.encoder.maximum_samples = 30 * 16000
    signal, _ = spoken(sentence(100))
    assert [w.text for w in Transcriber(model).stream([signal])] == sentence(100).split()
    assert max(samples for _, samples in model.calls) <= 30 * 16000
    with pytest.raises(ValueError, match="at least twice the overlap"):
        Transcriber(model, overlap=20)


def test_a_recording_longer_than_its_header_says_is_still_heard_in_windows(tmp_path):
    model, path = Heard(), tmp_path / "long.wav"
    soundfile.write(path, numpy.zeros(90 * 16000), 16000)
    recordings = [Recording("long.wav", path, tmp_path / "long", 20.0)]
    (words,) = _short(Transcriber(model), recordings, tqdm(disable=True)).values()
    assert list(words) == []
    assert len(model.calls) > 1 and max(samples for _, samples in model.calls) <= 40 * 16000


def test_the_command_gives_the_score_of_the_run(learned, tones, tmp_path):  # noqa: F811
    folder, _, target = learned
    command = [sys.executable, "-m", "hff_modules.transcribe", str(target), str(tones), "gone.wav"]
    done = subprocess.run(
        [*command, "--format", "jsonl"],
        cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "failed: gone.wav: no such audio file"
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    texts = {Path(line["file"]).stem: line["text"] for line in lines}
    assert texts == recognised(folder)
    references = (folder / "test-tones.txt").read_text().splitlines()[1::3]
    expected = json.loads((folder / "results.json").read_text())["test"]["tones"]
    hypotheses = [texts[name] for name in recognised(folder)]
    assert 100 * jiwer.wer([line[6:] for line in references], hypotheses) == expected["wer"]
    for line in lines:
        assert " ".join(word["word"] for word in line["words"]) == line["text"]


def test_the_language_model_of_the_training_comes_along(learned, tones, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(learned[0], tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    results["lm"] = {"kind": "char", "order": 4, "alpha": 3.0, "beta": 1.0, "beam": 8}
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(ExportError, match="has no lm.arpa.*--test_only writes it"):
        export(folder, tmp_path / "model")
    other = train_ngram([tokens("EEEE GGGG", "char")] * 9, order=4)  # says nothing that was said
    write_arpa(other, folder / "lm.arpa")
    export(folder, tmp_path / "model")
    assert "`transcribe --lm`" in (tmp_path / "model/README.md").read_text()
    model, files = load_exported(tmp_path / "model"), sorted(map(str, tones.glob("*.wav")))
    search, expected = Fused(other, "char", model.units, 3.0, 1.0, beam_size=8), []
    for file in files:
        signal = torch.from_numpy(soundfile.read(file, dtype="float32")[0])[None]
        expected += search(model.outputs(*model.states(signal)), torch.ones(1))
    main([str(tmp_path / "model"), *files, "--lm", "--quiet"])
    found = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    assert found == expected != [recognised(folder)[Path(file).stem] for file in files]
    with pytest.raises(ExportError, match="has no language model: it was trained without one"):
        Transcriber(load_exported(learned[2]), lm=True)
    (tmp_path / "model/lm.arpa").write_text("no model")
    with pytest.raises(ExportError, match="lm.arpa: no ARPA file"):
        Transcriber(model, lm=True)


def test_any_rate_and_channels_are_recognised_alike(learned, tones, tmp_path):  # noqa: F811
    _, _, target = learned
    signal = read_tones(tones)["u3"].numpy()
    both = numpy.stack([0.5 * signal, 1.5 * signal], axis=1)
    soundfile.write(tmp_path / "stereo.flac", both, 16000, subtype="PCM_24")
    soundfile.write(tmp_path / "mono.flac", signal, 16000, subtype="PCM_24")
    found = {}
    for name in ("stereo", "mono"):
        output = tmp_path / f"{name}.jsonl"
        transcribe(load_exported(target), [str(tmp_path / f"{name}.flac")], str(output), "jsonl")
        found[name] = json.loads(output.read_text())["words"]
    assert found["stereo"] == found["mono"] != []


def test_failures_are_said_one_by_one_and_the_others_are_done(
    learned,  # noqa: F811
    tones,  # noqa: F811
    tmp_path,
    capsys,
):
    expected = broken_files(tmp_path)
    (tmp_path / "nothing").mkdir()
    inputs = [str(tmp_path / name) for name in expected]
    good = [str(tones / "u0.wav"), str(tones / "u1.wav")]
    output = tmp_path / "out" / "all.txt"
    with pytest.raises(SystemExit) as stopped:
        main([str(learned[2]), good[0], *inputs, good[1], "--output", str(output)])
    assert stopped.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(said) == len(expected)
    for name, reason in expected.items():
        assert any(name in line and reason in line for line in said)
    lines = dict(line.split("\t") for line in output.read_text().splitlines())
    assert list(lines) == good
    assert lines[good[0]] == recognised(learned[0])["u0"]
    assert [path.name for path in output.parent.iterdir()] == ["all.txt"]


def test_results_may_go_to_a_file_for_each_recording(learned, tones, tmp_path, capsys):  # noqa: F811
    for kind, suffix in (("text", "txt"), ("srt", "srt"), ("jsonl", "jsonl")):
        main([str(learned[2]), str(tones), "--output", str(tmp_path / kind), "--format", kind])
        names = sorted(path.name for path in (tmp_path / kind).iterdir())
        assert names == sorted(f"u{n}.{suffix}" for n in range(12))
    assert capsys.readouterr().out == ""
    assert (tmp_path / "text" / "u5.txt").read_text() == recognised(learned[0])["u5"] + "\n"


def test_subtitles_of_several_recordings_are_refused_before_any_is_heard(
    learned,  # noqa: F811
    tones,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(Transcriber, "batch", None)
    for output in ([], ["--output", str(tmp_path / "all.srt")]):
        with pytest.raises(ExportError, match="give a folder"):
            main([str(learned[2]), str(tones), "--format", "srt", *output])


def test_a_transcript_beside_its_recording_is_not_written_over(learned, tones, tmp_path, capsys):  # noqa: F811
    for number in range(2):
        shutil.copy(tones / f"u{number}.wav", tmp_path)
    (tmp_path / "u0.txt").write_text("what was said")
    failures = transcribe(load_exported(learned[2]), [str(tmp_path)], str(tmp_path))
    assert [failure.name for failure in failures] == [str(tmp_path / "u0.wav")]
    assert "u0.txt lies beside it and may be its transcript" in capsys.readouterr().err
    assert (tmp_path / "u0.txt").read_text() == "what was said"
    assert (tmp_path / "u1.txt").read_text() == recognised(learned[0])["u1"] + "\n"


def test_a_recording_that_breaks_off_leaves_nothing_of_its_own(
    learned,  # noqa: F811
    tones,  # noqa: F811
    tmp_path,
    capsys,
):
    long = tmp_path / "long.flac"  # whose header does not tell
    soundfile.write(long, numpy.random.default_rng(0).uniform(-0.1, 0.1, 60 * 16000), 16000)
    long.write_bytes(long.read_bytes()[: long.stat().st_size * 5 // 6])
    files = [str(long), str(tones / "u0.wav")]
    failures = transcribe(load_exported(learned[2]), files, str(tmp_path / "all.jsonl"), "jsonl")
    (line,) = (tmp_path / "all.jsonl").read_text().splitlines()
    assert len(failures) == 1 and "long.flac" in str(failures[0])
    assert json.loads(line)["file"] == files[1]


def test_subtitles_break_at_pauses_and_before_they_are_long(tmp_path):
    words = [TimedWord("HELLO", 0.5, 0.9), TimedWord("WORLD", 1.0, 1.4)]
    words += [TimedWord("LATER", 3661.5, 3662.0)]
    words += [TimedWord("A" * 40, 3662 + n, 3662.5 + n) for n in range(3)]
    with open(tmp_path / "a.srt", "w") as file:
        write_srt("a", iter(words), file)
    cues = (tmp_path / "a.srt").read_text().split("\n\n")
    assert cues[0] == "1\n00:00:00,500 --> 00:00:01,400\nHELLO WORLD"
    assert cues[1].startswith("2\n01:01:01,500 --> 01:01:02,500\nLATER AAA")
    assert len(cues) == 4 and cues[-1] == ""


def test_scripts_without_spaces_have_times_and_subtitles_by_letter(tmp_path):
    units = CharUnits.from_texts(["กินข้าว"])
    ids = units.encode("กินข้าว" * 30)
    labels = [label for unit in ids for label in (0, 0, unit)]
    log_probs = torch.nn.functional.one_hot(torch.tensor(labels), units.size).float().log()
    for decoder in (Decoder(units), Decoder(units, lambda *given: ["กินข้าว" * 30])):
        found = decoder.words(log_probs.clamp(min=-20))
        assert [word.text for word in found[:5]] == ["กิ", "น", "ข้", "า", "ว"], "marks stay"
        assert all(word.joined for word in found)
        assert "".join(word.text for word in found) == "กินข้าว" * 30
    timed = [TimedWord(w.text, w.start / 25, w.end / 25, w.joined) for w in found]
    with open(tmp_path / "a.srt", "w", encoding="utf-8") as file:
        write_srt("a", iter(timed), file)
    cues = [cue.split("\n") for cue in (tmp_path / "a.srt").read_text().strip().split("\n\n")]
    assert "".join(cue[2] for cue in cues) == "กินข้าว" * 30 and len(cues) > 3
    with open(tmp_path / "a.txt", "w", encoding="utf-8") as file:
        write_text("", iter(timed), file)
    assert (tmp_path / "a.txt").read_text() == "กินข้าว" * 30 + "\n"


def test_words_in_a_script_with_spaces_keep_them_among_letters_without():
    texts = ["", *"我们 the"]
    spans = [Span(unit, 2 * unit, 2 * unit + 1) for unit in (1, 2, 4, 5, 6, 3, 1, 3, 4, 5, 6)]
    found = words(spans, texts, by_letter=True)
    assert [(word.text, word.joined) for word in found] == [
        *(("我", True), ("们", True), ("the", True), ("我", False), ("the", False)),
    ]
    assert [word.text for word in words(spans, texts)] == ["我们the", "我", "the"]


def test_stretches_of_a_script_without_spaces_are_joined_without_one(tmp_path):
    letters = "กขคงจฉชซญฎ"
    model, units = Heard(), CharUnits.from_texts([letters])
    model.units = units
    assert units.size == UNITS.size
    text = "".join(letters[n * n % 10] for n in range(900))
    frames = torch.tensor([label for unit in units.encode(text) for label in (0, 0, unit)]) / 100
    found = Transcriber(model).stream([frames.repeat_interleave(STRIDE)])
    with open(tmp_path / "a.txt", "w", encoding="utf-8") as file:
        write_text("", found, file)
    assert (tmp_path / "a.txt").read_text() == text + "\n"


def test_spaces_in_a_script_without_them_are_kept_where_windows_are_joined(tmp_path):
    model, units = Heard(), CharUnits.from_texts(["กขคงจฉชซญฎ"])
    model.units = units
    text = sentence(400)
    with open(tmp_path / "a.txt", "w", encoding="utf-8") as file:
        write_text("", Transcriber(model).stream([spoken(text)[0]]), file)
    expected = units.decode(UNITS.encode(text))
    assert (tmp_path / "a.txt").read_text() == expected + "\n" and expected.count(" ") == 399


MEMORY = """
import re, sys
from pathlib import Path
from hff_modules.exported import load_exported
from hff_modules.transcribe import transcribe
model = load_exported(sys.argv[1])
assert not transcribe(model, [sys.argv[2]], sys.argv[2] + ".jsonl", "jsonl", window=4, overlap=1,
                      batch_seconds=4)
# Of this process: ru_maxrss counts what the one that started it had, too.
print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""


def test_memory_does_not_grow_with_the_length_of_a_recording(learned, tones, tmp_path):  # noqa: F811
    speech = torch.cat(list(read_tones(tones).values())).repeat(3)[: 5 * 16000]
    peaks = {}
    for name, times in (("short", 2), ("long", 60)):
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, speech.repeat(times).numpy(), 16000)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(learned[2]), str(path)],
            capture_output=True, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks[name] = float(done.stdout)
        assert len(json.loads(Path(f"{path}.jsonl").read_text())["text"]) > 10 * times
    # The long one's samples alone would be 19 MB, its states as much again.
    assert peaks["long"] - peaks["short"] < 10, peaks
