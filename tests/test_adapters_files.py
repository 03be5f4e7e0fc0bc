"""Every method file of hparams/: what it trains gets a gradient, and the horizon follows."""

from pathlib import Path

import pytest
from hyperpyyaml import load_hyperpyyaml

from hff_modules import SSLEncoder, adapters
from hff_modules.adapters import METHODS
from hff_modules.config import METHODS as HPARAMS
from hff_modules.config import _dump, merge_files
from tests.test_encoder import SAMPLES, speech

FILES = sorted(HPARAMS.glob("*.yaml"))
KEYS = ("method", "layers", "adapters", "fusion", "l_activation", "lr_norms", "lr_encoder", "k")
HORIZONS = {
    "full_finetune": -1, "cnn": -1, "elp": 0, "p_adapter": 0, "inner_inter": 0, "unipet": 0,
    "top_k": 1, "last_layer": 4, "fusion": 3, "concat": 3, "hconv": 4, "weighted_sum": 4,
    "l_adapters": 4,
}  # fmt: skip


def read(path: Path) -> dict:
    """What a method file and the base say about encoder, adapters and fusion."""
    merged = merge_files(HPARAMS / "base" / "ctc.yaml")
    method = merge_files(path)
    kept = {key for key in merged if key in KEYS} | method.keys()
    merged.update(method)
    for key in [key for key in merged if key not in kept]:
        del merged[key]
    return load_hyperpyyaml(_dump(merged))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_file_trains_what_it_names(path, make_encoder_folder):
    hparams = read(path)
    assert hparams["method"] == path.stem
    encoder = SSLEncoder(make_encoder_folder("wav2vec2-base"), layers=hparams["layers"])
    for method, options in hparams["adapters"].items():
        adapters.attach(encoder, method, **options)
    assert encoder.horizon == HORIZONS.get(path.stem, 0)
    fusion = hparams["fusion"](num_states=len(encoder.layers), input_size=encoder.hidden_size)
    encoder.train()
    states, lengths = encoder(*speech(SAMPLES, 9_000))
    features = fusion(states, lengths)
    assert features.shape == (2, int(lengths.max()), fusion.output_size)
    trained = [*encoder.named_parameters(), *fusion.named_parameters()]
    trained = {name: p for name, p in trained if p.requires_grad}
    if trained:
        (features**3).sum().backward()
    assert all(p.grad is not None for p in trained.values())
    assert bool(trained) == (path.stem != "last_layer")


def test_every_method_has_a_file():
    used = {method for path in FILES for method in read(path)["adapters"]}
    assert used == METHODS.keys()
