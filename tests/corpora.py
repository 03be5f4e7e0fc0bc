"""Made-up data sets in the layouts of the real ones, with noise for speech; and what runs need."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import soundfile

SENTENCES = ("a01", "b03")
INTENT_SLOTS = {
    "coffeeDrink": ["latte", "mocha"],
    "roast": ["dark roast", "light roast"],
    "size": ["small", "large"],
    "numberOfShots": ["single shot", "double shot"],
    "milkAmount": [" milk", "milk", "lots of cream"],
    "sugarAmount": ["sugar", " brown sugar"],
}


def load_train(folder):
    """A recipe's train.py as a module; by path, as all of them have the same name."""
    path = Path(folder) / "train.py"
    name = f"train_{path.parent.parent.name}_{path.parent.name}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_two_processes(train, arguments) -> None:
    """Run a recipe's train.py as torchrun does."""
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launch, str(train), *arguments, "--distributed_backend", "gloo"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=Path(train).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def arguments(folder, encoder, method, *options):
    """A command line that trains a tiny encoder for an epoch."""
    return [
        f"hparams/{method}.yaml",
        *("--encoder", str(encoder), "--output_folder", str(folder), "--tensorboard", "null"),
        *("--number_of_epochs", "1", "--batch_seconds", "4", "--num_buckets", "2"),
        *("--num_workers", "0", "--cache", "null", "--device", "cpu", "--noprogressbar"),
        *options,
    ]


def write_audio(path: Path, seconds: float = 0.25, pitch: float | None = None) -> None:
    """Noise, another for every path; with a tone in it if asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(list(str(path.name).encode()))
    samples = 0.02 * generator.standard_normal(int(16000 * seconds))
    if pitch is not None:
        samples += 0.2 * numpy.sin(2 * numpy.pi * pitch * numpy.arange(len(samples)) / 16000)
    soundfile.write(path, samples, 16000)


def write_table(path: Path, header, rows, delimiter: str = ",") -> None:
    """A table without any quoting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [delimiter.join(map(str, row)) for row in [header, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_table(path: Path) -> list[dict]:
    """Rows of a manifest."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def make_emodb(folder: Path) -> Path:
    """Ten actors, seven emotions."""
    for speaker in ("03", "08", "09", "10", "11", "12", "13", "14", "15", "16"):
        for emotion in "WLEAFTN":
            write_audio(folder / f"wav/{speaker}a01{emotion}a.wav", 0.15)
    return folder


def make_iemocap(folder: Path) -> Path:
    """Five sessions; a scripted and an improvised dialog, labels that count and that do not."""
    emotions = ["neu", "ang", "exc", "sad", "hap", "xxx", "fru", "neu"]
    for session in range(1, 6):
        for kind in ("F_impro01", "M_script01_1"):
            dialog = f"Ses{session:02d}{kind}"
            lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
            for number, emotion in enumerate(emotions):
                turn = f"{dialog}_{'FM'[number % 2]}{number // 2:03d}"
                time = f"[{number}.2901 - {number + 1}.2357]"
                lines += [f"{time}\t{turn}\t{emotion}\t[2.5000, 2.5000, 2.5000]"]
                lines += ["C-E2:\tNeutral;\t()", "C-F1:\tNeutral;\t(curious)"]
                lines += ["A-E3:\tval 3; act 2; dom  2;\t()", ""]
                wav = f"Session{session}/sentences/wav/{dialog}/{turn}.wav"
                write_audio(folder / wav, 0.15)
            path = folder / f"Session{session}/dialog/EmoEvaluation/{dialog}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
            path.with_name(f"._{dialog}.txt").write_bytes(b"\x00\x05\x16\x07")  # macOS leaves these
    return folder


def make_fluent(folder: Path) -> Path:
    """Its three tables: two speakers for training, one each for valid and test."""
    header = ["", "path", "speakerId", "transcription", "action", "object", "location"]
    intents = [("activate", "lights", "kitchen"), ("deactivate", "music", "none")]
    speakers = {"train": ["2BqVo8kVB2Skwgyb", "4BrX8aDqK2cLZRYl"], "valid": ["5o9BvRGEGvhaeBwA"],
                "test": ["4aGjX3AG5xcxeL7a"]}  # fmt: skip
    for part, names in speakers.items():
        rows = []
        for speaker in names:
            for number, intent in enumerate(intents * 2):
                path = f"wavs/speakers/{speaker}/0a3129c0-{speaker[:4]}-{number}.wav"
                write_audio(folder / path)
                rows.append([len(rows), path, speaker, "Words", *intent])
        write_table(folder / f"data/{part}_data.csv", header, rows)
    return folder


def make_intent(folder: Path) -> Path:
    """Sixty clips and one more in the labels, which is absent."""
    labels = {}
    for number in range(61):
        present = [slot for place, slot in enumerate(INTENT_SLOTS) if (number >> place) % 2 == 0]
        slots = {s: INTENT_SLOTS[s][number % len(INTENT_SLOTS[s])] for s in present}
        name = f"0075d273-51bb-{number:04d}.wav"
        labels[name] = {"intent": "orderDrink", "slots": slots}
        if number < 60:
            write_audio(folder / f"clean/{name}", 0.15)
    (folder / "label.json").write_text(json.dumps(labels, indent=4))
    return folder


def make_speechcommands(folder: Path) -> Path:
    """Three words, four speakers; two of them are in the lists."""
    lists = {
        "0a7c2a8d": "train",
        "0b40aa8e": "train",
        "0132a06d": "validation",
        "0c40e715": "testing",
    }
    named = {"validation": [], "testing": []}
    for word in ("bed", "cat", "yes"):
        for speaker, part in lists.items():
            for number in range(2):
                clip = f"{word}/{speaker}_nohash_{number}.wav"
                write_audio(folder / clip)
                if part in named:
                    named[part].append(clip)
    for part, clips in named.items():
        (folder / f"{part}_list.txt").write_text("\n".join(clips) + "\n")
    write_audio(folder / "_background_noise_/white_noise.wav")
    (folder / "README.md").write_text("# Speech Commands Data Set v0.02\n")
    return folder


def make_arabic(folder: Path) -> Path:
    """Two words, one of them two words; a speaker for each table."""
    for part, speaker in (("train", "00000030"), ("val", "00000002"), ("test", "00000014")):
        files = [f"dataset/{word}/{speaker}_NO_{number:02d}.wav"
                 for word in ("backward", "zoom in") for number in (1, 2)]  # fmt: skip
        for file in files:
            write_audio(folder / file)
        write_table(
            folder / f"{part}.csv", ["file", "class"], [[f, f.split("/")[1]] for f in files]
        )
    return folder


def make_commonvoice(folder: Path) -> Path:
    """Three clients in each table; the last one of the training part has a single clip."""
    header = "client_id path sentence up_votes down_votes age gender accents locale segment".split()
    for part in ("train", "dev", "test"):
        rows = []
        for client in range(3):
            for number in range(1 if (part, client) == ("train", 2) else 3):
                path = f"common_voice_fr_{len(part)}{client}{number}.wav"
                write_audio(folder / "clips" / path)
                rows.append([f"{part}{client}", path, 'Il dit : "oui.', 2, 0, "", "", "", "fr", ""])
        write_table(folder / f"{part}.tsv", header, rows, "\t")
    return folder


def make_voxceleb(folder: Path) -> Path:
    """Five speakers of the dev set, two of the test set."""
    sets = {f"id1000{n}": "dev" for n in range(1, 6)} | {"id10270": "test", "id10271": "test"}
    wavs = []
    for speaker in sets:
        for video in ("5r0dWxy17C8", "x6uYqmx31kE"):
            for number in (1, 2):
                wavs.append(f"{speaker}/{video}/{number:05d}.wav")
                write_audio(folder / "wav" / wavs[-1])
    header = ["VoxCeleb1 ID", "VGGFace1 ID", "Gender", "Nationality", "Set"]
    rows = [[speaker, "A.J._Buckley", "m", "Ireland", part] for speaker, part in sets.items()]
    write_table(folder / "vox1_meta.csv", header, rows, "\t")
    test = [wav for wav in wavs if sets[wav.split("/")[0]] == "test"]
    trials = [f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}"
              for a in test for b in test if a < b]  # fmt: skip
    (folder / "veri_test2.txt").write_text("\n".join(trials) + "\n")
    return folder
