import errno
import random
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from speechbrain.utils.checkpoints import CKPT_PREFIX
from torch import nn

from hff_modules import SSLEncoder, WeightedSum, adapters, checkpoint
from hff_modules.checkpoint import (
    CheckpointError,
    RandomState,
    Several,
    Trained,
    TrainedCheckpointer,
    load_state,
    load_trained,
    save_state,
    save_trained,
)


def trained_model(folder, layers=(1, 2), method="weighted_sum", units=5, tuned=None):
    encoder = SSLEncoder(folder, layers=list(layers))
    if tuned:
        adapters.attach(encoder, "top_k", layers=tuned)
    fusion = WeightedSum(len(encoder.layers), encoder.hidden_size)
    modules = {"encoder": encoder, "fusion": fusion, "head": nn.Linear(encoder.hidden_size, units)}
    return Trained(modules, {"method": method, "encoder": encoder.manifest(), "versions": {"a": 1}})


def names_in(path):
    with safe_open(str(path), "pt") as file:
        return set(file.keys())


def test_a_frozen_encoder_is_not_in_the_checkpoint(encoder_folder, tmp_path):
    trained_model(encoder_folder).save(tmp_path / "trained.safetensors")
    names = names_in(tmp_path / "trained.safetensors")
    assert names == {"fusion.weights", "head.weight", "head.bias"}
    assert (tmp_path / "trained.safetensors").stat().st_size < 2000
    assert (tmp_path / "manifest.json").is_file()


def test_of_a_partly_trained_encoder_only_the_trained_layers_are_saved(encoder_folder):
    trained = trained_model(encoder_folder, layers=[2, 4], tuned="last:1")
    in_encoder = [name for name in trained.tensors() if name.startswith("encoder.")]
    assert in_encoder and all("layers.3." in name for name in in_encoder)


def test_running_statistics_beside_trained_parameters_are_saved_and_frozen_ones_are_not():
    norms = nn.ModuleDict({"on": nn.BatchNorm1d(3), "off": nn.BatchNorm1d(3)})
    norms["off"].requires_grad_(False)
    names = set(Trained({"norms": norms}, {}).tensors())
    assert names == {
        f"norms.on.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


def test_what_was_saved_comes_back(encoder_folder, tmp_path):
    first, second = trained_model(encoder_folder), trained_model(encoder_folder)
    with torch.no_grad():
        for tensor in first.tensors().values():
            tensor.uniform_()
    first.save(tmp_path / "trained.safetensors")
    second.load(tmp_path / "trained.safetensors")
    for name, tensor in second.tensors().items():
        assert torch.equal(tensor, first.tensors()[name])


@pytest.mark.parametrize(
    "other, told",
    [
        ({"layers": [1, 3]}, r"encoder.layers: \[1, 2\] in the checkpoint, \[1, 3\] now"),
        ({"method": "concat"}, "method: weighted_sum in the checkpoint, concat now"),
        ({"units": 6}, r"tensors.head.bias: \[5\] in the checkpoint, \[6\] now"),
        ({"tuned": "last:1"}, "tensors.encoder.* not in the checkpoint"),
    ],
)
def test_a_checkpoint_for_something_else_is_refused(encoder_folder, tmp_path, other, told):
    trained_model(encoder_folder).save(tmp_path / "trained.safetensors")
    with pytest.raises(CheckpointError, match=told):
        trained_model(encoder_folder, **other).load(tmp_path / "trained.safetensors")


def test_a_checkpoint_of_before_a_version_that_says_more_is_taken(encoder_folder, tmp_path):
    trained_model(encoder_folder).save(tmp_path / "trained.safetensors")
    now = trained_model(encoder_folder)
    now.manifest |= {"adapters": {"tpa": ["tpa", [1], {}]}, "fusion_options": {"size": 3}}
    now.load(tmp_path / "trained.safetensors")


def test_a_checkpoint_for_another_encoder_is_refused(make_encoder_folder, tmp_path):
    trained_model(make_encoder_folder("hubert-base")).save(tmp_path / "trained.safetensors")
    with pytest.raises(CheckpointError, match="encoder.family: hubert in .*, wavlm now") as raised:
        trained_model(make_encoder_folder("wavlm-base")).load(tmp_path / "trained.safetensors")
    assert "encoder.fingerprint: " in str(raised.value)
    assert str(raised.value).count(" (of ") == 2


def test_the_same_encoder_in_another_place_or_with_other_versions_is_accepted(
    encoder_folder, tmp_path
):
    trained = trained_model(encoder_folder)
    trained.save(tmp_path / "trained.safetensors")
    trained.manifest["encoder"] = {**trained.manifest["encoder"], "source": "elsewhere"}
    trained.manifest["versions"] = {"a": 2}
    trained.load(tmp_path / "trained.safetensors")


def test_optimizer_states_come_back_without_pickle(tmp_path):
    def make():
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))

    def step(model, optimizer):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    step(model, optimizer)
    save_state(Several({"head": optimizer}), tmp_path / "optimizers.ckpt")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    step(model, optimizer)

    again, other = make()
    again.load_state_dict(weights)
    load_state(Several({"head": other}), tmp_path / "optimizers.safetensors", True)
    step(again, other)
    assert torch.equal(again.weight, model.weight)
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_states_for_other_parts_are_refused(tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    save_state(Several({"head": optimizer}), tmp_path / "optimizers.ckpt")
    with pytest.raises(CheckpointError, match="head.*fusion"):
        other = Several({"fusion": optimizer})
        load_state(other, tmp_path / "optimizers.safetensors", True)


def test_random_numbers_go_on_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "3")  # an independent job beside others

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.gauss(0, 1)

    draw()
    save_state(RandomState(), tmp_path / "rng.ckpt")
    expected = draw()
    draw()
    load_state(RandomState(), tmp_path / "rng.safetensors", True)
    assert draw() == expected


def checkpointer(folder, model):
    made = TrainedCheckpointer(folder)
    made.add_recoverable("trained", model, load_trained, save_trained)
    made.add_recoverable("rng", RandomState(), load_state, save_state)
    return made


def test_a_full_disk_is_told_with_the_folder_and_the_last_good_checkpoint_stays(
    encoder_folder, tmp_path, monkeypatch
):
    model = trained_model(encoder_folder)
    saver = checkpointer(tmp_path, model)
    saver.save_and_keep_only(meta={"wer": 1.0})
    good = model.tensors()["head.bias"].clone()
    real = checkpoint.write_tensors

    def full(path, tensors, metadata=None):
        if path.stem == "rng":  # the model is written already, then the disk is full
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors, metadata)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with torch.no_grad():
        model.tensors()["head.bias"].add_(1)
    with pytest.raises(OSError, match=f"{tmp_path}.*No space left.*last good one stays") as raised:
        saver.save_and_keep_only(meta={"wer": 0.5})
    assert raised.value.errno == errno.ENOSPC
    assert [p.name.startswith(CKPT_PREFIX + "+") for p in tmp_path.iterdir()] == [True]
    fresh = checkpointer(tmp_path, model)
    assert fresh.recover_if_possible().meta["wer"] == 1.0
    assert torch.equal(model.tensors()["head.bias"], good)


def test_a_full_disk_keeps_its_error_number_through_safetensors(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise checkpoint.safetensors.SafetensorError("I/O error: No space left (os error 28)")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)
    with pytest.raises(OSError) as raised:
        checkpoint.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize("left", ["", "unixtime: 1.5\n", "end-of-epoch: [tr"])
def test_scores_of_a_checkpoint_that_are_cut_off_are_named(encoder_folder, tmp_path, left):
    saver = checkpointer(tmp_path, trained_model(encoder_folder))
    saver.save_and_keep_only(meta={"wer": 1.0})
    path = saver.find_checkpoint().path
    (path / "CKPT.yaml").write_text(left)
    with pytest.raises(ValueError, match=re.escape(f"{path}/CKPT.yaml")):
        saver.find_checkpoint()


def test_a_checkpoint_that_was_being_written_when_killed_is_ignored_and_cleared_away(
    encoder_folder, tmp_path, monkeypatch
):
    model = trained_model(encoder_folder)
    saver = checkpointer(tmp_path, model)
    saver.save_and_keep_only(meta={"wer": 1.0})

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_tensors", killed)
        with pytest.raises(Killed):
            saver.save_and_keep_only(meta={"wer": 0.5})
    assert len(list(tmp_path.iterdir())) == 2
    fresh = checkpointer(tmp_path, model)
    assert fresh.recover_if_possible().meta["wer"] == 1.0
    fresh.save_and_keep_only(meta={"wer": 0.4})
    assert [c.meta["wer"] for c in fresh.list_checkpoints()] == [0.4]
    assert len(list(tmp_path.iterdir())) == 1
