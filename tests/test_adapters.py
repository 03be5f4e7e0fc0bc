"""Every method on every family, from one list."""

import copy

import pytest
import torch

from hff_modules import SSLEncoder, adapters
from hff_modules.adapters import METHODS, AdapterError
from tests.conftest import FAMILIES
from tests.test_encoder import SAMPLES, speech

SMALL = {"houlsby": {"bottleneck": 6}, "pfeiffer": {"bottleneck": 6}, "thomas": {"bottleneck": 6},
         "e_adapter": {"bottleneck": 6}, "tpa": {"bottleneck": 6}, "lora": {"rank": 2},
         "compacter": {"bottleneck": 8}, "inner": {"bottleneck": 6}, "prefix": {"length": 3},
         "prompts": {"length": 3}, "p_adapter": {"length": 3},
         "unipet": {"bottleneck": 6, "length": 3}}  # fmt: skip
WITH_STATISTICS = {"top_k", "full"}  # batch norms among what they train
# Softmax cancels what a bias adds to every key, so its gradient is rounding noise.
NO_GRADIENT = ("k_proj.bias", "linear_k.bias")

matrix = pytest.mark.parametrize(("method", "family"), [(m, f) for m in METHODS for f in FAMILIES])


@pytest.fixture
def batch():
    return speech(SAMPLES, 9_000)


def small_options(method):
    """Options for a tiny adapter in layers 3 and 4, or wherever else the method is."""
    layers = {"full": {"layers": "all"}, "cnn": {}, "p_adapter": {}}
    return SMALL.get(method, {}) | layers.get(method, {"layers": "last:2"})


def encode(encoder, batch, **kwargs):
    with torch.no_grad():
        return encoder(*batch, **kwargs)[0]


def train(encoder, batch, steps=2):
    """Two steps of Adam on everything that is trained; gives the names of what moved."""
    trained = adapters.trainable_parameters(encoder)
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    encoder.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (encoder(*batch)[0] ** 3).mean().backward()
        optimizer.step()
    encoder.eval()
    return {name for name, p in trained.items() if not torch.equal(before[name], p)}


@pytest.fixture(scope="module")
def pairs_of_encoders():
    """Two encoders of each family; a test that passes gives them back as they were."""
    return {}


@matrix
def test_life_of_an_adapter(
    method, family, make_encoder_folder, pairs_of_encoders, batch, tmp_path
):
    folder = make_encoder_folder(family)
    encoder, fresh = pairs_of_encoders.pop(family, None) or (
        SSLEncoder(folder, layers=[2, 4]).eval() for _ in range(2)
    )
    base = encode(encoder, batch)
    weights = {key: value.clone() for key, value in encoder.state_dict().items()}
    attention = encoder.model.config._attn_implementation
    at_birth = base
    if method == "cnn" and encoder.front_convolutions:  # hooks add up in another order than slices
        hook = encoder.front_convolutions[0].register_forward_hook(lambda *_: None)
        at_birth = encode(encoder, batch)
        hook.remove()

    # At birth the output is unchanged, and the horizon lies right below the adapter.
    if method == "cnn" and not encoder.front_convolutions:
        with pytest.raises(AdapterError, match="cnn: the front end of .* has no convolutions"):
            adapters.attach(encoder, method)
        assert not encoder.adapters
        return
    adapter = adapters.attach(encoder, method, **small_options(method))
    assert encoder.horizon == {"full": -1, "cnn": -1, "p_adapter": 0}.get(method, 2)
    change = (encode(encoder, batch) - at_birth).abs().max()
    assert change <= 1e-6 if adapter.identity_at_birth else change > 1e-4

    # After two steps every tensor of the adapter has moved and every other is bit-identical.
    trained = set(adapters.trainable_parameters(encoder))
    moved = train(encoder, batch)
    assert trained and all(name in moved or name.endswith(NO_GRADIENT) for name in trained)
    for key, value in encoder.state_dict().items():
        if key not in trained and not (method in WITH_STATISTICS and "batch_norm" in key):
            assert torch.equal(value, weights.get(key, value)), key
    tuned = encode(encoder, batch)
    assert not torch.equal(tuned, base)

    # An utterance still gives the same alone as in a padded batch.
    alone = encode(encoder, (batch[0][1:, :9_000], torch.ones(1)))[:, 0]
    torch.testing.assert_close(tuned[:, 1, : alone.shape[1]], alone, rtol=1e-3, atol=1e-4)

    # Disabled, it is as good as absent; enabled, it is back.
    adapters.disable(encoder, method)
    assert encoder.horizon == 4
    assert torch.equal(encode(encoder, batch), base)
    adapters.enable(encoder, method)
    assert torch.equal(encode(encoder, batch), tuned)

    # A deep copy has hooks of its own.
    twin = copy.deepcopy(encoder)
    adapters.disable(encoder, method)
    assert torch.equal(encode(twin, batch), tuned)
    adapters.enable(encoder, method)

    # Saved and loaded into a fresh encoder it gives the same.
    adapters.save_adapter(encoder, method, tmp_path / "saved")
    assert not torch.equal(encode(fresh, batch), tuned)
    adapters.load_adapter(fresh, tmp_path / "saved")
    assert torch.equal(encode(fresh, batch), tuned)
    adapters.remove(fresh, method)

    # Merged it gives nearly the same; unmerged exactly.
    if adapter.merges:
        adapters.merge(encoder, method)
        torch.testing.assert_close(encode(encoder, batch), tuned, rtol=1e-5, atol=1e-5)
        adapters.unmerge(encoder, method)
        assert torch.equal(encode(encoder, batch), tuned)
    else:
        with pytest.raises(TypeError, match="cannot be merged"):
            adapters.merge(encoder, method)

    # Removed, the encoder is as it was.
    adapters.remove(encoder, method)
    after = encoder.state_dict()
    assert after.keys() == weights.keys() and encoder.horizon == 4
    for key, value in weights.items():
        assert torch.equal(after[key], value), key
    assert torch.equal(encode(encoder, batch), base)
    for module in encoder.model.modules():
        assert not module._forward_hooks and not hasattr(module, "key_value_hooks")
    assert encoder.model.config._attn_implementation == attention
    pairs_of_encoders[family] = encoder, fresh
