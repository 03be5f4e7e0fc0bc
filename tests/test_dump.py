import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from hff_modules import SSLEncoder, dump
from hff_modules.data.manifest import write_manifest
from hff_modules.dump import DumpError
from hff_modules.exported import load_exported
from tests.test_export import learned, read_tones, tones, trained  # noqa: F401


def read_folder(folder):
    return {
        str(path.relative_to(folder).with_suffix("")): numpy.load(path)
        for path in sorted(folder.rglob("*.npy"))
    }


def read_archive(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, thing: found.update({name: thing[()]} if hasattr(thing, "shape") else {})
        )
    return found


def test_states_are_those_of_the_encoder_with_true_lengths(encoder_folder, tones, tmp_path):  # noqa: F811
    csv = str(tones / "train.csv")
    dump.dump(encoder_folder, csv, tmp_path / "out", layers="1,3", batch_seconds=2)
    found, encoder = read_folder(tmp_path / "out"), SSLEncoder(encoder_folder, layers=[1, 3]).eval()
    signals = read_tones(tones)
    assert found.keys() == signals.keys()
    for name, signal in signals.items():
        expected, lengths = encoder(signal[None])
        assert found[name].shape == (2, int(lengths[0]), 24)
        numpy.testing.assert_allclose(found[name], expected[:, 0].detach().numpy(), atol=1e-4)
    about = json.loads((tmp_path / "out" / "features.json").read_text())
    assert about["layers"] == [1, 3] and about["axes"] == ["num_states", "frames", "width"]
    assert about["encoder"]["fingerprint"] == encoder.fingerprint and about["frame_rate"] == 50


def test_fused_features_of_a_model_are_what_its_head_is_given(learned, tones, tmp_path):  # noqa: F811
    target = str(learned[2])
    model, signals = load_exported(target), read_tones(tones)
    dump.dump(target, str(tones), tmp_path / "fused")
    dump.dump(target, str(tones), tmp_path / "states", states=True)
    fused, states = read_folder(tmp_path / "fused"), read_folder(tmp_path / "states")
    assert fused.keys() == states.keys() == signals.keys()
    for name, signal in signals.items():
        expected, lengths = model.states(signal[None])
        expected_states = expected[:, 0].detach().numpy()
        numpy.testing.assert_allclose(states[name], expected_states, rtol=1e-3, atol=1e-2)
        features = model.features(expected, lengths)[0].numpy()
        numpy.testing.assert_allclose(fused[name], features, rtol=1e-3, atol=1e-2)


def test_an_archive_holds_the_same_as_the_files(encoder_folder, tones, tmp_path):  # noqa: F811
    for target in ("out", "out.h5"):
        dump.dump(encoder_folder, str(tones), tmp_path / target, layers="4", dtype="fp16")
    files, archive = read_folder(tmp_path / "out"), read_archive(tmp_path / "out.h5")
    assert files.keys() == archive.keys()
    assert all(archive[name].dtype == numpy.float16 for name in archive)
    assert all(numpy.array_equal(files[name], archive[name]) for name in files)
    with h5py.File(tmp_path / "out.h5") as file:
        assert json.loads(file.attrs["features"])["layers"] == [4]


@pytest.mark.parametrize("target", ["out", "out.h5"])
def test_a_stopped_run_goes_on_and_computes_nothing_twice(
    encoder_folder,
    tones,  # noqa: F811
    tmp_path,
    monkeypatch,
    target,
):
    computed, compute = [], dump._computed

    def stopped(function, signals, minimum):
        for one, features in compute(function, signals, minimum):
            if len(computed) == 5:
                raise KeyboardInterrupt
            computed.append(one.name)
            yield one, features

    with monkeypatch.context() as patched:
        patched.setattr(dump, "_computed", stopped)
        with pytest.raises(KeyboardInterrupt):
            dump.dump(encoder_folder, str(tones), tmp_path / target, layers="2", batch_seconds=1)
    assert not (tmp_path / "out.h5").exists()

    def counted(function, signals, minimum):
        for one, features in compute(function, signals, minimum):
            computed.append(one.name)
            yield one, features

    monkeypatch.setattr(dump, "_computed", counted)
    dump.dump(encoder_folder, str(tones), tmp_path / target, layers="2", batch_seconds=1)
    assert len(computed) == len(set(computed)) == 12
    moved = shutil.copytree(encoder_folder, tmp_path / "moved")  # the same weights elsewhere
    dump.dump(str(moved), str(tones), tmp_path / target, layers="2")
    assert len(computed) == 12
    read = read_archive if target.endswith("h5") else read_folder
    assert len(read(tmp_path / target)) == 12
    with pytest.raises(DumpError, match=r"other features: layers is \[2\] there and \[3\] now"):
        dump.dump(encoder_folder, str(tones), tmp_path / target, layers="3")
    assert len(read(tmp_path / target)) == 12


def test_a_kill_while_the_parts_of_an_archive_are_deleted_does_no_harm(
    encoder_folder,
    tones,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    def killed(folder):
        (folder / "features.json").unlink()
        assert not any(folder.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(dump.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        dump.dump(encoder_folder, str(tones), tmp_path / "out.h5", layers="2")
    monkeypatch.undo()
    dump.dump(encoder_folder, str(tones), tmp_path / "out.h5", layers="2")
    assert len(read_archive(tmp_path / "out.h5")) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]


def test_what_is_no_archive_of_these_features_is_left_alone(encoder_folder, tones, tmp_path):  # noqa: F811
    def refused(name, why):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(DumpError, match=why):
            dump.dump(encoder_folder, str(tones), tmp_path / name, layers="2")
        assert (tmp_path / name).read_bytes() == before

    (tmp_path / "notes.h5").write_text("mine")
    refused("notes.h5", "notes.h5 is no HDF5 file")
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file.create_dataset("weights", data=[1.0])
    refused("weights.h5", "weights.h5 holds no features")


def test_more_utterances_join_a_finished_archive(encoder_folder, tones, tmp_path):  # noqa: F811
    target, line = tmp_path / "out.h5", {"layers": "2", "batch_seconds": 1}
    dump.dump(encoder_folder, str(tones / "u0.wav"), target, **line)
    assert len(read_archive(target)) == 1
    dump.dump(encoder_folder, str(tones), target, **line)
    assert len(read_archive(target)) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5"]
    before = target.stat().st_ino
    dump.dump(encoder_folder, str(tones), target, **line)
    assert target.stat().st_ino == before, "nothing to do"
    (tmp_path / "new.h5.unfinished").write_text("of an older version")
    with pytest.raises(DumpError, match="new.h5.unfinished is a file"):
        dump.dump(encoder_folder, str(tones), tmp_path / "new.h5", **line)


def test_another_model_or_other_audio_of_the_same_name_is_refused(
    encoder_folder,
    learned,  # noqa: F811
    tones,  # noqa: F811
    tmp_path,
):
    model = tmp_path / "model"
    shutil.copytree(learned[2], model)
    dump.dump(str(model), str(tones), tmp_path / "out")
    tensors = load_file(model / "trained.safetensors")
    tensors["fusion.output.weight"] += 1.0
    save_file(tensors, model / "trained.safetensors")
    with pytest.raises(DumpError, match="other features: trained is"):
        dump.dump(str(model), str(tones), tmp_path / "out")
    for target in ("states", "states.h5"):
        dump.dump(encoder_folder, str(tones / "u0.wav"), tmp_path / target, layers="2")
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        soundfile.write(other / "u0.wav", numpy.full(40_000, 0.1), 16000)
        with pytest.raises(DumpError, match="has u0 with .* frames, but .*u0.wav gives .*: other"):
            dump.dump(encoder_folder, str(other / "u0.wav"), tmp_path / target, layers="2")


def test_unreadable_recordings_are_named_and_the_others_are_done(
    encoder_folder,
    tones,  # noqa: F811
    tmp_path,
    capsys,
):
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "short.wav", numpy.full(20, 0.1), 16000)
    rows = [("good", tones / "u0.wav"), ("gone", tmp_path / "gone.wav")]
    rows += [("text", tmp_path / "text.wav"), ("short", tmp_path / "short.wav")]
    write_manifest(
        tmp_path / "data.csv",
        [{"ID": name, "duration": 1.0, "wav": str(path)} for name, path in rows],
        ["ID", "duration", "wav"],
    )
    line = [encoder_folder, str(tmp_path / "data.csv"), str(tmp_path / "out"), "--layers", "2"]
    with pytest.raises(SystemExit) as stopped:
        dump.main(line)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "gone.wav: no such audio file" in said and "text.wav: not a readable" in said
    found = read_folder(tmp_path / "out")
    assert found.keys() == {"good", "short"} and found["short"].shape == (1, 1, 24)


def test_recordings_that_are_too_long_and_names_in_other_codes_are_named(
    make_encoder_folder, tmp_path, capsys
):
    folder = tmp_path / "speech"
    folder.mkdir()
    encoder = SSLEncoder(make_encoder_folder("whisper"), layers="last:1")
    most = encoder.maximum_samples
    for name, samples in (("a", most // 2), ("b", most + 8000)):
        soundfile.write(folder / f"{name}.wav", numpy.full(samples, 0.1), 16000)
    shutil.copyfile(folder / "a.wav", os.fsencode(folder) + b"/caf\xe9.wav")
    line = [make_encoder_folder("whisper"), str(folder), str(tmp_path / "out.h5"), "--layers", "1"]
    with pytest.raises(SystemExit):
        dump.main(line)
    said = capsys.readouterr().err
    assert "b.wav: " in said and "but this encoder reads" in said and "caf\\udce9.wav" in said
    assert read_archive(tmp_path / "out.h5").keys() == {"a"}


def test_what_would_overwrite_or_mix_is_refused(encoder_folder, learned, tmp_path):  # noqa: F811
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, numpy.zeros(1600), 16000)
    with pytest.raises(DumpError, match="a.flac and .*a.wav would both be called a"):
        dump.dump(encoder_folder, str(tmp_path), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DumpError, match="mine is not empty and has no features.json"):
        dump.dump(encoder_folder, str(tmp_path / "a.wav"), tmp_path / "mine")
    with pytest.raises(DumpError, match="layers='2': the layers of an exported model"):
        dump.dump(str(learned[2]), str(tmp_path / "a.wav"), tmp_path / "out", layers="2")
    write_manifest(
        tmp_path / "away.csv",
        [{"ID": "../../b", "duration": 0.1, "wav": str(tmp_path / "a.wav")}],
        ["ID", "duration", "wav"],
    )
    with pytest.raises(DumpError, match="leads out of the target"):
        dump.dump(encoder_folder, str(tmp_path / "away.csv"), tmp_path / "out")
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name in ("a.wav", "a/b.wav"):
        soundfile.write(tmp_path / "in" / name, numpy.zeros(1600), 16000)
    with pytest.raises(DumpError, match="in an archive nothing can be called a and hold a/b"):
        dump.dump(encoder_folder, str(tmp_path / "in"), tmp_path / "out.h5")
    with pytest.raises(DumpError, match="not -"):
        dump.dump(encoder_folder, "-", tmp_path / "out")


def test_without_h5py_an_archive_is_refused_with_the_way_to_get_it(tmp_path):
    code = (
        "import sys; sys.modules['h5py'] = None\n"
        "from hff_modules.dump import Archive\n"
        "from pathlib import Path\n"
        "try: Archive(Path(sys.argv[1]), {})\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.h5")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
    )
    assert "pip install 'hff-modules[features]'" in done.stdout


def test_half_precision_never_turns_into_infinity():
    big = numpy.array([1e9, -1e9, 1.5], dtype=numpy.float32)
    assert numpy.isfinite(dump._as("fp16", big)).all() and dump._as("fp16", big)[2] == 1.5
    assert torch.finfo(torch.float16).max == dump._as("fp16", big)[0]
