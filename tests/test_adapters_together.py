"""Several adapters on one encoder: switched, combined, counted; and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2Config

import hff_modules.encoder
from hff_modules import HierarchicalFusion, InterAdapter, LayerAdapters, SSLEncoder, adapters
from hff_modules.adapters import METHODS, AdapterError
from hff_modules.adapters.bottleneck import Bottleneck
from hff_modules.adapters.compacter import KroneckerLinear
from tests.test_adapters import encode, small_options, train
from tests.test_encoder import SAMPLES, speech

BY_ROW = [m for m, (kind, _) in METHODS.items() if kind.switched_by_row]


def randomise(adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.fixture(scope="module")
def encoders(make_encoder_folder):
    """One encoder of a family for all tests here; they take off what they attach."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = SSLEncoder(make_encoder_folder(family), layers=[2, 4]).eval()
        for name in list(made[family].adapters):
            adapters.remove(made[family], name)
        return made[family].eval()

    return make


@pytest.mark.parametrize("family", ["wavlm-base", "wav2vec2-conformer-rel", "whisper"])
@pytest.mark.parametrize("method", BY_ROW)
def test_each_utterance_of_a_batch_uses_its_own_adapter(method, family, encoders):
    encoder = encoders(family)
    options = small_options(method)
    randomise(adapters.attach(encoder, method, name="a", **options), seed=1)
    longer = {"length": 5} if "length" in options else {}
    randomise(adapters.attach(encoder, method, name="b", **options | longer), seed=2)
    batch = speech(9_000, SAMPLES, 8_000, 10_000)
    single = {name: encode(encoder, batch, adapters=name) for name in ("a", "b")}
    single[None] = encode(encoder, batch, adapters=[None] * 4)
    mixed = encode(encoder, batch, adapters=["a", None, "b", "a"])
    lengths = encoder.count_frames(torch.tensor([9_000, SAMPLES, 8_000, 10_000]))
    for row, name in enumerate(["a", None, "b", "a"]):
        for other, states in single.items():
            close = torch.allclose(
                mixed[:, row, : lengths[row]], states[:, row, : lengths[row]], 1e-4, 1e-5
            )
            assert close == (other == name), (row, other)


def test_without_names_every_adapter_that_is_switched_on_works(encoders):
    encoder, batch = encoders("w2v-bert-2"), speech(SAMPLES)
    for seed, name in enumerate(("a", "b")):
        randomise(adapters.attach(encoder, "tpa", name=name, bottleneck=4), seed)
    both, a = encode(encoder, batch), encode(encoder, batch, adapters="a")
    adapters.disable(encoder, "b")
    assert torch.equal(encode(encoder, batch), a) and not torch.equal(a, both)


def test_a_wrong_choice_of_adapters_is_refused(encoders):
    encoder, batch = encoders("w2v-bert-2"), speech(SAMPLES, SAMPLES)
    adapters.attach(encoder, "tpa", bottleneck=4)
    adapters.attach(encoder, "layernorm")
    with pytest.raises(KeyError, match=r"no adapter 'lora' is attached; there are \['tpa', 'layer"):
        encoder(*batch, adapters="lora")
    with pytest.raises(ValueError, match="3 adapter names were given for 2 utterances"):
        encoder(*batch, adapters=["tpa", None, "tpa"])
    with pytest.raises(ValueError, match="'layernorm'.*cannot be switched by utterance"):
        encoder(*batch, adapters=["tpa", None])
    adapters.disable(encoder, "tpa")
    with pytest.raises(ValueError, match="'tpa' is switched off; enable it first"):
        encoder(*batch, adapters="tpa")


@pytest.mark.parametrize("family", ["wavlm-large", "wav2vec2-conformer-rotary"])
def test_any_set_of_adapters_on_their_own_layers_trains_with_a_fusion(family, encoders):
    encoder, batch = encoders(family), speech(SAMPLES, 9_000)
    base = encode(encoder, batch)
    places = {
        "houlsby": {"layers": [2, 4], "bottleneck": 4},
        "lora": {"layers": [2, 3], "rank": 2},
        "layernorm": {"layers": [3]},
        "prefix": {"layers": [4], "length": 2},
        "prompts": {"layers": [2], "length": 2},
        "adapter_bias": {"layers": [3]},
    }
    for method, options in places.items():
        adapters.attach(encoder, method, **options)
    assert encoder.horizon == 1
    fusion = HierarchicalFusion(2, 24, 8, 24)
    encoder.train()
    features = fusion(encoder(*batch)[0])
    (features**3).sum().backward()
    named = [*adapters.trainable_parameters(encoder).values(), *fusion.parameters()]
    assert all(p.grad is not None for p in named)
    moved = train(encoder, batch)
    assert moved == set(adapters.trainable_parameters(encoder))
    for method in reversed(places):
        adapters.remove(encoder, method)
    encoder.eval()
    assert torch.equal(encode(encoder, batch), base) and encoder.horizon == 4


def test_nothing_below_the_lowest_adapter_is_in_the_graph(encoders):
    for family, method in [("wavlm-base", "prefix"), ("w2v-bert-2", "prompts"),
                           ("whisper", "unipet"), ("wav2vec2-base", "lora")]:  # fmt: skip
        encoder, graphs = encoders(family), []
        hooks = [
            layer.register_forward_hook(
                lambda m, args, out, graphs=graphs: graphs.append(
                    (out[0] if type(out) is tuple else out).requires_grad
                )
            )
            for layer in encoder._family.layers
        ]
        adapters.attach(encoder, method, layers=[3])
        encoder.train()(*speech(SAMPLES))
        assert graphs == [False, False, True, True] and encoder.horizon == 2, method
        for hook in hooks:
            hook.remove()


def test_merged_lora_adds_no_work(encoders):
    encoder, batch = encoders("wav2vec2-base"), speech(SAMPLES)
    lora = randomise(adapters.attach(encoder, "lora", rank=2), 0)
    calls = []
    for part in lora.parts.values():
        part.register_forward_hook(lambda *_: calls.append(1))
    encode(encoder, batch)
    assert len(calls) == 8
    adapters.merge(encoder, "lora")
    encode(encoder, batch)
    assert len(calls) == 8
    assert encoder.horizon == 4 and not adapters.trainable_parameters(encoder)
    with pytest.raises(ValueError, match="'lora'.*cannot be switched by utterance"):
        encoder(*batch, adapters=[None])
    adapters.attach(encoder, "lora", name="other", layers=[4])
    with pytest.raises(AdapterError, match="another adapter is merged into this map"):
        adapters.merge(encoder, "other")
    adapters.remove(encoder, "other")
    adapters.disable(encoder, "lora")  # also takes the change out of the weights
    adapters.enable(encoder, "lora")
    encode(encoder, batch)
    assert len(calls) == 16 and len(adapters.trainable_parameters(encoder)) == 16


# Parameter counts


@pytest.fixture(scope="module")
def base_encoder(tmp_path_factory):
    """A wav2vec 2.0 Base (12 layers of 768) in shapes only."""
    folder = tmp_path_factory.mktemp("base")
    Wav2Vec2Config().save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(hff_modules.encoder, "fingerprints", lambda family: [""] * 13)
        return SSLEncoder(str(folder), pretrained=False)


D, R, F, N, L = 768, 256, 3072, 16, 12
BOTTLENECK = 2 * D * R + D + R
# Method: options, closed formula, and what a paper prints.
COUNTS = {
    "e_adapter": ({"layers": "all but last:1"}, 11 * (BOTTLENECK + 2 * D), 11 * 395_776),
    "houlsby": ({}, 2 * L * BOTTLENECK, None),
    "pfeiffer": ({}, L * BOTTLENECK, None),
    "thomas": ({}, 2 * L * (BOTTLENECK + 2 * D), 9.53e6 - 36_864),
    "tpa": ({}, L * BOTTLENECK, None),
    "inner": ({}, L * BOTTLENECK, None),
    "lora": ({"rank": 8}, 2 * L * 2 * D * 8, 0.295e6),
    "bitfit": ({}, L * (4 * D + F + D + 2 * D), 0.10e6),
    "layernorm": ({}, L * 4 * D, 36_864),
    "adapter_bias": ({}, L * (F + D), 0.046e6),
    "compacter": ({}, 2 * L * 3 * (D + 24) + 4**3, None),
    "prefix": ({}, L * 2 * N * D, None),
    "prompts": ({}, L * N * D, None),
    "p_adapter": ({}, N * D, None),
    "unipet": ({}, L * (BOTTLENECK + N * D + 2), None),
    "cnn": ({}, 512 * (10 + 4 * 3 * 512 + 2 * 2 * 512), 4.20e6),
    "top_k": ({"layers": "all"}, L * (4 * D * D + 4 * D + 2 * D * F + F + D + 4 * D), 85.1e6),
}


@pytest.mark.parametrize("method", COUNTS)
def test_parameter_counts_are_the_formulas_and_what_the_papers_print(method, base_encoder):
    options, formula, printed = COUNTS[method]
    with torch.device("meta"):
        adapters.attach(base_encoder, method, **options)
    trained = adapters.trainable_parameters(base_encoder).values()
    count = sum(p.numel() for p in trained)
    adapters.remove(base_encoder, method)
    assert count == formula
    assert printed is None or count == pytest.approx(printed, rel=0.02)


def test_every_method_is_counted():
    assert METHODS.keys() - COUNTS.keys() == {"full"}


def test_layer_adapters_and_elp_have_the_papers_counts():
    fusion = LayerAdapters(num_states=12, input_size=768)
    layer_adapters = sum(p.numel() for p in fusion.parameters())
    assert layer_adapters == 12 * 394_752 + 12 == 12 * (768 * 512 + 3 * 512 + 1)
    assert layer_adapters + 11 * 395_776 + 36_864 == pytest.approx(9.13e6, rel=1e-3)  # L + E


def test_tpa_has_two_adapters_in_each_conformer_layer(encoders):
    encoder, r = encoders("w2v-bert-2"), 5
    adapter = adapters.attach(encoder, "tpa", layers=[2, 4], bottleneck=r)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 2 * (2 * 24 * r + 24 + r)


def test_compacters_map_is_the_sum_of_kronecker_products():
    torch.manual_seed(0)
    linear, a = KroneckerLinear(12, 8, division=4), torch.randn(4, 4, 4)
    products = [
        torch.kron(a[i], torch.outer(linear.s[i], linear.t[i])) for i in range(4)
    ]  # fmt: skip
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(linear(x, a), x @ sum(products).T + linear.bias)


def test_a_norm_behind_the_bottleneck_does_not_enlarge_the_first_small_step():
    torch.manual_seed(0)
    part, x = Bottleneck(24, 6, norm="after"), torch.randn(8, 24)
    optimizer = torch.optim.Adam(part.parameters(), lr=0.001)
    for _ in range(2):
        optimizer.zero_grad()
        (part(x) - x).square().mean().backward()
        optimizer.step()
    assert 0 < part(x).abs().max() < 0.02, "with a zero map in front of the norm it would be 2"


def test_inter_adapter_is_the_weighted_sum_at_birth_and_moves_on():
    states = torch.randn(3, 2, 5, 8)
    fusion = InterAdapter(3, 8, bottleneck=4)
    torch.testing.assert_close(fusion(states), states.mean(0))
    fusion(states).square().sum().backward()
    assert all(p.grad is not None for p in fusion.parameters())


def test_layer_adapters_are_normalised_maps_of_each_state():
    states = torch.randn(3, 2, 5, 8)
    fusion = LayerAdapters(3, 8, output_size=6)
    assert fusion.layer_weights() == pytest.approx([1 / 3] * 3)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    weights = torch.exp(fusion.weights) / torch.exp(fusion.weights).sum()
    expected = 0
    for weight, (linear, _, norm), state in zip(weights, fusion.adapters, states, strict=True):
        mapped = torch.nn.functional.gelu(state @ linear.weight.T + linear.bias)
        normal = torch.nn.functional.layer_norm(mapped, (6,), eps=norm.eps)
        expected = expected + weight * (normal * norm.weight + norm.bias)
    torch.testing.assert_close(fusion(states), expected)


# Refusals


@pytest.fixture
def saved(encoders, tmp_path):
    encoder = encoders("w2v-bert-2")
    adapters.attach(encoder, "tpa", layers=[3, 4], bottleneck=4)
    adapters.save_adapter(encoder, "tpa", tmp_path / "tpa")
    adapters.remove(encoder, "tpa")
    return tmp_path / "tpa"


def test_an_adapter_for_another_family_or_weights_is_refused_with_the_difference(
    saved, make_encoder_folder
):
    with pytest.raises(AdapterError, match="family: 'wav2vec2-bert' in .*, 'hubert' here"):
        adapters.load_adapter(SSLEncoder(make_encoder_folder("hubert-base")), saved)
    other = SSLEncoder(make_encoder_folder("w2v-bert-2"), pretrained=False)
    with pytest.raises(AdapterError, match="weights: '[0-9a-f]+' in .*, '[0-9a-f]+' here"):
        adapters.load_adapter(other, saved)
    assert not other.adapters


def test_an_adapter_in_layers_that_were_cut_off_is_refused(saved, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("w2v-bert-2"), layers=[1, 3])
    with pytest.raises(
        AdapterError, match=r"in layers \[3, 4\]; this encoder is cut above layer 3"
    ):
        adapters.load_adapter(encoder, saved)


def test_an_adapter_of_another_width_is_refused_by_tensor(saved, encoders):
    tensors = load_file(saved / "adapter.safetensors")
    tensors["parts.3_1.down.weight"] = torch.zeros(5, 24)
    save_file(tensors, saved / "adapter.safetensors")
    encoder = encoders("w2v-bert-2")
    with pytest.raises(AdapterError, match=r"3_1.down.weight is \(5, 24\), expected \(4, 24\)"):
        adapters.load_adapter(encoder, saved)
    assert not encoder.adapters


@pytest.mark.parametrize("what", ["json", "tensors", "absent", "keys", "method"])
def test_a_broken_file_is_refused_by_name(what, saved, encoders):
    config = saved / "adapter.json"
    if what == "json":
        config.write_text(config.read_text()[:40])
    elif what == "tensors":
        tensors = saved / "adapter.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-50])
    elif what == "absent":
        shutil.rmtree(saved)
    elif what == "keys":
        config.write_text("{}")
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"method": "magic"}))
    complaint = {"keys": "adapter.json is no description", "method": "method 'magic' is unknown"}
    with pytest.raises(AdapterError, match=complaint.get(what, "tpa holds no readable adapter")):
        adapters.load_adapter(encoders("w2v-bert-2"), saved)


def test_an_adapter_is_loaded_into_an_encoder_that_is_cut_right_above_it(
    saved, make_encoder_folder
):
    encoder = SSLEncoder(make_encoder_folder("w2v-bert-2"), layers=[4])
    adapter = adapters.load_adapter(encoder, saved, name="mine")
    assert adapter.layers == [3, 4] and adapters.get(encoder, "mine") is adapter


def test_what_is_saved_is_small_and_holds_nothing_of_the_encoder(saved):
    tensors = load_file(saved / "adapter.safetensors")
    assert all(key.startswith("parts.") for key in tensors)
    payload = sum(t.numel() * 4 for t in tensors.values())
    assert (saved / "adapter.safetensors").stat().st_size < payload + 4_000
    assert sorted(path.name for path in saved.iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_two_methods_cannot_own_one_parameter(encoders):
    encoder = encoders("wav2vec2-base")
    adapters.attach(encoder, "bitfit", layers=[3])
    with pytest.raises(AdapterError, match=r"3\.layer_norm\.bias is trained already"):
        adapters.attach(encoder, "layernorm", layers=[3, 4])
    assert list(encoder.adapters) == ["bitfit"]
    assert all(name.endswith("bias") for name in adapters.trainable_parameters(encoder))


def test_what_shares_weights_of_the_encoder_is_not_on_at_the_same_time(encoders):
    encoder, batch = encoders("wav2vec2-base"), speech(SAMPLES)
    base = encode(encoder, batch)
    bias = adapters.attach(encoder, "bitfit", name="a")
    train(encoder, batch)
    with_a = encode(encoder, batch)
    adapters.disable(encoder, "a")
    adapters.attach(encoder, "bitfit", name="b")
    train(encoder, speech(9_000))
    with_b = encode(encoder, batch)
    with pytest.raises(AdapterError, match="'a' and 'b' change the same weights .* remove 'b'"):
        adapters.enable(encoder, "a")
    assert not bias.enabled and torch.equal(encode(encoder, batch), with_b)
    adapters.disable(encoder, "b")
    adapters.enable(encoder, "a")
    assert torch.equal(encode(encoder, batch), with_a) and not torch.equal(with_a, with_b)
    for name in ("a", "b"):
        adapters.remove(encoder, name)
    assert torch.equal(encode(encoder, batch), base)


def test_lora_is_not_merged_into_weights_that_another_one_changes(encoders):
    encoder, batch = encoders("w2v-bert-2"), speech(SAMPLES)
    base = encode(encoder, batch)
    randomise(adapters.attach(encoder, "lora"), seed=1)
    adapters.disable(encoder, "lora")
    with pytest.raises(AdapterError, match="switched off cannot be merged"):
        adapters.merge(encoder, "lora")
    adapters.enable(encoder, "lora")
    adapters.attach(encoder, "top_k", layers="last:1")
    with pytest.raises(AdapterError, match="'lora' and 'top_k' change the same weights"):
        adapters.merge(encoder, "lora")
    adapters.disable(encoder, "top_k")
    unmerged = encode(encoder, batch)
    adapters.merge(encoder, "lora")
    with pytest.raises(AdapterError, match="'top_k' and 'lora' change the same weights"):
        adapters.enable(encoder, "top_k")
    torch.testing.assert_close(encode(encoder, batch), unmerged, rtol=1e-4, atol=1e-4)
    adapters.remove(encoder, "top_k")
    with pytest.raises(AdapterError, match="'full' and 'lora' change the same weights"):
        adapters.attach(encoder, "full")
    adapters.remove(encoder, "lora")
    assert torch.equal(encode(encoder, batch), base) and not adapters.trainable_parameters(encoder)


def test_a_frozen_adapter_has_no_dropout(encoders):
    encoder = encoders("wav2vec2-base")
    randomise(adapters.attach(encoder, "lora", dropout=0.5), seed=1).requires_grad_(False)
    encoder.train()
    wavs, wav_lens = speech(SAMPLES)
    assert encoder.horizon == encoder.top
    assert torch.equal(encoder.encode(wavs, wav_lens)[0], encoder.encode(wavs, wav_lens)[0])
    adapters.get(encoder, "lora").requires_grad_(True)
    encoder.train()
    assert not torch.equal(encoder(wavs, wav_lens)[0], encoder(wavs, wav_lens)[0])


def test_what_was_stored_with_adapters_leaves_no_choice_of_them(encoders):
    encoder, (wavs, wav_lens) = encoders("wav2vec2-base"), speech(SAMPLES, SAMPLES)
    for seed, name in enumerate(("fr", "ml")):
        adapter = adapters.attach(encoder, "tpa", name=name, bottleneck=4)
        randomise(adapter, seed).requires_grad_(False)
    stored, _ = encoder.encode(wavs, wav_lens)
    encoder(stored, wav_lens)
    with pytest.raises(ValueError, match="computed with the adapter 'fr' for all utterances"):
        encoder(stored, wav_lens, adapters=["fr", None])


@pytest.mark.parametrize("name", ["fr.v2", "keys", "training"])
def test_names_that_torch_does_not_take_are_refused_before_anything_changes(name, encoders):
    encoder, batch = encoders("wav2vec2-base"), speech(SAMPLES)
    base = encode(encoder, batch)
    for method in ("prefix", "full"):
        with pytest.raises(AdapterError, match=f"name='{name}': torch.nn.ModuleDict takes no"):
            adapters.attach(encoder, method, name=name)
    assert torch.equal(encode(encoder, batch), base) and not adapters.trainable_parameters(encoder)


def test_unknown_methods_options_and_names_are_refused(encoders):
    encoder = encoders("w2v-bert-2")
    with pytest.raises(AdapterError, match="method='tpaa' is unknown; there are houlsby, pfeif"):
        adapters.attach(encoder, "tpaa")
    with pytest.raises(AdapterError, match="tpa: .*unexpected keyword argument 'rank'"):
        adapters.attach(encoder, "tpa", rank=3)
    with pytest.raises(ValueError, match="tpa: layers=.*: there is no layer 7"):
        adapters.attach(encoder, "tpa", layers=[7])
    adapters.attach(encoder, "tpa", bottleneck=4)
    with pytest.raises(AdapterError, match="'tpa' is attached already; give another name"):
        adapters.attach(encoder, "tpa")
    with pytest.raises(AdapterError, match=r"no adapter 'lora' is attached; there are \['tpa'\]"):
        adapters.enable(encoder, "lora")


def test_frames_that_no_layer_would_read_are_refused():
    with pytest.raises(AdapterError, match="first one is not there to read the frames"):
        adapters.attach(SSLEncoder("logmel", layers=0), "p_adapter")


@pytest.mark.parametrize(
    ("method", "options", "complaint"),
    [
        ("houlsby", {"places": ["head"]}, "places=.'head'.: expected 'attention'"),
        ("houlsby", {"activation": "selu"}, "activation='selu': expected one of gelu, relu, silu"),
        ("e_adapter", {"norm": "inside"}, "norm='inside'"),
        ("tpa", {"branches": "third"}, "branches='third': expected one of both, first, last"),
        ("lora", {"targets": ["logits"]}, "targets=.'logits'.: expected some of query"),
        ("bitfit", {"what": "weights"}, "what='weights': expected 'bias'"),
        ("compacter", {"bottleneck": 10}, "division=4 does not divide bottleneck=10"),
        ("compacter", {"division": 5, "bottleneck": 10}, "does not divide the encoder's width 24"),
        ("prefix", {"length": 0}, "length=0: expected a whole number above 0"),
        ("prompts", {"length": 0}, "length=0: expected a whole number above 0"),
        ("lora", {"rank": 0}, "rank=0: expected a whole number above 0"),
        ("tpa", {"bottleneck": -3}, "bottleneck=-3: expected a whole number above 0"),
        ("houlsby", {"bottleneck": "64"}, "bottleneck='64': expected a whole number above 0"),
        ("compacter", {"division": 0}, "division=0: expected a whole number above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(method, options, complaint, encoders):
    encoder = encoders("w2v-bert-2")
    with pytest.raises(AdapterError, match=complaint):
        adapters.attach(encoder, method, **options)
    assert not encoder.adapters
    assert not any(m._forward_hooks for m in encoder.model.modules())


def test_full_fine_tuning_brings_the_statistics_outside_the_layers_along(encoders):
    encoder = encoders("hubert-batch-norm")
    norm = encoder.model.encoder.pos_conv_embed.batch_norm
    full = adapters.attach(encoder, "full")
    train(encoder, speech(SAMPLES, 9_000))
    assert norm.running_mean.abs().sum() > 0
    assert any(
        tensor.data_ptr() == norm.running_mean.data_ptr() for tensor in full.tensors().values()
    )
    adapters.remove(encoder, "full")
    assert torch.equal(norm.running_mean, torch.zeros(24))


def test_what_is_tuned_can_be_frozen_and_stays_so(encoders):
    encoder = encoders("wav2vec2-base")
    biases = adapters.attach(encoder, "bitfit")
    assert biases.requires_grad_(False) is biases and encoder.horizon == encoder.top
    adapters.disable(encoder, "bitfit")
    adapters.enable(encoder, "bitfit")
    assert encoder.horizon == encoder.top and not adapters.trainable_parameters(encoder)
    adapters.disable(encoder, "bitfit")
    biases.requires_grad_()
    assert encoder.horizon == encoder.top
    adapters.enable(encoder, "bitfit")
    assert encoder.horizon == 0


def test_what_is_frozen_in_training_keeps_still_from_the_next_step_on(encoders):
    encoder, batch = encoders("wav2vec2-conformer-rel"), speech(SAMPLES, 9_000)
    adapters.attach(encoder, "tpa", bottleneck=4)
    adapters.attach(encoder, "lora", dropout=0.5)
    top = adapters.attach(encoder, "top_k", layers="last:2")
    encoder.train()(*batch)
    norm = encoder._family.layers[3].conv_module.batch_norm
    before = norm.running_mean.clone()
    for adapter in (top, adapters.get(encoder, "lora")):  # the horizon stays where it is
        adapter.requires_grad_(False)
    assert torch.equal(encoder(*batch)[0], encoder(*batch)[0])
    assert before.abs().sum() > 0 and torch.equal(norm.running_mean, before)


def test_stored_states_know_of_frozen_weights_outside_the_layers(encoders):
    encoder = encoders("wav2vec2-base")
    adapters.attach(encoder, "full").requires_grad_(False)
    adapters.attach(encoder, "tpa", bottleneck=4)
    assert encoder.horizon == 0 and "full" in encoder.frozen_manifest()["adapters"]


def test_full_tuning_brings_its_batch_norm_statistics_along(encoders):
    encoder = encoders("wav2vec2-conformer-rel")
    adapters.attach(encoder, "top_k", layers="last:1")
    train(encoder, speech(SAMPLES, 9_000))
    norm = encoder._family.layers[3].conv_module.batch_norm
    trained = norm.running_mean.clone()
    adapters.disable(encoder, "top_k")
    assert torch.equal(norm.running_mean, torch.zeros(24))
    adapters.enable(encoder, "top_k")
    assert torch.equal(norm.running_mean, trained) and trained.abs().sum() > 0
    adapters.remove(encoder, "top_k")
    assert torch.equal(norm.running_mean, torch.zeros(24)) and norm.num_batches_tracked == 0
