"""The frozen CNN in slices against Hugging Face's own."""

import pytest
import torch
import transformers
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

from hff_modules.families import frozen_cnn
from hff_modules.families.frozen_cnn import as_matrices, in_slices, is_hooked, is_known

FIELD, HOP = 400, 320


def make(norm: str, bias: bool, channels: int = 8) -> torch.nn.Module:
    """Kernels and strides of wav2vec 2.0, random norms."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        conv_dim=[channels] * 7, feat_extract_norm=norm, conv_bias=bias
    )
    cnn = Wav2Vec2FeatureEncoder(config).requires_grad_(False)
    for layer in cnn.conv_layers:
        if hasattr(layer, "layer_norm"):
            layer.layer_norm.weight.normal_(1, 0.3)
            layer.layer_norm.bias.normal_(0, 0.3)
    return cnn


@pytest.mark.parametrize(("norm", "bias"), [("group", False), ("group", True), ("layer", True)])
@pytest.mark.parametrize("samples", [FIELD, FIELD + 63 * HOP, FIELD + 64 * HOP, 3 * 64 * HOP + 777])
def test_slices_give_what_the_whole_gives(norm, bias, samples):
    cnn = make(norm, bias)
    wav = torch.randn(samples) + 0.5  # an offset, which the statistics have to take off
    assert is_known(cnn)
    slices = in_slices(cnn, as_matrices(cnn), wav)
    torch.testing.assert_close(slices, cnn(wav[None])[0].t(), rtol=1e-4, atol=1e-5)


def test_the_slices_hold_a_small_part_of_what_the_whole_holds():
    cnn, wav = make("group", False, channels=64), torch.randn(20 * 16_000)
    seen = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.append(result.untyped_storage().nbytes())
            return result

    with Seen():
        in_slices(cnn, as_matrices(cnn), wav)
    first_convolution = 4 * 64 * (len(wav) // 5)
    assert max(seen) < first_convolution / 3


@pytest.mark.parametrize("wav", [torch.zeros(5_000), torch.full((5_000,), 0.3)], ids=str)
def test_speech_that_does_not_vary_is_no_division_by_zero(wav):
    cnn = make("group", False)
    slices = in_slices(cnn, as_matrices(cnn), wav)
    torch.testing.assert_close(slices, cnn(wav[None])[0].t(), rtol=1e-3, atol=1e-3)


def test_statistics_of_long_speech_are_taken_block_by_block(monkeypatch):
    cnn, wav = make("group", False), torch.randn(16_000) + 3
    whole = in_slices(cnn, as_matrices(cnn), wav)
    monkeypatch.setattr(frozen_cnn, "_WINDOWS", 700)
    torch.testing.assert_close(in_slices(cnn, as_matrices(cnn), wav), whole)


def test_hooks_and_parts_that_are_not_known_are_left_to_the_encoder_itself():
    cnn = make("group", False)
    assert not is_hooked(cnn)
    for part in (cnn.conv_layers[3].conv, cnn.conv_layers[3], cnn.conv_layers[0].layer_norm):
        hook = part.register_forward_hook(lambda *_: None)
        assert is_hooked(cnn)
        hook.remove()
    dilated = make("group", False)
    dilated.conv_layers[2].conv.dilation = (2,)
    assert not is_known(dilated)
    cnn.conv_layers[0].layer_norm = torch.nn.GroupNorm(2, 8)
    assert not is_known(cnn)
    other = make("group", False)
    other.conv_layers[1].layer_norm = torch.nn.GroupNorm(8, 8)
    assert not is_known(other)
