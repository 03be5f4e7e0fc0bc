"""The frozen CNN in slices against Hugging Face's own."""

import pytest
import torch
import transformers
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

from hff_modules.families.frozen_cnn import as_matrices, in_slices, is_known

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


def test_hooks_and_norms_that_are_not_known_are_left_to_the_encoder_itself():
    cnn = make("group", False)
    hook = cnn.conv_layers[3].conv.register_forward_hook(lambda *_: None)
    assert not is_known(cnn)
    hook.remove()
    cnn.conv_layers[0].layer_norm = torch.nn.GroupNorm(2, 8)
    assert not is_known(cnn)
    other = make("group", False)
    other.conv_layers[1].layer_norm = torch.nn.GroupNorm(8, 8)
    assert not is_known(other)
