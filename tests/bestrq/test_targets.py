"""Codes that are predicted, and the states and cepstra that they are clusters of."""

import contextlib
import os

import numpy as np
import pytest
import targets
import torch
from transformers import Wav2Vec2BertModel
from transformers.audio_utils import mel_filter_bank

from tests.bestrq.runs import tiny_config
from tests.pretend_gpu import PretendGPU


def test_random_projection_codes_are_those_of_speechbrain():
    from speechbrain.nnet.quantisers import RandomProjectionQuantizer

    features = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float32)
    codes = targets.random_projection(features, codebooks=2, codes=32, seed=3)
    torch.manual_seed(3)
    for book in range(2):
        quantizer = RandomProjectionQuantizer(24, 16, 32)
        assert quantizer(torch.from_numpy(features)[None])[0].tolist() == codes[:, book].tolist()


def test_cepstral_views_do_not_look_across_utterances():
    features = np.random.default_rng(0).standard_normal((30, 320)).astype(np.float16)
    other = features.copy()
    other[20:] += 5
    bounds = [(0, 20), (20, 10)]
    views, others = (targets.cepstral_views(f, bounds)(0, 30) for f in (features, other))
    for view, changed in zip(views, others, strict=True):
        scale = (changed[0] / view[0])[None]
        np.testing.assert_allclose(view[:20] * scale, changed[:20], rtol=1e-3, atol=1e-4)


def test_codes_do_not_depend_on_the_size_of_blocks(monkeypatch):
    features = np.random.default_rng(0).standard_normal((300, 320)).astype(np.float16)
    bounds = [(0, 5), (5, 100), (105, 1), (106, 194)]
    read = []

    class OnDisk:
        def __len__(self):
            return len(features)

        def __getitem__(self, span):
            read.append(len(features[span]))
            return features[span]

    def codes():
        views_at = targets.cepstral_views(OnDisk(), bounds)
        return targets.cluster(views_at, 300, 4, sample=200)

    expected = codes()
    projected = targets.random_projection(features, 2, 16)
    read.clear()
    monkeypatch.setattr(targets, "BLOCK", 7)
    assert (codes() == expected).mean() > 0.99
    assert (targets.random_projection(features, 2, 16) == projected).all()
    assert max(read) <= 7 + 4  # memory does not grow with the hours


def test_clusters_of_a_sample_name_all_frames():
    points = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    codes = targets.cluster(lambda a, b: [points[a:b], points[a:b, :1]], 50, 4, sample=20, seed=1)
    drawn = np.random.default_rng(1).permutation(50)[:20]
    for book, view in enumerate([points, points[:, :1]]):
        view = torch.from_numpy(view)
        centres = targets.kmeans(view[drawn], 4, seed=1)
        assert targets.assign(view, centres).tolist() == codes[:, book].tolist()


@pytest.mark.parametrize(("bf16", "device"), [(False, "cpu"), (True, "cpu"), (False, "cuda:0")])
def test_teacher_states_are_those_of_each_utterance_or_piece_of_it_alone(tmp_path, bf16, device):
    model = Wav2Vec2BertModel(tiny_config(num_hidden_layers=3)).eval()
    model.save_pretrained(tmp_path)
    features = np.memmap(tmp_path / "features", np.float16, mode="w+", shape=(30, 320))
    features[:] = np.random.default_rng(0).standard_normal((30, 320))
    bounds = [(0, 20), (20, 10)]
    given = (str(tmp_path), features, bounds, [1, 2], tmp_path / "s", 12)
    with PretendGPU() if device == "cuda:0" else contextlib.nullcontext():
        states = targets.states_of(*given, workers=1, bf16=bf16, device=device)
    close = 0.1 if bf16 else 5e-3
    for start, stop in ((0, 10), (10, 20), (20, 30)):
        with torch.no_grad():
            inputs = torch.from_numpy(features[start:stop].astype(np.float32))[None]
            alone = model(inputs, output_hidden_states=True).hidden_states
        for layer in (1, 2):
            np.testing.assert_allclose(states[layer - 1, start:stop], alone[layer][0], atol=close)


def test_a_disk_too_full_for_states_is_said_before_they_are_made(tmp_path, monkeypatch):
    Wav2Vec2BertModel(tiny_config(num_hidden_layers=1)).save_pretrained(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="GB for the teacher's states .No space.*states.f16"):
        path = tmp_path / "states.f16"
        targets.states_of(str(tmp_path), np.zeros((9, 320)), [(0, 9)], [1], path, 9, workers=1)
    assert not path.exists()


def test_position_scores_are_those_of_an_embedding_for_every_pair_of_frames():
    shape = {"position_embeddings_type": "relative_key", "left_max_position_embeddings": 3}
    model = Wav2Vec2BertModel(tiny_config(num_hidden_layers=1, **shape))
    attention = model.encoder.layers[0].self_attn
    query = torch.randn(2, 4, 15, 8)
    pairs = (torch.arange(15)[None] - torch.arange(15)[:, None]).clamp(-3, 8) + 3
    embedded = attention.distance_embedding(pairs)
    expected = torch.einsum("bhld,lrd->bhlr", query, embedded) * attention.scaling
    torch.testing.assert_close(targets.relative_key_scores(attention, query, query)[1], expected)


def test_bands_are_silenced_in_all_frames_and_nothing_else():
    features = np.ones((5, 320), np.float32)
    silenced = set()
    for _ in range(200):
        heard = targets.without_bands(features, 1, 20).reshape(-1, 80)
        assert (heard == heard[0]).all()
        band = np.flatnonzero(heard[0] == 0)
        assert len(band) <= 20 and (np.diff(band) == 1).all()
        silenced.update(band)
    assert features.all() and silenced == set(range(80))


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.15])
def test_a_peak_is_heard_at_its_frequency_times_the_factor(factor):
    filters = mel_filter_bank(4097, 80, 20, 8000, 16000, None, "kaldi", True)
    centres = filters.argmax(0) * 8000 / 4096  # Hz
    for peak in (20, 40, 60):
        features = np.zeros((1, 320), np.float32)
        features[0, 80 + peak] = 1.0  # the second of four stacked frames
        heard = targets.warped(features, factor).reshape(4, 80)
        assert not heard[[0, 2, 3]].any()
        found = (heard[1] * centres).sum() / heard[1].sum()
        assert found == pytest.approx(centres[peak] * factor, rel=0.02)
