"""Every method on every family, from one list."""

import copy

import pytest
import torch

from hff_modules import SSLEncoder, adapters
from hff_modules.adapters import METHODS
from tests.conftest import FAMILIES
from tests.test_encoder import SAMPLES, speech

SMALL = {"houlsby": {"bottleneck": 6}, "pfeiffer": {"bottleneck": 6}, "thomas": {"bottleneck": 6},
         "e_adapter": {"bottleneck": 6}, "tpa": {"bottleneck": 6}, "lora": {"rank": 2},
         "compacter": {"bottleneck": 8}}  # fmt: skip
TUNING = {"bitfit", "layernorm", "top_k", "full"}
# Softmax cancels what a bias adds to every key, so its gradient is rounding noise.
NO_GRADIENT = ("k_proj.bias", "linear_k.bias")

matrix = pytest.mark.parametrize(("method", "family"), [(m, f) for m in METHODS for f in FAMILIES])


@pytest.fixture
def batch():
    return speech(SAMPLES, 9_000)


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


@matrix
def test_life_of_an_adapter(method, family, make_encoder_folder, batch, tmp_path):
    folder = make_encoder_folder(family)
    encoder = SSLEncoder(folder, layers=[2, 4]).eval()
    base = encode(encoder, batch)
    weights = {key: value.clone() for key, value in encoder.state_dict().items()}

    # At birth the output is unchanged, and the horizon lies right below the adapter.
    lowest = {"full": 0}.get(method, 3)
    options = SMALL.get(method, {})
    adapter = adapters.attach(
        encoder, method, layers="all" if method == "full" else "last:2", **options
    )
    assert encoder.horizon == lowest - 1
    assert (encode(encoder, batch) - base).abs().max() <= 1e-6

    # After two steps every tensor of the adapter has moved and every other is bit-identical.
    trained = set(adapters.trainable_parameters(encoder))
    moved = train(encoder, batch)
    assert trained and all(name in moved or name.endswith(NO_GRADIENT) for name in trained)
    for key, value in encoder.state_dict().items():
        if key not in trained and not (method in TUNING and "batch_norm" in key):
            assert torch.equal(value, weights.get(key, value)), key
    tuned = encode(encoder, batch)
    assert not torch.equal(tuned, base)

    # Disabled, it is as good as absent; enabled, it is back.
    adapters.disable(encoder, method)
    assert encoder.horizon == 4
    if not (method in TUNING and "conformer" in family):  # batch norm saw the training
        assert torch.equal(encode(encoder, batch), base)
    adapters.enable(encoder, method)
    assert torch.equal(encode(encoder, batch), tuned)

    # A deep copy has hooks of its own.
    twin = copy.deepcopy(encoder)
    adapters.disable(encoder, method)
    assert torch.equal(encode(twin, batch), tuned)
    adapters.enable(encoder, method)

    # Saved and loaded into a fresh encoder it gives the same.
    if not (method in TUNING and "conformer" in family):
        adapters.save_adapter(encoder, method, tmp_path / "saved")
        fresh = SSLEncoder(folder, layers=[2, 4]).eval()
        adapters.load_adapter(fresh, tmp_path / "saved")
        assert torch.equal(encode(fresh, batch), tuned)

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
        assert torch.equal(after[key], value) or "batch_norm" in key, key
    hooks = [m for m in encoder.model.modules() if m._forward_hooks]
    assert not hooks
