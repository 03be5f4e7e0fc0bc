import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from hff_modules import SSLEncoder, adapters
from hff_modules.cache import AudioDigests, CacheError, StateCache
from hff_modules.data.audio import AudioError
from tests.corpora import in_two_processes

SECONDS = [0.4, 0.9, 0.6, 0.75]


@pytest.fixture
def wavs(tmp_path):
    paths = []
    for number, seconds in enumerate(SECONDS):
        path = tmp_path / f"{number}.wav"
        noise = np.random.RandomState(number).randn(int(16000 * seconds))
        soundfile.write(path, 0.1 * noise, 16000)
        paths.append(str(path))
    return paths


@pytest.fixture
def encoder(encoder_folder):
    return SSLEncoder(encoder_folder, layers=[1, 2, 4]).eval()


def alone(encoder, path):
    signal, _ = soundfile.read(path, dtype="float32")
    return encoder(torch.tensor(signal)[None])[0][:, 0].transpose(0, 1)


def files(cache):
    return sorted(cache.folder.glob("*/*.safetensors"))


@pytest.mark.parametrize(
    ("dtype", "error"), [("fp32", 1e-5), ("fp16", 1e-3), ("bf16", 8e-3), ("int8", 9e-3)]
)
def test_what_is_read_is_what_the_encoder_gives(dtype, error, encoder, wavs, tmp_path):
    cache = StateCache(tmp_path / "cache", encoder, dtype)
    spent = cache.fill(wavs, SECONDS, batch_seconds=2.0, progress=False)
    assert spent["utterances"] == 4 and len(files(cache)) == 4
    for path in wavs:
        states, expected = cache.read(path).float(), alone(encoder, path)
        assert states.shape == expected.shape
        assert (states - expected).norm() / expected.norm() < error
    again = cache.fill(wavs, SECONDS, progress=False)
    assert again["utterances"] == 0


def test_the_size_foretold_is_the_size_on_disk(encoder, wavs, tmp_path):
    for dtype in ("fp32", "fp16", "int8"):
        cache = StateCache(tmp_path / "cache", encoder, dtype)
        foretold = cache.fill(wavs, SECONDS, progress=False)["gigabytes"] * 1e9
        headers = 300 * len(wavs)
        assert (
            abs(sum(f.stat().st_size for f in files(cache)) - foretold) < headers + 0.05 * foretold
        )


@pytest.mark.parametrize("family", ["wav2vec2-base", "wavlm-base", "whisper", "data2vec-audio"])
def test_stored_states_stand_in_for_the_waveforms(family, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder(family), layers=[0, 2, 4]).eval()
    wavs, wav_lens = torch.randn(2, 12_000), torch.tensor([1.0, 0.7])
    states, lengths = encoder(wavs, wav_lens)
    stored, frames = encoder.encode(wavs, wav_lens)
    restored, again = encoder(stored, frames / frames.max())
    assert encoder.stored_layers == [0, 2, 4] and again.tolist() == lengths.tolist()
    assert torch.equal(restored, states)


def test_another_encoder_layer_choice_precision_or_type_has_another_place(encoder_folder, tmp_path):
    def place(dtype="fp16", **settings):
        settings = {"layers": [1, 2, 4], **settings}
        return StateCache(tmp_path, SSLEncoder(encoder_folder, **settings), dtype).folder

    places = [
        place(),
        place("fp32"),
        place(layers=[2, 4]),
        place(precision="bf16"),
        place(pretrained=False),
        place(pretrained=False, seed=1),
    ]
    assert len(set(places)) == len(places)
    assert place() == places[0]
    assert list(json.loads((places[0] / "key.json").read_text())["weights"]) == ["1", "2", "4"]


def test_what_lies_above_the_horizon_does_not_matter(encoder_folder, tmp_path):
    def place(**options):
        encoder = SSLEncoder(encoder_folder, layers=[4])
        adapters.attach(encoder, "tpa", bottleneck=4, layers="last:2", **options)
        return StateCache(tmp_path, encoder)

    first, second = place(), place(activation="gelu")
    assert first.layers == [2] and first.folder == second.folder


def test_a_frozen_adapter_below_the_horizon_has_a_place_of_its_own(encoder_folder, tmp_path):
    plain = SSLEncoder(encoder_folder, layers=[4])
    adapted = SSLEncoder(encoder_folder, layers=[4])
    adapter = adapters.attach(adapted, "tpa", bottleneck=4)
    adapter.requires_grad_(False)
    assert adapted.horizon == 4
    assert StateCache(tmp_path, adapted).folder != StateCache(tmp_path, plain).folder


def test_frozen_adapters_one_behind_the_other_have_a_place_for_each_order(encoder_folder, tmp_path):
    places = set()
    for names in ("ab", "ba"):
        encoder = SSLEncoder(encoder_folder, layers=[4])
        for name in names:
            torch.manual_seed(ord(name))
            adapters.attach(encoder, "houlsby", name, bottleneck=4).requires_grad_(False)
        places.add(StateCache(tmp_path, encoder).folder)
    assert len(places) == 2


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_more_layers_of_the_same_encoder_serve_for_fewer(dtype, encoder_folder, wavs, tmp_path):
    whole = StateCache(tmp_path / "cache", SSLEncoder(encoder_folder, layers="all"), dtype)
    whole.fill(wavs, SECONDS, progress=False)
    part = StateCache(tmp_path / "cache", SSLEncoder(encoder_folder, layers=[0, 2]), dtype)
    assert part.fill(wavs, SECONDS, progress=False)["utterances"] == 0
    for path in wavs:
        assert torch.equal(part.read(path), whole.read(path)[:, [0, 2]])
    for other in (
        StateCache(tmp_path / "cache", SSLEncoder(encoder_folder, layers=2), "fp32"),
        StateCache(tmp_path / "cache", SSLEncoder(encoder_folder, 2, pretrained=False), dtype),
    ):
        assert other.fill(wavs, SECONDS, progress=False)["utterances"] == 4


def test_what_a_place_with_more_layers_lacks_is_kept_beside_it(encoder_folder, wavs, tmp_path):
    whole = StateCache(tmp_path / "cache", SSLEncoder(encoder_folder, layers="all"))
    whole.fill(wavs[:2], SECONDS[:2], progress=False)
    part = StateCache(tmp_path / "cache", SSLEncoder(encoder_folder, layers=[0, 2]))
    assert part.fill(wavs[:2], SECONDS[:2], progress=False)["utterances"] == 0
    assert part.fill(wavs, SECONDS, progress=False)["utterances"] == len(wavs) - 2
    assert len(files(whole)) == 2 and len(files(part)) == len(wavs) - 2
    whole.fill(wavs, SECONDS, progress=False)
    for path in wavs:
        assert torch.equal(part.read(path), whole.read(path)[:, [0, 2]])


def test_changed_audio_under_the_same_name_is_not_taken_for_the_old(encoder, wavs, tmp_path):
    StateCache(tmp_path / "cache", encoder).fill(wavs, SECONDS, progress=False)
    soundfile.write(wavs[1], np.random.RandomState(9).randn(14400) * 0.1, 16000)
    cache = StateCache(tmp_path / "cache", encoder)
    assert [wav for wav in wavs if not cache.path(wav).exists()] == [wavs[1]]
    with pytest.raises(CacheError, match="1.wav are not in"):
        cache.read(wavs[1])


def test_a_copy_elsewhere_finds_the_same_entry(encoder, wavs, tmp_path):
    cache = StateCache(tmp_path / "cache", encoder)
    cache.fill(wavs, SECONDS, progress=False)
    shutil.copy(wavs[0], tmp_path / "copy.wav")
    assert torch.equal(cache.read(tmp_path / "copy.wav"), cache.read(wavs[0]))


def test_an_interrupted_filling_leaves_whole_entries_and_goes_on(encoder, wavs, tmp_path):
    cache = StateCache(tmp_path / "cache", encoder)
    compute, done = cache._compute, []

    def interrupted(batch, unreadable):
        if done:
            raise KeyboardInterrupt
        compute(batch, unreadable)
        done.extend(batch)

    cache._compute = interrupted
    with pytest.raises(KeyboardInterrupt):
        cache.fill(wavs, SECONDS, batch_seconds=1.0, progress=False)
    fresh = StateCache(tmp_path / "cache", encoder)
    assert len(files(fresh)) == len(done) > 0
    assert fresh.fill(wavs, SECONDS, progress=False)["utterances"] == 4 - len(done)
    assert all(f.name.endswith(".safetensors") for f in fresh.folder.glob("*/*"))


def test_too_small_a_disk_is_refused_before_anything_is_computed(
    encoder, wavs, tmp_path, monkeypatch
):
    cache = StateCache(tmp_path / "cache", encoder)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 10))
    with pytest.raises(CacheError, match="only 0.00 GB are free"):
        cache.fill(wavs, SECONDS, progress=False)
    assert not files(cache)


def test_too_small_a_budget_is_refused_and_counts_what_is_there(encoder, wavs, tmp_path):
    cache = StateCache(tmp_path / "cache", encoder)
    cache.fill(wavs[:3], SECONDS[:3], progress=False)
    there = sum(f.stat().st_size for f in files(cache)) / 1e9
    with pytest.raises(CacheError, match="cache_gigabytes: expected a number, got '0.5GB'"):
        StateCache(tmp_path / "cache", encoder, max_gigabytes="0.5GB")
    tight = StateCache(tmp_path / "cache", encoder, max_gigabytes=1.01 * there)
    with pytest.raises(CacheError, match="budget"):
        tight.fill(wavs, SECONDS, progress=False)
    assert len(files(cache)) == 3


def test_all_files_that_cannot_be_read_are_named_and_the_others_stored(encoder, wavs, tmp_path):
    for number in (1, 2):
        soundfile.write(wavs[number], [0.1, float("nan")] * 4000, 16000, subtype="FLOAT")
    Path(wavs[3]).unlink()
    cache = StateCache(tmp_path / "cache", encoder)
    unreadable = r"(?s)3 audio files cannot be read.*1\.wav.*2\.wav.*3\.wav"
    with pytest.raises(AudioError, match=unreadable):
        cache.fill(wavs, SECONDS, batch_seconds=0.1, progress=False)
    assert len(files(cache)) == len(wavs) - 3
    assert len(json.loads((tmp_path / "cache/audio.json").read_text())) == len(wavs) - 1


def test_a_damaged_entry_is_named(encoder, wavs, tmp_path):
    cache = StateCache(tmp_path / "cache", encoder)
    cache.fill(wavs, SECONDS, progress=False)
    cache.path(wavs[0]).write_bytes(b"\x00" * 20)
    with pytest.raises(CacheError, match=f"{cache.path(wavs[0]).name} is damaged.*delete it"):
        cache.read(wavs[0])


def test_full_fine_tuning_has_nothing_to_cache(encoder_folder, tmp_path):
    encoder = SSLEncoder(encoder_folder)
    adapters.attach(encoder, "full")
    with pytest.raises(CacheError, match="nothing of this encoder can be cached.*horizon -1"):
        StateCache(tmp_path, encoder)


def test_nothing_is_stored_of_an_adapted_whisper(make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("whisper"), layers=[2, 4])
    assert encoder.stored_layers == [2, 4]
    adapters.attach(encoder, "tpa", layers="last:1", bottleneck=4)
    assert encoder.horizon == 3 and encoder.stored_layers == []


def test_an_unknown_type_is_refused(encoder, tmp_path):
    with pytest.raises(CacheError, match="dtype='int4'.*fp32, fp16, bf16, int8"):
        StateCache(tmp_path, encoder, "int4")


SHARED = """
import json, sys
import torch
from speechbrain.utils.distributed import ddp_init_group, run_on_main
from hff_modules import SSLEncoder
from hff_modules import cache as module
from hff_modules.cache import CacheError, StateCache
from hff_modules.data.audio import AudioError

module.ATTEMPTS = 2
about = json.loads(sys.argv[1])
ddp_init_group({"distributed_backend": "gloo"})
encoder = SSLEncoder(about["encoder"], layers=[1, 2, 4])
computed = []

def cache_at(folder, layers=None):
    chosen = encoder if layers is None else SSLEncoder(about["encoder"], layers=layers)
    cache = StateCache(folder, chosen)
    compute = cache._compute
    cache._compute = lambda batch, unreadable: computed.append(batch) or compute(batch, unreadable)
    return cache

cache = cache_at("cache")
good, bad = about["wavs"], about["bad"]
spent = cache.fill(good, about["seconds"], batch_seconds=0.1)["utterances"]
outcome = {"spent": spent, "computed": [wav for ((wav, _),) in computed]}
outcome["known"] = len(cache.digests._known)
outcome["sum"] = float(cache.read(good[0]).double().sum())
few = cache_at("cache", [2])
assert few.fill(good, about["seconds"])["utterances"] == 0 and few.read(good[1]).shape[1] == 1
run_on_main(cache_at("mine").fill, args=[good, about["seconds"]])  # nobody waits for anybody
try:
    cache_at("bad").fill(bad, [0.5] * len(bad), batch_seconds=0.1)
except AudioError as error:
    outcome["error"] = str(error)
rank = torch.distributed.get_rank()
try:
    cache_at(f"not-shared-{rank}").fill(good, about["seconds"], batch_seconds=0.1)
except CacheError as error:
    outcome["not shared"] = str(error)
with open(f"{rank}.json", "w") as file:
    json.dump(outcome, file)
"""


def test_processes_that_train_together_share_the_work(encoder_folder, encoder, wavs, tmp_path):
    bad = [str(tmp_path / f"bad{number}.wav") for number in range(2)]
    for path in bad:
        soundfile.write(path, [0.1, float("nan")] * 4000, 16000, subtype="FLOAT")
    (tmp_path / "script.py").write_text(SHARED)
    about = {"encoder": str(encoder_folder), "wavs": wavs, "seconds": SECONDS, "bad": bad}
    in_two_processes(tmp_path / "script.py", [json.dumps(about)])
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(first["computed"]) == len(second["computed"]) == 2
    assert {*first["computed"], *second["computed"]} == {*wavs}
    cache = StateCache(tmp_path / "alone", encoder)
    cache.fill(wavs, SECONDS, batch_seconds=0.1)
    for outcome in (first, second):
        assert outcome["spent"] == outcome["known"] == 4, "hashed once, by the main process"
        assert outcome["sum"] == pytest.approx(float(cache.read(wavs[0]).double().sum()))
        assert all(path in outcome["error"] for path in bad)
        assert "must be on a disk that all machines share" in outcome["not shared"]


def test_runs_add_to_what_is_known_of_the_audio(wavs, tmp_path):
    one, other = AudioDigests(tmp_path / "audio.json"), AudioDigests(tmp_path / "audio.json")
    one.of(wavs[0])
    other.of(wavs[1])
    one.save()
    other.save()
    assert json.loads((tmp_path / "audio.json").read_text()).keys() == {*wavs[:2]}
