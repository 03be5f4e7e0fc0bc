import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from speechbrain.dataio.dataset import DynamicItemDataset

from hff_modules import HierarchicalFusion, SSLEncoder, adapters
from hff_modules.data.loading import filled_cache
from hff_modules.frontend import KaldiLogMel, WhisperLogMel
from tests.conftest import FAMILIES, VARIANTS

every_family = pytest.mark.parametrize("name", FAMILIES)
SAMPLES = 12_000


def speech(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wavs = torch.zeros(len(lengths), max(lengths))
    for wav, length in zip(wavs, lengths, strict=True):
        wav[:length] = 0.1 * torch.randn(length, generator=generator) + 0.02
    return wavs, torch.tensor(lengths) / max(lengths)


def fully_tuned(folder, layers):
    encoder = SSLEncoder(folder, layers=layers)
    adapters.attach(encoder, "full")
    return encoder.train()


def hugging_face_states(folder, wav):
    """What Hugging Face itself gives for one waveform: states 0 to L."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    kind = model.config.model_type
    if kind == "whisper":
        extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
        inputs = extractor(wav.numpy(), sampling_rate=16000, return_tensors="pt")
        model = model.encoder
    elif kind == "wav2vec2-bert":
        extractor = transformers.SeamlessM4TFeatureExtractor()
        inputs = extractor(wav.numpy(), sampling_rate=16000, return_tensors="pt")
    else:
        extractor = transformers.Wav2Vec2FeatureExtractor()
        inputs = extractor(wav.numpy(), sampling_rate=16000, return_tensors="pt")
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    return [*out.hidden_states[:-1], out.last_hidden_state]


@every_family
def test_selected_states_are_hugging_faces_own(name, make_encoder_folder):
    folder = make_encoder_folder(name)
    (wav,), _ = speech(SAMPLES)
    encoder = SSLEncoder(folder, layers=[0, 2, 4]).eval()
    states, lengths = encoder(wav[None])
    theirs = hugging_face_states(folder, wav)
    assert encoder.num_layers == 4 and states.shape[-1] == encoder.hidden_size == 24
    frames = int(lengths)
    assert states.shape[2] == frames
    for state, number in zip(states, encoder.layers, strict=True):
        torch.testing.assert_close(state, theirs[number][:, :frames], rtol=1e-3, atol=1e-4)


@every_family
def test_truncated_equals_untruncated_and_the_rest_is_gone(name, make_encoder_folder):
    folder = make_encoder_folder(name)
    wavs, wav_lens = speech(SAMPLES, 9_000)
    whole = SSLEncoder(folder, layers=[1, 2, 4])
    cut = SSLEncoder(folder, layers=[1, 2])
    assert torch.equal(whole(wavs, wav_lens)[0][:2], cut(wavs, wav_lens)[0])
    sizes = [sum(p.numel() for p in encoder.parameters()) for encoder in (whole, cut)]
    assert len(cut._family.layers) == 2 and sizes[1] < 0.8 * sizes[0]


@every_family
def test_state_zero_alone_needs_no_layer(name, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder(name), layers=0)
    wavs, wav_lens = speech(SAMPLES, 9_000)
    states, _ = encoder(wavs, wav_lens)
    both, _ = SSLEncoder(make_encoder_folder(name), layers=[0, 1])(wavs, wav_lens)
    assert encoder.top == 0 and torch.equal(states[0], both[0])


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_an_utterance_gives_the_same_states_alone_as_in_a_padded_batch(name, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder(name), layers="all")
    lengths = (7_001, SAMPLES, 9_130)
    wavs, wav_lens = speech(*lengths)
    wavs[0, 7_001:] = 0.3  # what lies behind the end must not matter
    together, frames = encoder(wavs, wav_lens)
    for row, length in enumerate(lengths):
        alone, (count,) = encoder(wavs[row : row + 1, :length])
        assert count == frames[row] == encoder.count_frames(torch.tensor([length]))
        difference = (together[:, row, :count] - alone[:, 0]).norm(dim=(1, 2))
        assert (difference / alone[:, 0].norm(dim=(1, 2))).max() < 1e-4


@every_family
def test_train_mode_changes_nothing_below_the_horizon(name, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder(name), layers="all")
    wavs, wav_lens = speech(SAMPLES, 9_000)
    before, _ = encoder.eval()(wavs, wav_lens)
    buffers = {key: value.clone() for key, value in encoder.named_buffers()}
    during, _ = encoder.train()(wavs, wav_lens)
    assert encoder.horizon == 4 and not during.requires_grad
    assert torch.equal(before, during)
    assert all(torch.equal(buffers[key], value) for key, value in encoder.named_buffers())


@every_family
def test_the_horizon_follows_from_what_is_trained(name, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder(name), layers="all").train()
    assert encoder.horizon == 4
    adapters.attach(encoder, "top_k", layers="last:2")
    assert encoder.horizon == 2
    graphs = []
    for layer in encoder._family.layers:
        layer.register_forward_hook(
            lambda _, args, out: graphs.append(
                (out[0] if type(out) is tuple else out).requires_grad
            )
        )
    wavs, wav_lens = speech(SAMPLES, 9_000)
    before, _ = SSLEncoder(make_encoder_folder(name), layers="all")(wavs, wav_lens)
    states, _ = encoder(wavs, wav_lens)
    assert graphs == [False, False, True, True]
    assert torch.equal(states[:3], before[:3])  # no dropout down there
    states[-1].square().sum().backward()
    front = encoder._family.layers[:2].parameters()
    assert all(p.grad is None for p in front)
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


@every_family
def test_in_full_fine_tuning_every_trained_tensor_moves_and_every_other_stays(
    name, make_encoder_folder
):
    encoder = fully_tuned(make_encoder_folder(name), layers=[2, 4])
    assert encoder.horizon == -1
    wavs, wav_lens = speech(SAMPLES, 9_000)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    trained = {key: p for key, p in encoder.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (encoder(wavs, wav_lens)[0] ** 3).sum().backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
    unused_bias = ("k_proj.bias", "linear_k.bias")  # softmax cancels it: its gradient is noise
    for key, value in encoder.state_dict().items():
        if key in trained:
            assert not torch.equal(before[key], value) or key.endswith(unused_bias), key
        elif "batch_norm" not in key:
            assert torch.equal(before[key], value), key


def test_weights_that_were_added_to_the_model_move_the_horizon_when_the_mode_is_set(encoder_folder):
    encoder = SSLEncoder(encoder_folder)
    before = encoder.horizon
    layer = encoder._family.layers[1]
    layer.added = torch.nn.Linear(2, 2)
    encoder.train()
    assert (before, encoder.horizon) == (encoder.top, 1)


def test_the_horizon_is_the_last_layer_when_only_the_final_norm_is_trained(make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("wav2vec2-large"), layers="all")
    encoder._family.final_norm.requires_grad_(True)
    assert encoder.horizon == 3


def test_the_front_end_in_training_leaves_no_horizon(make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("wav2vec2-base"), layers="all")
    encoder.model.feature_projection.projection.bias.requires_grad_(True)
    assert encoder.horizon == -1
    states, _ = encoder(*speech(SAMPLES, 9_000))
    assert states[0].requires_grad


def test_frozen_batch_norm_keeps_its_statistics_beside_trained_weights(make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("wav2vec2-conformer-rel"), layers="all")
    layer = encoder._family.layers[2]
    layer.ffn1.requires_grad_(True)
    norm = layer.conv_module.batch_norm
    mean = norm.running_mean.clone()
    encoder.train()(*speech(SAMPLES, 9_000))
    assert encoder.horizon == 2 and layer.training and torch.equal(norm.running_mean, mean)


def test_dropout_is_on_only_where_the_encoders_own_weights_are_trained(make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("wav2vec2-base"), layers="all")
    adapters.attach(encoder, "tpa", bottleneck=4, layers=[2, 3, 4])
    encoder._family.layers[3].feed_forward.requires_grad_(True)
    encoder.train()
    assert encoder.horizon == 1 and encoder.adapters.training
    assert [layer.training for layer in encoder._family.layers] == [False, False, False, True]


@every_family
def test_pure_fusion_saves_only_what_fusion_and_head_need(name, make_encoder_folder):
    def saved_bytes(states):
        seen = {}
        fusion = HierarchicalFusion(3, 24, 16, 24)
        head = torch.nn.Linear(24, 10)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            loss = head(fusion(states() if callable(states) else states)).sum()
        assert loss.requires_grad
        return sum(t.untyped_storage().nbytes() for t in seen.values())

    encoder = SSLEncoder(make_encoder_folder(name), layers=[1, 2, 4]).train()
    wavs, wav_lens = speech(SAMPLES, 9_000)
    ready, _ = encoder(wavs, wav_lens)
    assert saved_bytes(lambda: encoder(wavs, wav_lens)[0]) == saved_bytes(ready.clone())


def test_the_frozen_cnn_stays_out_of_the_graph_in_full_fine_tuning(make_encoder_folder):
    # In train mode Hugging Face makes the waveform require a gradient, and with it the whole CNN.
    encoder = fully_tuned(make_encoder_folder("wav2vec2-base"), layers="all")
    graphs = []
    encoder.model.feature_extractor.register_forward_hook(
        lambda _, args, out: graphs.append(out.requires_grad)
    )
    states, _ = encoder(*speech(SAMPLES))
    assert graphs == [False] and states[0].requires_grad


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["wav2vec2-base", "w2v-bert-2", "whisper"])
def test_half_precision_stays_below_the_horizon_and_close(family, precision, make_encoder_folder):
    folder = make_encoder_folder(family)
    wavs, wav_lens = speech(SAMPLES, 9_000)
    exact, _ = SSLEncoder(folder, layers=[2, 4])(wavs, wav_lens)
    encoder = SSLEncoder(folder, layers=[2, 4], precision=precision)
    states, _ = encoder(wavs, wav_lens)
    assert states.dtype == torch.float32 and not torch.equal(states, exact)
    assert (states - exact).norm() / exact.norm() < 0.03
    adapters.attach(encoder, "top_k", layers="last:2")
    dtypes = []
    encoder._family.layers[3].register_forward_hook(lambda m, a, out: dtypes.append(a[0].dtype))
    encoder(wavs, wav_lens)
    assert dtypes == [torch.float32]


@pytest.mark.parametrize("name", ["wav2vec2-conformer-rel", "wav2vec2-conformer-rotary"])
def test_half_precision_leaves_nothing_behind(name, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder(name), layers="all")
    wavs, wav_lens = speech(SAMPLES, 9_000)
    encoder.precision = "bf16"
    encoder(wavs, wav_lens)
    encoder.precision = "fp32"
    fresh = SSLEncoder(make_encoder_folder(name), layers="all")
    assert torch.equal(encoder(wavs, wav_lens)[0], fresh(wavs, wav_lens)[0])


def test_log_mels_are_no_matter_of_precision():
    wavs, wav_lens = speech(SAMPLES, 9_000)
    wavs = 5 * wavs  # loud enough for a power beyond what fp16 holds
    exact, _ = SSLEncoder("builtin", layers=[0, 6])(wavs, wav_lens)
    assert torch.equal(SSLEncoder("logmel", layers=0, precision="fp16")(wavs, wav_lens)[0],
                       SSLEncoder("logmel", layers=0)(wavs, wav_lens)[0])  # fmt: skip
    for precision, allowed in {"fp16": 0.005, "bf16": 0.03}.items():
        states, _ = SSLEncoder("builtin", layers=[0, 6], precision=precision)(wavs, wav_lens)
        assert (states - exact).norm() / exact.norm() < allowed
    with torch.autocast("cpu", torch.bfloat16):  # as when all of it is trained
        states, _ = fully_tuned("builtin", layers=[0, 2]).eval()(wavs, wav_lens)
    assert (states[0] - exact[0]).norm() / exact[0].norm() < 0.03


@every_family
def test_layers_above_half_precision_run_in_single_precision(name, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder(name), layers=[2, 4], precision="bf16")
    adapters.attach(encoder, "tpa", layers="last:2", bottleneck=4)
    states, _ = encoder.train()(*speech(SAMPLES, 9_000))
    states.sum().backward()
    assert states.isfinite().all() and states.dtype == torch.float32


def test_a_frozen_layer_has_no_dropout_though_the_front_is_trained(make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("wav2vec2-base"), layers=[2, 4])
    adapters.attach(encoder, "cnn")
    encoder.train()
    assert encoder.horizon == -1 and not any(m.training for m in encoder.model.modules())
    wavs, wav_lens = speech(SAMPLES)
    assert torch.equal(encoder(wavs, wav_lens)[0], encoder(wavs, wav_lens)[0])


def test_what_hugging_face_puts_behind_the_last_state_is_left_out(tmp_path):
    prefix, settings = FAMILIES["w2v-bert-2"]
    config = getattr(transformers, f"{prefix}Config")(**settings, add_adapter=True)
    getattr(transformers, f"{prefix}Model")(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"num_mel_bins": 80, "stride": 2}')
    encoder = fully_tuned(str(tmp_path), layers="all")
    states, _ = encoder(*speech(SAMPLES))
    states.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


def test_random_weights_of_the_same_shape_are_seeded_and_called_untrained(encoder_folder):
    wavs, wav_lens = speech(SAMPLES)
    trained = SSLEncoder(encoder_folder, layers=4)
    first, again, other = (
        SSLEncoder(encoder_folder, layers=4, pretrained=False, seed=seed) for seed in (1, 1, 2)
    )
    assert first.untrained and not trained.untrained
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, trained.fingerprint}) == 3
    assert torch.equal(first(wavs, wav_lens)[0], again(wavs, wav_lens)[0])


def test_the_manifest_is_json_and_names_the_content(encoder_folder, tmp_path):
    encoder = SSLEncoder(encoder_folder, layers=[2, 4])
    manifest = json.loads(json.dumps(encoder.manifest()))
    assert manifest["layers"] == [2, 4] and manifest["num_layers"] == 4
    changed = tmp_path / "changed"
    shutil.copytree(encoder_folder, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["encoder.layers.0.ffn1.intermediate_dense.bias"][0] += 1e-3
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert SSLEncoder(str(changed), layers=[2, 4]).fingerprint != manifest["fingerprint"]


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("w2v-bert-2", "hidden_act", "relu"),
        ("hubert-large", "num_attention_heads", 4),
        ("wav2vec2-base", "layer_norm_eps", 0.1),
        ("whisper", "activation_function", "relu"),
    ],
)
def test_another_config_above_the_same_weights_is_another_encoder(
    make_encoder_folder, tmp_path, name, key, value
):
    folder = make_encoder_folder(name)
    changed = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, key: value}))
    one, other = SSLEncoder(folder, layers=4).eval(), SSLEncoder(str(changed), layers=4).eval()
    wavs, wav_lens = speech(SAMPLES)
    assert not torch.allclose(one(wavs, wav_lens)[0], other(wavs, wav_lens)[0], atol=1e-6)
    assert one.fingerprint != other.fingerprint  # or one would read the other's stored states
    (changed / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0"}))
    assert SSLEncoder(str(changed), layers=4).fingerprint == one.fingerprint


def test_frame_rate_and_shortest_utterance(make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("w2v-bert-2"), layers=1)
    assert encoder.frame_rate == 50.0
    shortest = encoder.minimum_samples
    assert encoder.count_frames(torch.tensor([shortest, shortest - 1])).tolist() == [1, 0]
    assert encoder(torch.randn(1, shortest))[1].tolist() == [1]
    with pytest.raises(ValueError, match=f"utterance 1 .* 100 samples.*at least {shortest}"):
        encoder(torch.randn(2, 1000), torch.tensor([1.0, 0.1]))


def test_kaldi_log_mels_are_those_of_the_seamless_extractor():
    wav = (0.1 * np.random.RandomState(0).randn(16_321)).astype(np.float32)
    for stride in (2, 4):
        extractor = transformers.SeamlessM4TFeatureExtractor(stride=stride)
        theirs = extractor(wav, sampling_rate=16000, return_tensors="pt")["input_features"]
        ours, lengths = KaldiLogMel(80, stride)(torch.tensor(wav)[None], torch.tensor([len(wav)]))
        frames = int(lengths)
        torch.testing.assert_close(ours, theirs[:, :frames], rtol=1e-3, atol=2e-3)


def test_without_an_encoder_the_only_state_is_log_mels():
    encoder = SSLEncoder("logmel", layers="all").train()
    wavs, wav_lens = speech(SAMPLES, 9_000)
    states, lengths = encoder(wavs, wav_lens)
    expected, frames = KaldiLogMel(80, 4)(wavs, torch.tensor([SAMPLES, 9_000]))
    assert torch.equal(states[0], expected) and torch.equal(lengths, frames)
    assert (encoder.layers, encoder.top, encoder.horizon, encoder.hidden_size) == ([0], 0, 0, 320)
    assert encoder.device == torch.device("cpu"), "which has no parameter to be asked"
    with pytest.raises(ValueError, match="no layer 1"):
        SSLEncoder("logmel", layers=1)


def test_whisper_log_mels_are_those_of_its_extractor():
    wav = (0.1 * np.random.RandomState(0).randn(16_321)).astype(np.float32)
    extractor = transformers.WhisperFeatureExtractor(chunk_length=2)
    theirs = extractor(wav, sampling_rate=16000, return_tensors="pt")["input_features"]
    ours = WhisperLogMel(80, 2)(torch.tensor(wav)[None], torch.tensor([len(wav)]))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_whisper_refuses_more_than_its_window(make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("whisper"), layers=1)
    with pytest.raises(ValueError, match="at most 1 s at once.*has 1.2 s"):
        encoder(torch.randn(1, 19_200))


class TestAWrongFolder:
    def test_that_is_not_there_is_named(self):
        with pytest.raises(FileNotFoundError, match="'/no/such/encoder': there is no such folder"):
            SSLEncoder("/no/such/encoder")

    def test_without_a_config_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="config.json is missing"):
            SSLEncoder(str(tmp_path))

    def test_of_an_unknown_family_lists_the_known_ones(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(ValueError, match="family 'bert'; known families: .*hubert.*wavlm"):
            SSLEncoder(str(tmp_path))

    def test_with_a_broken_config_is_named(self, tmp_path):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match="config.json is not JSON"):
            SSLEncoder(str(tmp_path))

    def test_with_pickled_weights_only_is_refused(self, encoder_folder, tmp_path):
        shutil.copy(f"{encoder_folder}/config.json", tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(FileNotFoundError, match="no .*safetensors file"):
            SSLEncoder(str(tmp_path))

    def test_whose_weights_lack_tensors_is_refused(self, encoder_folder, tmp_path):
        folder = tmp_path / "lacking"
        shutil.copytree(encoder_folder, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors.pop("encoder.layers.2.ffn1.intermediate_dense.weight")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="lack 1 tensors.*layers.2.ffn1"):
            SSLEncoder(str(folder))

    def test_with_another_preprocessor_is_refused(self, encoder_folder, tmp_path):
        folder = tmp_path / "other"
        shutil.copytree(encoder_folder, folder)
        (folder / "preprocessor_config.json").write_text('{"num_mel_bins": 40, "stride": 2}')
        with pytest.raises(ValueError, match="num_mel_bins=40 and stride=2.*=160"):
            SSLEncoder(str(folder))


def test_settings_inside_a_processor_are_those_of_its_feature_extractor(
    make_encoder_folder, tmp_path
):
    plain, nested = tmp_path / "plain", tmp_path / "nested"
    settings = {"do_normalize": False, "feature_extractor_type": "Wav2Vec2FeatureExtractor"}
    for folder, file, content in (
        (plain, "preprocessor_config.json", settings),
        (nested, "processor_config.json", {"feature_extractor": settings}),
    ):
        shutil.copytree(make_encoder_folder("wavlm-base"), folder)
        (folder / "preprocessor_config.json").unlink(missing_ok=True)
        (folder / file).write_text(json.dumps(content))
    first, second = (SSLEncoder(str(folder), layers=4) for folder in (plain, nested))
    assert first.fingerprint == second.fingerprint
    wavs = 0.1 + speech(SAMPLES)[0]
    assert torch.equal(first(wavs)[0], second(wavs)[0])
    other = SSLEncoder(make_encoder_folder("wavlm-base"), layers=4)
    assert not torch.allclose(first(wavs)[0], other(wavs)[0], atol=1e-3)


@pytest.mark.parametrize("wav_lens", [[8000.0, 4000.0], [1.0, 1.2], [1.0, float("nan")]])
def test_lengths_that_are_no_shares_are_refused(encoder_folder, wav_lens):
    encoder = SSLEncoder(encoder_folder, layers=4)
    with pytest.raises(ValueError, match="wav_lens: expected each utterance's share"):
        encoder(torch.zeros(2, 8000), torch.tensor(wav_lens))


def test_utterances_that_whisper_cannot_take_are_named_before_the_work(make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("whisper"), layers=4)
    data = DynamicItemDataset({n: {"wav": n, "duration": s} for n, s in (("a", 0.9), ("b", 1.1))})
    with pytest.raises(ValueError, match=r"1 utterances \(b\) are longer than the 1 s that"):
        filled_cache({"cache": None}, encoder, [data])


def test_wrong_layers_and_precision_are_refused(encoder_folder):
    with pytest.raises(ValueError, match="no layer 5; this encoder has layers 0 to 4"):
        SSLEncoder(encoder_folder, layers=[5])
    with pytest.raises(ValueError, match="precision='int8'.*fp32, bf16, fp16"):
        SSLEncoder(encoder_folder, precision="int8")


def test_loading_is_quiet(encoder_folder, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SSLEncoder(encoder_folder, layers=[2, 4])
    out = capfd.readouterr()
    assert out.out == "" and "Loading" not in out.err


WITH_A_CNN = [name for name in FAMILIES if name != "whisper" and not name.startswith("w2v-bert")]


@pytest.mark.parametrize("name", WITH_A_CNN)
def test_a_cnn_run_one_by_one_gives_what_it_gives_for_the_batch(
    name, make_encoder_folder, monkeypatch
):
    def stay_together(padding, key, value):
        object.__setattr__(padding, key, True if key == "together" else value)

    encoder = SSLEncoder(make_encoder_folder(name), layers="all")
    wavs, wav_lens = speech(9_000, 30_000, 7_001)
    first, batches = encoder.model.feature_extractor.conv_layers[0].conv, []
    sliced, lengths = encoder(wavs, wav_lens)
    assert lengths.max() > 64  # more than a slice
    first.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    one_by_one, _ = encoder(wavs, wav_lens)
    monkeypatch.setattr(type(encoder._family.padding), "__setattr__", stay_together)
    together, _ = encoder(wavs, wav_lens)
    assert batches == [1, 1, 1, 3]
    for row, frames in enumerate(lengths.tolist()):
        for states in (one_by_one, sliced):
            torch.testing.assert_close(
                states[:, row, :frames], together[:, row, :frames], rtol=1e-4, atol=1e-5
            )


def test_what_is_given_to_the_cnn_is_not_written_over(make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("wav2vec2-base"), layers=[2])
    wavs, wav_lens = speech(SAMPLES, 9_000)
    before = wavs.clone()
    first, _ = encoder(wavs, wav_lens)
    assert torch.equal(wavs, before) and torch.equal(encoder(wavs, wav_lens)[0], first)


# Hub names


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached_repository(home, folder, name="lab/tiny"):
    """What a download leaves behind, in Hugging Face's layout."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return shutil.copytree(folder, place / "snapshots" / COMMIT)


def without_network(home, program):
    """Run a program that has Hugging Face's cache alone; gives what it prints."""
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


def test_of_a_hub_name_the_commit_is_known(encoder_folder, tmp_path):
    place = cached_repository(tmp_path, encoder_folder)
    cached_repository(tmp_path, encoder_folder, "lab/pickled")
    (tmp_path / "hub/models--lab--pickled/snapshots" / COMMIT / "model.safetensors").unlink()
    found = without_network(
        tmp_path,
        f"""
from hff_modules import SSLEncoder
for source, revision in (("lab/tiny", None), ("lab/tiny", "{COMMIT}"), ("{place}", None)):
    encoder = SSLEncoder(source, layers=[1], revision=revision)
    print(encoder.revision, encoder.manifest()["fingerprint"])
try:
    SSLEncoder("lab/pickled")
except FileNotFoundError as error:
    print(error)
""",
    )
    fingerprint = SSLEncoder(encoder_folder, layers=[1]).manifest()["fingerprint"]
    assert found[0] == found[1] == f"{COMMIT} {fingerprint}" and found[2] == f"None {fingerprint}"
    assert found[3].startswith("encoder 'lab/pickled' has no safetensors, nor could")
    assert "AutoModel.from_pretrained('lab/pickled').save_pretrained('folder')" in found[3]


def test_a_preprocessor_that_cannot_be_looked_up_is_not_replaced_by_defaults(
    encoder_folder, tmp_path
):
    place = cached_repository(tmp_path, encoder_folder)
    (place / "preprocessor_config.json").unlink()  # as AutoModel alone would leave the cache
    program = """
from hff_modules import SSLEncoder
try:
    SSLEncoder("lab/tiny")
except OSError as error:
    print(error)
"""
    (said, *_) = without_network(tmp_path, program)
    assert said.startswith("lab/tiny: preprocessor_config.json is not in the cache")


def test_gradient_checkpointing_is_refused(encoder_folder):
    encoder = SSLEncoder(encoder_folder)
    encoder.model.gradient_checkpointing_enable()
    encoder.eval()
    with pytest.raises(ValueError, match="gradient checkpointing saves nothing here"):
        encoder.train()
