"""Fusion and head alone for the first epochs, on the plain encoder; then the encoder joins."""

# ruff: noqa: F811 - the fixture

import pytest
import torch

from hff_modules import SSLEncoder, adapters
from hff_modules.brains import CTCBrain
from hff_modules.brains.head_first import HeadFirst
from hff_modules.measure import Meter
from tests.test_training import job, trained_tensors  # noqa: F401

METHODS = ("tpa", "lora", "full_finetune", "bitfit", "prompts", "elp")
WAIT = ("--frozen_epochs", "1")


def watched(monkeypatch):
    """Copy what is trained after every epoch; gives the list that fills."""
    seen, end = [], CTCBrain.on_stage_end

    def spy(brain, stage, loss, epoch=None):
        if stage.name == "TRAIN":
            with brain.head_first.waits(False):
                tensors = {k: v.detach().clone() for k, v in brain.trained.tensors().items()}
            seen.append((brain.head_first.waiting, tensors))
        end(brain, stage, loss, epoch)

    init = CTCBrain.init_optimizers

    def first(brain):
        init(brain)
        seen.append((None, {k: v.detach().clone() for k, v in brain.trained.tensors().items()}))

    monkeypatch.setattr(CTCBrain, "on_stage_end", spy)
    monkeypatch.setattr(CTCBrain, "init_optimizers", first)
    return seen


def moved(before, after, start):
    names = [name for name in before if name.startswith(start) and before[name].is_floating_point()]
    return {name: not torch.equal(before[name], after[name]) for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_the_encoder_waits_bit_for_bit_and_then_all_of_it_moves(
    job,
    tmp_path,
    method,
    monkeypatch,
):
    seen = watched(monkeypatch)
    rates = ["--lr_adapters", "0.01", "--lr_encoder", "0.01"]
    store = ["--cache", str(tmp_path / "store")]
    results = job(tmp_path / "run", *WAIT, *rates, *store, method=method, count=4)
    assert [waiting for waiting, _ in seen] == [None, True, False]
    at_birth, alone, together = (tensors for _, tensors in seen)
    assert not any(moved(at_birth, alone, "encoder.").values())
    assert all(moved(at_birth, alone, "head.").values())
    assert sum(moved(alone, together, "encoder.").values()) > 0
    assert results["frozen_epochs"] == 1
    assert results["dev"]["cer"] == results["history"][1]["cer"]
    assert trained_tensors(tmp_path / "run").keys() == at_birth.keys()


def test_with_stored_states_it_learns_what_it_learns_without(job, tmp_path):
    tensors = []
    for name, cache in (("stored", str(tmp_path / "store")), ("anew", "null")):
        job(tmp_path / name, *WAIT, "--cache", cache, "--cache_dtype", "fp32", method="tpa")
        tensors.append(trained_tensors(tmp_path / name))
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][name], atol=1e-5, rtol=1e-4)


def test_stored_states_are_shared_with_methods_that_train_nothing_in_the_encoder(
    job,
    tmp_path,
):
    store = ["--cache", str(tmp_path / "store"), "--layers", "all", "--number_of_epochs", "2"]
    job(tmp_path / "frozen", *store, method="weighted_sum")
    before = set((tmp_path / "store").glob("*/*/*.safetensors"))
    job(tmp_path / "tpa", *store, *WAIT, method="houlsby_weighted_sum")
    assert before and set((tmp_path / "store").glob("*/*/*.safetensors")) == before


@pytest.mark.parametrize("calls_before", [2, 6])
def test_a_run_that_is_killed_in_either_time_ends_like_an_undisturbed_one(
    job,
    tmp_path,
    monkeypatch,
    calls_before,
):
    options = [*WAIT, "--cache", str(tmp_path / "store"), "--ckpt_interval_steps", "1"]
    options += ["--lr_adapters", "0.01", "--number_of_epochs", "3"]
    whole = job(tmp_path / "whole", *options, method="tpa", count=8)
    fit_batch, calls = CTCBrain.fit_batch, []

    class Killed(Exception):
        pass

    def killed(brain, batch):
        calls.append(brain.head_first.waiting)
        if len(calls) > calls_before:
            raise Killed
        return fit_batch(brain, batch)

    with monkeypatch.context() as patched:
        patched.setattr(CTCBrain, "fit_batch", killed)
        with pytest.raises(Killed):
            job(tmp_path / "killed", *options, method="tpa", count=8)
    assert calls[-1] == (calls_before == 2)
    again = job(tmp_path / "killed", *options, method="tpa", count=8)
    assert again["test"] == whole["test"]
    one, two = trained_tensors(tmp_path / "whole"), trained_tensors(tmp_path / "killed")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_speed_is_that_of_the_method_and_not_of_the_head_alone():
    meter = Meter("cpu")
    for seconds in (1.0, 1.0):
        meter.add_step(seconds, 600.0)
        meter.train_seconds += seconds
    meter.join()
    meter.add_step(2.0, 60.0)
    meter.train_seconds += 2.0
    found = meter.summary()
    assert found["train_seconds"] == 4.0 and found["step_seconds"] == 2.0
    assert found["audio_seconds_per_second"] == 30.0


def test_a_run_that_is_tested_elsewhere_says_what_it_was_trained_on():
    trained, tested = Meter("cpu"), Meter("cpu")
    trained.processes, trained.device = 2, "a GPU"
    tested.load_state_dict(trained.state_dict())
    assert tested.summary().items() >= {"processes": 2, "device": "a GPU"}.items()


def test_where_nothing_in_the_encoder_is_trained_nobody_waits(job, tmp_path):
    results = job(tmp_path, *WAIT, "--layers", "[2, 4]", count=4)
    assert "frozen_epochs" not in results
    best = min(results["history"], key=lambda past: past["wer"])
    assert results["dev"]["wer"] == best["wer"]


@pytest.mark.parametrize("epochs", ["2", "-1", "0.5"])
def test_epochs_that_leave_nothing_to_train_are_refused(job, tmp_path, epochs):
    with pytest.raises(ValueError, match=r"frozen_epochs: expected a whole number below .*\(2\)"):
        job(tmp_path, "--frozen_epochs", epochs, method="tpa", count=4)


def test_who_was_disabled_before_stays_disabled(encoder_folder):
    encoder = SSLEncoder(encoder_folder)
    adapters.attach(encoder, "tpa", name="off", bottleneck=4)
    adapters.attach(encoder, "lora", name="on", rank=2)
    adapters.disable(encoder, "off")
    head_first = HeadFirst(encoder, 1)
    with head_first.waits():
        assert encoder.horizon == encoder.top
    assert not encoder.adapters["off"].enabled and encoder.adapters["on"].enabled
