"""Every method in whole layers, against its formula around the parts of Hugging Face's own layer.

The formulas of prefixes, prompts and P-adapters are in test_adapters_frames.py, that of L-adapters
is in test_adapters_together.py.
"""

import copy

import pytest
import torch
import transformers
from torch.nn.functional import gelu, layer_norm

from hff_modules import InterAdapter, SSLEncoder, adapters
from hff_modules.adapters import METHODS
from tests.conftest import FAMILIES
from tests.test_encoder import speech

SECOND = 16_000  # samples: 50 frames, and all of the tiny Whisper's window
EXACT = {"rtol": 1e-5, "atol": 1e-5}
NORMS_LAST = {"wav2vec2-base", "hubert-base", "wavlm-base", "data2vec-audio", "unispeech-sat"}


def randomise(module, std=0.3):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=std, generator=generator)
    return module


def bottleneck(part, x, act):
    return act(x @ part.down.weight.T + part.down.bias) @ part.up.weight.T + part.up.bias


def normalised(norm, x):
    return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-5)


def kronecker(linear, a, x):
    products = [torch.kron(a[i], torch.outer(linear.s[i], linear.t[i])) for i in range(len(a))]
    return x @ sum(products).T + linear.bias


SERIAL = {  # what is added to the output of attention and of the last feed-forward, ``y``
    "houlsby": lambda part, a, y: bottleneck(part, y, gelu),
    "pfeiffer": lambda part, a, y: bottleneck(part, y, gelu),
    "thomas": lambda part, a, y: bottleneck(part, normalised(part.norm, y), gelu),
    "e_adapter": lambda part, a, y: normalised(part.norm, bottleneck(part, y, gelu)),
    "compacter": lambda part, a, y: kronecker(part.up, a, gelu(kronecker(part.down, a, y))),
}
NOT_AT_ATTENTION = {"pfeiffer", "e_adapter"}
BESIDE = {  # what is added to every feed-forward of raw input ``x`` and inner activation ``u``
    "tpa": lambda part, gate, x, u: bottleneck(part, x, torch.relu),
    "inner": lambda part, gate, x, u: bottleneck(part, x, torch.relu),
    "unipet": lambda part, gate, x, u: gate * bottleneck(part, x, torch.relu),
    "adapter_bias": lambda part, gate, x, u: (u * part.w).sum(-1, keepdim=True) * part.v,
}
OPTIONS = {"compacter": {"bottleneck": 8, "division": 4}, "adapter_bias": {},
           "unipet": {"bottleneck": 6, "length": 3}, "lora": {"rank": 3, "alpha": 5, "targets": [
               "query", "key", "value", "output", "up", "down"]}}  # fmt: skip
WHOLE_LAYERS = [*SERIAL, *BESIDE, "lora"]
OTHERWISE = {"cnn", "prefix", "prompts", "p_adapter"}
TRAIN_THE_ENCODERS_OWN = {"bitfit", "layernorm", "top_k", "full"}


class Change:
    """What a method does to the branches of layer ``number``; without one, nothing."""

    def __init__(self, method, adapter, number):
        self.method, self.adapter, self.number = method, adapter, str(number)

    def part(self, key):
        return self.adapter.parts[f"{self.number}_{key}"]

    def gate(self, which):
        gates = self.adapter.gates[self.number] if self.method == "unipet" else torch.zeros(2)
        return torch.sigmoid(gates[which])

    def behind(self, place, y):
        a = getattr(self.adapter, "a", None)
        return y + SERIAL[self.method](self.part(place), a, y)

    def attention(self, y):
        here = self.method in SERIAL and self.method not in NOT_AT_ATTENTION
        return self.behind("attention", y) if here else y

    def feed_forward(self, place, last, x, u, y):
        if self.method in BESIDE:
            y = y + BESIDE[self.method](self.part(place), self.gate(0), x, u)
        return self.behind("feed_forward", y) if self.method in SERIAL and last else y

    def entering(self, x):
        if self.method != "unipet":
            return x
        frames = self.gate(1) * self.part("prompts").frames
        return torch.cat([frames.expand(len(x), -1, -1), x], dim=1)

    def weights(self, layer):
        if self.method != "lora":
            return
        attention, _, branches = parts_of(layer)
        short = {"query": "q", "key": "k", "value": "v", "output": "out"}
        name = "linear_{}" if len(branches) == 2 else "{}_proj"
        maps = {f"{key}_1": getattr(attention, name.format(short[key])) for key in short}
        for place, (_, up, _, down) in enumerate(branches, start=1):
            maps |= {f"up_{place}": up, f"down_{place}": down}
        for key, linear in maps.items():
            linear.weight += 5 / 3 * self.part(key).b @ self.part(key).a


def parts_of(layer):
    """Attention, the norm beside it, and (norm, up, act, down) of each feed-forward."""
    if hasattr(layer, "fc1"):  # Whisper
        branch = (layer.final_layer_norm, layer.fc1, layer.activation_fn, layer.fc2)
        return layer.self_attn, layer.self_attn_layer_norm, [branch]
    if hasattr(layer, "ffn1"):
        branches = [(layer.ffn1_layer_norm, layer.ffn1), (layer.ffn2_layer_norm, layer.ffn2)]
        attention, norm = layer.self_attn, layer.self_attn_layer_norm
    else:
        branches = [(layer.final_layer_norm, layer.feed_forward)]
        attention, norm = layer.attention, layer.layer_norm
    return attention, norm, [
        (norm, ffn.intermediate_dense, ffn.intermediate_act_fn, ffn.output_dense)
        for norm, ffn in branches
    ]  # fmt: skip


def layer_by_hand(layer, norms_last, change, x, args, kwargs):
    attention, attention_norm, branches = parts_of(layer)

    def attend(x):
        return change.attention(attention(x, *args, **kwargs)[0])

    def feed_forward(place, x):
        norm, up, act, down = branches[place - 1]
        u = act(up(x if norms_last else norm(x)))
        return change.feed_forward(place, place == len(branches), x, u, down(u))

    if len(branches) == 2:  # a Conformer
        x = x + 0.5 * feed_forward(1, x)
        x = x + attend(attention_norm(x))
        x = x + layer.conv_module(x)
        return layer.final_layer_norm(x + 0.5 * feed_forward(2, x))
    if norms_last:
        x = layer.layer_norm(x + attend(x))
        return layer.final_layer_norm(x + feed_forward(1, x))
    x = x + attend(attention_norm(x))
    return x + feed_forward(1, x)


class Pair:
    """An encoder of a family, and model and layers as Hugging Face alone loads them."""

    def __init__(self, family, folder):
        self.encoder = SSLEncoder(folder, layers=[0, 1, 2, 3]).eval()
        model = transformers.AutoModel.from_pretrained(folder).eval().requires_grad_(False)
        self.whisper, self.layers = family == "whisper", model.encoder.layers
        self.model = model.encoder if self.whisper else model
        self.plain, self.calls = self.encoder(*speech(SECOND, SECOND))[0], {}

    def inputs(self, samples=SECOND):
        wavs, _ = speech(samples, samples)
        return self.encoder._family.inputs(wavs, torch.tensor([samples] * 2))

    def attention_call(self, number, more):
        """What else Hugging Face hands to an attention for a second and so many more frames."""
        if (number, more) not in self.calls:
            call = self.calls[number, more] = {}
            hook = parts_of(self.layers[number - 1])[0].register_forward_pre_hook(
                lambda _, args, kwargs: call.update(args=args[1:], kwargs=kwargs), with_kwargs=True
            )
            self.model(**self.inputs(SECOND if self.whisper else SECOND + 320 * more))
            hook.remove()
            call["kwargs"].pop("hidden_states", None)
        return self.calls[number, more]


@pytest.fixture(scope="module")
def pairs(make_encoder_folder):
    made = {}

    def make(family):
        if family not in made:
            made[family] = Pair(family, make_encoder_folder(family))
        for name in list(made[family].encoder.adapters):
            adapters.remove(made[family].encoder, name)
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [None, *WHOLE_LAYERS])
@torch.no_grad()
def test_a_layer_with_an_adapter_is_its_formula(method, family, pairs):
    pair, adapter, options = pairs(family), None, OPTIONS.get(method, {"bottleneck": 6})
    if method:
        adapter = randomise(adapters.attach(pair.encoder, method, layers=[2, 3], **options))
    states, more = pair.encoder(*speech(SECOND, SECOND))[0], options.get("length", 0)
    for number in (2, 3):
        layer, change = copy.deepcopy(pair.layers[number - 1]), Change(method, adapter, number)
        change.weights(layer)
        entering, call = change.entering(states[number - 1]), pair.attention_call(number, more)
        expected = layer_by_hand(layer, family in NORMS_LAST, change, entering, **call)
        torch.testing.assert_close(states[number], expected[:, more:], **EXACT)
    assert bool(method) == bool((states[2] - pair.plain[2]).abs().max() > 0.01)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "w2v-bert-2"])
@torch.no_grad()
def test_a_cnn_adapter_adds_a_hundredth_of_its_own_convolution_to_each(family, pairs):
    pair = pairs(family)
    adapter = randomise(adapters.attach(pair.encoder, "cnn"), std=3)
    states, model = pair.encoder(*speech(SECOND, SECOND))[0], copy.deepcopy(pair.model)
    if family == "whisper":
        convolutions = [model.conv1, model.conv2]
    else:
        convolutions = [layer.conv for layer in model.feature_extractor.conv_layers]
    for part, convolution in zip(adapter.parts.values(), convolutions, strict=True):
        for name, parameter in convolution.named_parameters():
            parameter += 0.01 * part.get_parameter(name)
    expected = model(**pair.inputs(), output_hidden_states=True).hidden_states[:4]
    torch.testing.assert_close(states, torch.stack(expected), **EXACT)
    assert (states[0] - pair.plain[0]).abs().max() > 0.01


def test_the_inter_adapter_is_its_formula():
    torch.manual_seed(0)
    states, fusion = torch.randn(3, 2, 5, 8), randomise(InterAdapter(3, 8, bottleneck=4))
    weights = torch.exp(fusion.weights) / torch.exp(fusion.weights).sum()
    summed = (weights.view(3, 1, 1, 1) * states).sum(0)
    expected = summed + bottleneck(fusion.adapter, summed, torch.relu)
    torch.testing.assert_close(fusion(states), expected, **EXACT)


def test_no_method_is_without_a_formula():
    assert METHODS.keys() == {*WHOLE_LAYERS} | OTHERWISE | TRAIN_THE_ENCODERS_OWN
