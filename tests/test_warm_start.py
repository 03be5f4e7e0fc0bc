"""Starting from another run, training on several languages first, and what is refused."""

import json
import logging
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from speechbrain.dataio.dataset import DynamicItemDataset

from hff_modules.checkpoint import CheckpointError, Trained
from hff_modules.config import METHODS, merge_files
from hff_modules.data import CharUnits, SentencePieceUnits
from hff_modules.data.manifest import read_rows
from hff_modules.files import locked
from hff_modules.heads import LinearHead
from hff_modules.warm_start import best_checkpoint, check_unheard, start_from
from tests import corpora
from tests.test_commonvoice import HEADER, RECIPE

sys.path.insert(0, str(RECIPE))
import sources  # noqa: E402

SENTENCES = {"fr": "abc dé", "it": "abc", "mt": "bċx a"}


@pytest.fixture(scope="module")
def main():
    return corpora.load_train(RECIPE).main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for language, sentence in SENTENCES.items():
        for part in ("train", "dev", "test"):
            rows = [[f"{language}{part}{n}", f"{part}{n}.wav", sentence, 2] for n in range(3)]
            for row in rows:
                corpora.write_audio(root / language / "clips" / row[1], 0.5)
            corpora.write_table(root / language / f"{part}.tsv", HEADER, rows, "\t")
    return root


@pytest.fixture(scope="module")
def run(main, data, encoder_folder):
    def train(folder, language, *options, method="fusion_tpa"):
        layers = [] if "--layers" in options else ["--layers", "[2, 4]"]
        head = [] if "--head" in options else ["--head", "!name:hff_modules.heads.LinearHead"]
        argv = corpora.arguments(folder, encoder_folder, method, *head, *layers, *options)
        return main([*argv, "--data_folder", str(data), "--language", language])

    return train


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    """A run on two languages."""
    folder = tmp_path_factory.mktemp("first")
    run(folder, "[fr, it]", "--lr_adapters", "0.1")
    return folder


def tensors(folder):
    return load_file(best_checkpoint(folder) / "trained.safetensors")


def units(folder):
    return json.loads((Path(folder) / "units/units.json").read_text())["units"]


def untouched(run, folder, language, *options, **more):
    """What a run starts with: after an epoch with learning rates of nothing."""
    still = [f"--lr_{part}" for part in ("head", "fusion", "adapters")]
    rates = [word for key in still for word in (key, "0.0")]
    results = run(folder, language, *rates, *options, **more)
    return results, tensors(folder)


def test_a_run_starts_with_what_another_learned_and_known_units_keep_their_rows(
    run, first, tmp_path
):
    results, started = untouched(run, tmp_path / "second", "mt", "--start_from", str(first))
    _, plain = untouched(run, tmp_path / "plain", "mt")
    learned = tensors(first)
    old, new = units(first), units(tmp_path / "second")
    assert old == ["<blank>", " ", "a", "b", "c", "d", "é"] and new[2:] == ["a", "b", "x", "ċ"]
    for name, tensor in started.items():
        if name not in ("head.output.weight", "head.output.bias"):
            torch.testing.assert_close(tensor, learned[name], rtol=1e-3, atol=1e-4)
            continue
        for row, unit in enumerate(new):
            expected = learned[name][old.index(unit)] if unit in old else plain[name][row]
            torch.testing.assert_close(tensor[row], expected, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(plain[name], learned[name]) for name in plain if "adapters" in name)
    about = {"folder": str(first), "known_units": 4, "new_units": 2}
    assert {key: results["start_from"][key] for key in about} == about


def test_what_the_other_run_was_trained_on_is_not_tested_on(first, tmp_path, caplog):
    manifest = next(first.glob("manifests/**/train.csv"))
    heard = dict(list(read_rows(manifest, "").items())[:2])
    with pytest.raises(ValueError, match="was trained on 2 of the 2 recordings of dev"):
        check_unheard(first, {"dev": DynamicItemDataset(heard)})
    named_later = {ID: {**row, "spk_id": ""} for ID, row in heard.items()}
    with pytest.raises(ValueError, match="was trained on 2 of the 2 recordings of dev"):
        check_unheard(first, {"dev": DynamicItemDataset(named_later)})
    others = {ID: {**row, "spk_id": "another"} for ID, row in heard.items()}
    with caplog.at_level(logging.WARNING):
        check_unheard(first, {"test": DynamicItemDataset(others)})
    assert "test: 2 of 2 sentences were said in the training of" in caplog.text


def test_a_run_of_another_method_layers_or_width_is_refused_with_the_differences(
    run, first, tmp_path
):
    start = ["--start_from", str(first)]
    with pytest.raises(CheckpointError, match=r"method: fusion_tpa in .*, fusion now"):
        run(tmp_path / "a", "mt", *start, method="fusion")
    with pytest.raises(CheckpointError, match=r"encoder.layers: \[2, 4\] in .*, \[3, 4\] now"):
        run(tmp_path / "b", "mt", *start, "--layers", "[3, 4]")
    with pytest.raises(
        CheckpointError, match=r"adapters.*down.*: \[\d+, 24\] in .*, \[3, 24\] now"
    ):
        run(tmp_path / "c", "mt", *start, "--bottleneck", "3")
    gated = "!name:hff_modules.fusion.HierarchicalFusion {hidden_size: 256, merge: gated}"
    with pytest.raises(CheckpointError, match="fusion_options.merge: not in the.*, gated now"):
        run(tmp_path / "e", "mt", *start, "--fusion", gated)
    with pytest.raises(CheckpointError, match="adapters.tpa: .*'relu'.* in .*'gelu'"):
        run(tmp_path / "f", "mt", *start, "--adapters", "{tpa: {activation: gelu}}")
    with pytest.raises(CheckpointError, match="head: LinearHead in the checkpoint, DNNHead now"):
        run(tmp_path / "d", "mt", *start, "--head", "!name:hff_modules.heads.DNNHead")


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: expected the output folder of a run"):
        run(tmp_path / "run", "mt", "--start_from", str(tmp_path / "nowhere"))


def test_units_of_another_kind_are_refused(first):
    pieces = SentencePieceUnits.from_texts(["abc abd"] * 9, vocab_size=8)
    trained = Trained({"head": LinearHead(24, 8)}, {"task": {"units": "unigram"}})
    with pytest.raises(CheckpointError, match="task.units: char in the checkpoint, unigram now"):
        start_from(trained, pieces, first)


def test_units_in_another_order_find_their_rows(first):
    saved = json.loads((best_checkpoint(first) / "manifest.json").read_text())
    mine = CharUnits(["<blank>", " ", "é", "z", "a"])
    head = LinearHead(saved["tensors"]["head.output.weight"][1], 5)
    kept = head.output.weight[3].clone()
    shapes = {n: s for n, s in saved["tensors"].items() if not n.startswith("head.")}
    trained = Trained({"head": head}, {k: v for k, v in saved.items() if k != "tensors"})
    trained.manifest["tensors"] |= shapes
    start_from(trained, mine, first)
    learned = tensors(first)["head.output.weight"]
    assert torch.equal(head.output.weight[2], learned[6])
    assert torch.equal(head.output.weight[4], learned[2])
    assert torch.equal(head.output.weight[3], kept)


def test_one_command_trains_the_sources_once_for_all_targets_and_seeds(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    stages = ["--source_languages", "[fr, it]", "--source_options", "{number_of_epochs: 2}"]
    one = run(tmp_path / "one", "mt", *stages, "--seed", "7", "--max_minutes", "0.02")
    (folder,) = tmp_path.glob("results/sources/fr-it/fusion_tpa-*")
    assert one["start_from"]["folder"] == str(folder.relative_to(tmp_path))
    before = json.loads((folder / "results.json").read_text())
    assert (before["epochs"], before["seed"], before["test"]) == (2, 1986, {})
    assert before["dataset"] == "commonvoice-fr-it" and one["seed"] == 7 and one["epochs"] == 1
    checkpoint = best_checkpoint(folder)
    two = ["--seed", "8", "--lr_head", "0.01", "--num_workers", "0"]
    run(tmp_path / "two", "mt", *stages, *two)
    assert json.loads((folder / "results.json").read_text())["history"] == before["history"]
    assert best_checkpoint(folder) == checkpoint
    assert len(list(tmp_path.glob("results/sources/fr-it/fusion_tpa-*"))) == 1
    # What was begun goes on without its sources; what they hold now is compared.
    (tmp_path / "results/sources").rename(tmp_path / "elsewhere")
    tested = run(tmp_path / "two", "mt", *stages, *two, "--test_only")
    assert tested["start_from"]["known_units"] == one["start_from"]["known_units"]
    assert not (tmp_path / "results/sources").exists()
    other = str(tmp_path / "one")
    with pytest.raises(CheckpointError, match=f"started from .*; {other} is another"):
        run(tmp_path / "two", "mt", *stages, *two, "--test_only", "--start_from", other)
    (tmp_path / "elsewhere").rename(tmp_path / "results/sources")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("lr_head: 0.002", "lr_head: 0.003"))
    with pytest.raises(ValueError, match="holds a run with .*lr_head"):
        run(tmp_path / "three", "mt", *stages, *two)


def test_sources_with_other_options_are_trained_apart(tmp_path):
    def place(*options):
        argv = ["hparams/fusion.yaml", "--language", "mt", "--source_languages", "[fr, it]"]
        argv += ["--sources_folder", str(tmp_path)]
        return sources.train_sources([*argv, *options], seen.append)

    seen = []
    first = place()
    assert place("--lr_head", "0.1", "--seed", "3", "--lm", "char", "--test_only") == first
    assert place("--layers", "[1, 2]") != first
    assert place("--source_options", "{number_of_epochs: 3}") != first
    line = seen[0]
    assert line[:1] == ["hparams/fusion.yaml"] and "--source_languages" not in line
    assert line[line.index("--language") + 1] == '["fr", "it"]'
    assert not {"--seed", "--lm", "char", "--test_only", "--lr_head"} & set(seen[1])


def test_runs_with_the_same_sources_wait_for_the_one_that_trains_them(tmp_path, monkeypatch):
    argv = ["hparams/fusion.yaml", "--language", "mt", "--source_languages", "[fr, it]"]
    argv += ["--sources_folder", str(tmp_path)]
    seen = []
    folder = sources.train_sources(argv, seen.append)
    with locked(folder.parent / f".{folder.name}.lock"):
        second = threading.Thread(target=sources.train_sources, args=(argv, seen.append))
        second.start()
        second.join(0.5)
        assert second.is_alive() and len(seen) == 1
        monkeypatch.setenv("RANK", "1")  # of one run's processes, the first has it for all
        sources.train_sources(argv, seen.append)
    second.join(60)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fr", "expected a list such as"),
        ("[fr, mt]", "mt is the language to be learned"),
        ("[fr]|--debug", "--debug keeps no checkpoint"),
    ],
)
def test_sources_that_are_none_are_refused(given, message):
    argv = ["hparams/fusion.yaml", "--language", "mt", "--source_languages", *given.split("|")]
    with pytest.raises(ValueError, match=message):
        sources.train_sources(argv, lambda argv: None)


@pytest.mark.parametrize("method", ["last_layer", "fusion_tpa", "full_finetune"])
def test_few_shot_settings_go_with_every_method(run, tmp_path, method):
    options = ["--few_shot", "true", "--number_of_epochs", "2", "--batch_seconds", "1.2"]
    if method != "fusion_tpa":
        options += ["--layers", "last:1"]
    results = run(tmp_path / "run", "mt", *options, "--frozen_epochs", "0", method=method)
    assert results["epochs"] == 2
    config = (tmp_path / "run/config.yaml").read_text()
    assert "few_shot: true" in config and "select_by: cer" in config
    assert "limit_warmup: 0\n" not in config


def test_few_shot_settings_can_stop_early():
    few = merge_files(METHODS / "base/few_shot.yaml")
    assert few["epoch_counter"]["limit_warmup"] + few["patience"] < few["number_of_epochs"]


def test_a_language_model_is_weighed_on_dev_and_scored_beside_the_best_path(run, tmp_path):
    options = ["--lm", "char", "--lm_order", "3", "--lm_alpha", "[0.5]", "--lm_beta", "[0.0, 1.0]"]
    results = run(tmp_path / "run", "mt", *options)
    lm = results["lm"]
    assert (lm["kind"], lm["order"], lm["text"], lm["dev_utterances"]) == ("char", 3, None, 3)
    assert (lm["alpha"], lm["beta"]) in [(0, 0), (0.5, 0), (0.5, 1)]
    assert results["test"]["mt"].keys() == {
        *("loss", "wer", "cer", "wer_beam", "cer_beam", "wer_lm", "cer_lm")
    }
    assert "\n  lm   " in (tmp_path / "run/test-mt.txt").read_text()
    assert lm["dev"]["cer"] <= lm["dev_beam"]["cer"]
    assert (tmp_path / "run/lm.arpa").is_file() == (lm["alpha"] > 0)


def test_a_language_model_of_a_text_can_be_applied_to_a_finished_run(run, tmp_path):
    before = run(tmp_path / "run", "mt")
    assert "lm" not in before and "cer_lm" not in before["test"]["mt"]
    (tmp_path / "text.txt").write_text("BĊX, a!\nBĊX 12\nBĊX a b.\n")
    options = ["--lm", "word", "--lm_order", "2", "--lm_text", str(tmp_path / "text.txt")]
    after = run(tmp_path / "run", "mt", "--test_only", *options)
    assert after["test"]["mt"]["cer"] == before["test"]["mt"]["cer"]
    assert "cer_lm" in after["test"]["mt"] and after["lm"]["text"].endswith("lm_text.txt")
    assert (tmp_path / "run/lm_text.txt").read_text() == "bċx a\nbċx a b\n", "cleaned alike"
    assert after["epochs"] == before["epochs"] and after["history"] == before["history"]
