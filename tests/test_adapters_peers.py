"""Where a library has the method: equal outputs and equal gradients for equal weights."""

import pytest
import torch
import transformers
from speechbrain.nnet import adapters as speechbrain_adapters

from hff_modules import SSLEncoder, adapters
from tests.test_encoder import SAMPLES, speech


def randomise(adapter):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return adapter


def ours(folder, method, **options):
    encoder = SSLEncoder(folder, layers=4).eval()
    return encoder, randomise(adapters.attach(encoder, method, **options))


def assert_equal(encoder, model, pairs):
    """Same output, and same gradients of each pair of tensors (ours, theirs)."""
    (wav,), _ = speech(SAMPLES)
    states, _ = encoder(wav[None])
    normalised = encoder._family.inputs(wav[None], torch.tensor([len(wav)]))["input_values"]
    theirs = model(normalised).last_hidden_state
    torch.testing.assert_close(states[0], theirs, rtol=1e-5, atol=1e-5)
    (states**3).sum().backward()
    (theirs**3).sum().backward()
    assert pairs
    for mine, their in pairs:
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["wav2vec2-base", "wav2vec2-large"])
def test_lora_equals_pefts(family, make_encoder_folder):
    peft = pytest.importorskip("peft")
    folder = make_encoder_folder(family)
    encoder, adapter = ours(folder, "lora", rank=3, alpha=5)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(transformers.AutoModel.from_pretrained(folder), config).eval()
    pairs = []
    for number, layer in enumerate(model.base_model.model.encoder.layers, start=1):
        for target, linear in [
            ("query", layer.attention.q_proj),
            ("value", layer.attention.v_proj),
        ]:
            part = adapter.parts[f"{number}_{target}_1"]
            for mine, their in (
                (part.a, linear.lora_A["default"].weight),
                (part.b, linear.lora_B["default"].weight),
            ):
                their.data.copy_(mine.data)
                pairs.append((mine, their))
    assert_equal(encoder, model.base_model.model, pairs)


def test_lora_equals_speechbrains(make_encoder_folder):
    folder = make_encoder_folder("wav2vec2-base")
    encoder, adapter = ours(folder, "lora", rank=3, alpha=5)
    model = speechbrain_adapters.AdaptedModel(
        transformers.AutoModel.from_pretrained(folder).eval(),
        speechbrain_adapters.LoRA,
        target_layers=["encoder.layers.*.attention.[qv]_proj"],
        adapter_kwargs={"rank": 3, "alpha": 5},
    )
    pairs = []
    for number, layer in enumerate(model.adapted_model.encoder.layers, start=1):
        for target in ("query", "value"):
            linear = getattr(layer.attention, f"{target[0]}_proj")
            part = adapter.parts[f"{number}_{target}_1"]
            pairs.append((part.a, linear.adapter_down_proj.weight))
            pairs.append((part.b, linear.adapter_up_proj.weight))
    for mine, their in pairs:
        their.data.copy_(mine.data)
    assert_equal(encoder, model, pairs)


def test_houlsby_equals_speechbrains(make_encoder_folder):
    folder = make_encoder_folder("wav2vec2-base")
    encoder, adapter = ours(folder, "houlsby", bottleneck=3, activation="silu")
    model = speechbrain_adapters.AdaptedModel(
        transformers.AutoModel.from_pretrained(folder).eval(),
        speechbrain_adapters.HoulsbyAdapterLinear,
        target_layers=["encoder.layers.*.out_proj", "encoder.layers.*.output_dense"],
        adapter_kwargs={"projection_size": 3},
    )
    pairs = []
    for number, layer in enumerate(model.adapted_model.encoder.layers, start=1):
        for place, linear in (
            ("attention", layer.attention.out_proj),
            ("feed_forward", layer.feed_forward.output_dense),
        ):
            part = adapter.parts[f"{number}_{place}"]
            for mine, their in (
                (part.down, linear.adapter_down_proj),
                (part.up, linear.adapter_up_proj),
            ):
                pairs += [(mine.weight, their.weight), (mine.bias, their.bias)]
    for mine, their in pairs:
        their.data.copy_(mine.data)
    assert_equal(encoder, model, pairs)


@pytest.mark.parametrize("norm", [None, "before", "after"])
def test_the_bottleneck_is_its_formula(norm, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder("wav2vec2-base"), layers=4).eval()
    ffn, seen = encoder.parts(4).feed_forwards[0].gives, []
    ffn.register_forward_hook(lambda module, args, out: seen.append(out))
    adapter = adapters.attach(encoder, "houlsby", bottleneck=3, norm=norm, layers=[4])
    randomise(adapter)
    ffn.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        encoder(*speech(SAMPLES))
    part, (x, adapted) = adapter.parts["4_feed_forward"], seen

    def layer_norm(values):
        centred = values - values.mean(-1, keepdim=True)
        scaled = centred / (values.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return scaled * part.norm.weight + part.norm.bias

    inner = layer_norm(x) if norm == "before" else x
    inner = inner @ part.down.weight.T + part.down.bias
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    branch = inner @ part.up.weight.T + part.up.bias
    expected = x + (layer_norm(branch) if norm == "after" else branch)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-5)
