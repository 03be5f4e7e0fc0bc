"""Speech at other speeds, and filling the cache without training."""

import json

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.utils.epoch_loop import EpochCounter

from hff_modules import SSLEncoder
from hff_modules.brains import train_ctc
from hff_modules.cache import StateCache
from hff_modules.config import load_config
from hff_modules.data.audio import read_audio
from hff_modules.data.loading import add_signal, drop_unalignable, filled_cache, read_speech
from hff_modules.data.speed import SpeedChoice, change_speed, vary_speed
from hff_modules.data.text import CharUnits
from tests.test_training import arguments, make_speech, trained_tensors

SPEEDS = [0.9, 1.0, 1.1]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data", make_speech(tmp_path / "data", 6)["train"]


def settings(tmp_path, **changes):
    return {
        **{"speed": SPEEDS, "speed_cache": "variants", "cache": str(tmp_path / "cache")},
        **{"cache_dtype": "fp32", "cache_gigabytes": None, "batch_seconds": 3.0},
        **{"epoch_counter": EpochCounter(3), "seed": 1, **changes},
    }


def train(data, tmp_path, encoder, *options, name="run"):
    folder, csv = data
    base = tmp_path / "tones.yaml"
    base.write_text("extends: base/ctc.yaml\ndataset: tones\n")
    line = arguments(tmp_path / name, encoder, "fusion", "--layers", "[2, 4]", *options)
    return train_ctc(*load_config(line, base), folder, [csv], [csv], {"tones": csv})


def test_a_choice_depends_on_epoch_utterance_and_seed_and_on_nothing_else():
    def choices(seed, epochs=3):
        counter = EpochCounter(epochs)
        choice = SpeedChoice(SPEEDS, counter, seed)
        return [[choice.of(f"u{n}") for n in range(300)] for _ in counter]

    state = torch.get_rng_state()
    first = choices(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == choices(seed=1) and first != choices(seed=2)
    assert first[0] != first[1] != first[2]
    assert all(60 < sum(epoch.count(s) for epoch in first) / 3 < 140 for s in SPEEDS)


def test_a_slower_tone_is_longer_and_lower():
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
    for speed in (0.9, 1.1):
        other = change_speed(tone, speed)
        assert len(other) == pytest.approx(16000 / speed, abs=2)
        peak = torch.fft.rfft(other * torch.hann_window(len(other))).abs().argmax()
        assert float(peak) * 16000 / len(other) == pytest.approx(440 * speed, abs=2)
    assert change_speed(tone, 1.0) is tone


def test_each_speed_is_stored_once_and_read_for_its_epoch(data, tmp_path, encoder_folder):
    folder, csv = data
    encoder = SSLEncoder(encoder_folder, layers=[2, 4]).eval()
    hparams = settings(tmp_path)
    train_set, dev_set = read_speech([csv], folder), read_speech([csv], folder)
    vary_speed(train_set, hparams)
    cache = filled_cache(hparams, encoder, [train_set, dev_set])
    entries = list(cache.folder.glob("*/*.safetensors"))
    assert len(entries) == 6 * len(SPEEDS)
    for dataset in (train_set, dev_set):
        add_signal(dataset, encoder.minimum_samples, cache)
    seen = set()
    for _ in hparams["epoch_counter"]:
        for item in train_set:
            speed = train_set.speeds.of(item["id"])
            wav = change_speed(read_audio(train_set.data[item["id"]]["wav"]), speed)
            expected = encoder(wav[None])[0][:, 0].transpose(0, 1)
            torch.testing.assert_close(item["signal"], expected, rtol=1e-4, atol=1e-4)
            seen.add(speed)
    assert seen == set(SPEEDS)
    plain = StateCache(hparams["cache"], encoder, "fp32")
    for item in dev_set:
        assert torch.equal(item["signal"], plain.read(dev_set.data[item["id"]]["wav"]))


def test_the_size_foretold_counts_every_speed(data, tmp_path, encoder_folder):
    folder, csv = data
    rows = [row for row in read_speech([csv], folder).data.values() for _ in SPEEDS]
    cache = StateCache(tmp_path / "cache", SSLEncoder(encoder_folder, layers=[4]))
    spent = cache.fill(
        [row["wav"] for row in rows],
        [row["duration"] for row in rows],
        progress=False,
        speeds=SPEEDS * 6,
    )
    size = sum(f.stat().st_size for f in cache.folder.glob("*/*.safetensors"))
    assert spent["utterances"] == 18
    assert abs(size - 1e9 * spent["gigabytes"]) < 18 * 300 + 0.05 * size


def test_training_at_several_speeds_goes_alike_with_and_without_a_cache(
    data, tmp_path, encoder_folder
):
    options = ["--speed", "[0.9, 1.1]"]
    without = train(data, tmp_path, encoder_folder, *options, name="without")
    stored = ["--cache", str(tmp_path / "store"), "--cache_dtype", "fp32"]
    cached = train(data, tmp_path, encoder_folder, *options, *stored, name="cached")
    plain = train(data, tmp_path, encoder_folder, name="plain")

    def losses(results):
        return [epoch["train_loss"] for epoch in results["history"]]

    assert losses(cached) == pytest.approx(losses(without), rel=1e-3)
    assert losses(plain) != pytest.approx(losses(without), rel=1e-3)
    assert trained_tensors(tmp_path / "cached").keys() == trained_tensors(tmp_path / "plain").keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 0.9}, "expected a list"),
        ({"speed": [0.9, "fast"]}, "got 'fast'"),
        ({"speed": [0.9, 3.0]}, "from 0.5 to 2.0.*got 3.0"),
        ({"speed": [0.955]}, "two decimals, got 0.955"),
        ({"speed": [1.0, 1]}, "different speeds"),
        ({"speed_cache": "some"}, "speed_cache: expected one of variants, refuse"),
        ({"speed_cache": "refuse"}, "would store the training part 3 times"),
    ],
)
def test_speeds_that_cannot_be_used_are_refused(changes, message, data, tmp_path):
    dataset = read_speech([data[1]], data[0])
    with pytest.raises(ValueError, match=message):
        vary_speed(dataset, settings(tmp_path, **changes))
    assert not hasattr(dataset, "speeds")


def test_refusing_stored_variants_lets_a_run_without_a_cache_vary(data, tmp_path):
    dataset = read_speech([data[1]], data[0])
    vary_speed(dataset, settings(tmp_path, speed_cache="refuse", cache=None))
    assert dataset.speeds.speeds == SPEEDS


def test_an_utterance_too_short_at_its_fastest_is_left_out(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    csv = tmp_path / "a.csv"
    row = "ID,duration,wav,spk_id,wrd\n"
    csv.write_text(row + f"a,1.0,{tmp_path}/a.wav,s,ABABABABAB\nb,2.0,{tmp_path}/a.wav,s,AB\n")
    units = CharUnits.from_texts(["AB"])

    def kept(speeds):
        dataset = read_speech([csv], tmp_path)
        vary_speed(dataset, settings(tmp_path, speed=speeds))
        return drop_unalignable(dataset, units, lambda samples: samples // 1600).data_ids

    assert kept([]) == kept([0.9, 1.0]) == ["a", "b"] and kept([1.0, 1.1]) == ["b"]


def test_filling_only_stores_all_states_and_trains_nothing(
    data, tmp_path, encoder_folder, capsys, monkeypatch
):
    store = ["--cache", str(tmp_path / "store"), "--speed", "[0.9, 1.0]"]
    with pytest.raises(SystemExit) as end:
        train(data, tmp_path, encoder_folder, *store, "--fill_only", "true")
    assert end.value.code == 0 and "states [2, 4] are in" in capsys.readouterr().out
    assert len(list((tmp_path / "store").glob("*/*/*.safetensors"))) == 12
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.setattr(StateCache, "_compute", None)  # nothing is left to compute
    train(data, tmp_path, encoder_folder, *store)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["epochs"] == 2


def test_filling_only_without_a_place_is_refused(data, tmp_path, encoder_folder):
    with pytest.raises(ValueError, match="fill_only: there is nothing to store, as cache is null"):
        train(data, tmp_path, encoder_folder, "--fill_only", "true")


def test_the_time_of_a_long_filling_is_foretold(
    data, tmp_path, encoder_folder, caplog, monkeypatch
):
    monkeypatch.setattr("hff_modules.cache.WORTH_SAYING", 0.1)
    rows = read_speech([data[1]], data[0]).data.values()
    cache = StateCache(tmp_path / "cache", SSLEncoder(encoder_folder, layers=[4]))
    with caplog.at_level("INFO"):
        cache.fill([r["wav"] for r in rows], [r["duration"] for r in rows], progress=False)
    assert "GB in" in caplog.text and " minutes" in caplog.text
