"""Nothing made on the CPU meets what is on a GPU: training, testing, stored states, exports."""

import json

import pytest
import torch

from hff_modules.config import METHODS
from hff_modules.export import export
from hff_modules.exported import load_exported
from tests import corpora
from tests.pretend_gpu import PretendGPU
from tests.test_recipes import ALL
from tests.test_training import job  # noqa: F401, a fixture


def test_what_cuda_refuses_is_refused():
    layer, here = torch.nn.Linear(3, 4), torch.rand(2, 3)
    lstm, lengths = torch.nn.LSTM(3, 4, batch_first=True), torch.tensor([2, 1])
    pack = torch.nn.utils.rnn.pack_padded_sequence
    with PretendGPU():
        layer.to("cuda")
        there = here.to("cuda")
        assert (there.device.type, here.device.type) == ("cuda", "cpu")
        layer(there).sum().backward()
        assert layer.weight.grad.is_cuda and torch.zeros_like(there).is_cuda
        packed = pack(torch.rand(2, 2, 3, device="cuda"), lengths, batch_first=True)
        assert lstm.to("cuda")(packed)[0].data.is_cuda
        assert (there + torch.tensor(1.0)).is_cuda and there[torch.tensor([0])].is_cuda
        for wrong in (
            lambda: layer(here),
            lambda: there + here,
            lambda: here.add_(there),
            lambda: torch.cat([there, torch.zeros(1, 3)]),
            lambda: torch.where(there > 0, there, torch.zeros(2, 3)),
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: pack(there[None], torch.tensor([2], device="cuda"), batch_first=True),
        ):
            with pytest.raises(RuntimeError, match="device|CPU"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert there.cpu().numpy().shape == (2, 3)
    assert there.device.type == "cpu"


@pytest.mark.parametrize("method", sorted(p.stem for p in METHODS.glob("*.yaml")))
def test_every_method_trains(job, tmp_path, method, make_encoder_folder):  # noqa: F811
    options = ["--number_of_epochs", "1", "--device", "cuda:0"]
    if method == "cnn":
        options += ["--encoder", make_encoder_folder("wav2vec2-base")]
    if method in ("fusion", "concat"):
        options += ["--layers", "every:2"]
    with PretendGPU():
        results = job(tmp_path, *options, method=method, count=2)
    assert results["epochs"] == 1 and results["device"] == "pretended"


@pytest.mark.parametrize("name", ["EmoDB/emotion", "VoxCeleb/SpeakerRec"])
def test_other_recipes_train_on_stored_states(name, tmp_path, encoder_folder, monkeypatch):
    recipe = ALL[name]
    options = ["--data_folder", str(recipe.make(tmp_path / "data")), *recipe.command]
    options += ["--cache", str(tmp_path / "store"), "--device", "cuda:0", "--layers", "auto:2"]
    monkeypatch.chdir(tmp_path)
    with PretendGPU():
        recipe.load("train").main(
            corpora.arguments(tmp_path / "run", encoder_folder, "fusion", *options)
        )
    assert json.loads((tmp_path / "run/results.json").read_text())["test"]


def test_an_exported_model_transcribes(job, tmp_path):  # noqa: F811
    with PretendGPU():
        options = ["--device", "cuda:0", "--cache", str(tmp_path / "store")]
        job(tmp_path / "run", "--number_of_epochs", "1", *options, count=2)
        export(tmp_path / "run", tmp_path / "model")
        model = load_exported(tmp_path / "model", "cuda:0")
        states, _ = model.states(*(t.to("cuda") for t in (torch.rand(2, 8000), torch.ones(2))))
        outputs = model.outputs(states, torch.tensor([9, 9], device="cuda"))
    assert model.stored_as == "fp16" and states.pretends and outputs.pretends
