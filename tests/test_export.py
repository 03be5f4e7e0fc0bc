import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import ruamel.yaml
import soundfile
import torch
from safetensors import safe_open
from speechbrain.inference.ASR import EncoderASR
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.inference.speaker import SpeakerRecognition

from hff_modules import HierarchicalFusion, SSLEncoder, adapters
from hff_modules import export as export_module
from hff_modules.brains import CTCBrain, train_classification, train_ctc, train_speaker
from hff_modules.checkpoint import write_tensors
from hff_modules.config import load_config
from hff_modules.data.loading import read_speech
from hff_modules.data.manifest import COLUMNS, write_manifest
from hff_modules.export import export, main, push
from hff_modules.export_format import ExportError
from hff_modules.exported import load_exported
from hff_modules.heads import LinearHead
from tests.test_training import arguments, make_speech

ROOT = Path(__file__).parent.parent
LEARN_FAST = ["--lr_head", "0.05", "--lr_fusion", "0.02", "--lr_adapters", "0.02"]
KINDS = ["fusion", "weighted_sum", "hconv", "l_adapters", "tpa", "lora", "bitfit", "layernorm"]
KINDS += ["top_k", "full_finetune", "prompts", "prefix", "p_adapter", "unipet", "compacter"]
KINDS += ["elp", "fusion_tpa", "adapter_bias", "e_adapter"]


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Twelve recordings and their manifest."""
    folder = tmp_path_factory.mktemp("tones")
    make_speech(folder, 12)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder_folder, tones):
    """Train a run and see what it computed in testing; gives its folder and log probabilities."""
    base = tmp_path_factory.mktemp("base") / "tones.yaml"
    base.write_text("extends: base/ctc.yaml\ndataset: tones\n")
    runs, forward = {}, CTCBrain.compute_forward

    def run(method, *options):
        key = (method, *options)
        if key in runs:
            return runs[key]
        folder, seen = tmp_path_factory.mktemp(method), {}

        def spy(brain, batch, stage):
            log_probs, lengths = forward(brain, batch, stage)
            if stage.name == "TEST":
                for name, row, count in zip(batch.id, log_probs, lengths.tolist(), strict=True):
                    seen[name] = row[:count].detach().clone()
            return log_probs, lengths

        line = arguments(folder, encoder_folder, method, *LEARN_FAST, *options)
        hparams, run_opts = load_config(line, base)
        csv = tones / "train.csv"
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(CTCBrain, "compute_forward", spy)
            train_ctc(hparams, run_opts, tones, [csv], [csv], {"tones": csv})
        runs[key] = folder, seen
        return runs[key]

    return run


@pytest.fixture(scope="module")
def learned(trained, tmp_path_factory):
    """A run that recognises something, with stored states, and its exported model."""
    store = str(tmp_path_factory.mktemp("store"))
    options = ["--layers", "[2, 4]", "--number_of_epochs", "12", "--patience", "12"]
    folder, seen = trained("fusion", *options, "--cache", store)
    target = tmp_path_factory.mktemp("exports") / "model"
    export(folder, target)
    return folder, seen, target


def read_tones(tones):
    data = read_speech([tones / "train.csv"], tones).data
    return {name: torch.from_numpy(soundfile.read(row["wav"], dtype="float32")[0])
            for name, row in data.items()}  # fmt: skip


def recognised(folder, name="tones"):
    """What a run wrote that it recognised, by utterance."""
    lines = (folder / f"test-{name}.txt").read_text().splitlines()
    return dict(zip(lines[::3], [line[6:] for line in lines[2::3]], strict=True))


def batched(signals):
    lengths = torch.tensor([len(signal) for signal in signals])
    wavs = torch.nn.utils.rnn.pad_sequence(signals, batch_first=True)
    return wavs, lengths / lengths.max()


@pytest.mark.parametrize("method", KINDS)
def test_an_exported_model_computes_what_the_run_computed(trained, tones, tmp_path, method):
    layers = ["--layers", "[1, 3, 4]"] if method in ("fusion", "fusion_tpa") else []
    folder, seen = trained(method, *layers)
    export(folder, tmp_path / "model")
    model = load_exported(tmp_path / "model")
    signals = read_tones(tones)
    states, lengths = model.states(*batched(list(signals.values())))
    outputs = model.outputs(states, lengths)
    for row, (name, expected) in enumerate(seen.items()):
        index = list(signals).index(name)
        assert lengths[index] == len(expected), row
        torch.testing.assert_close(outputs[index, : len(expected)], expected, rtol=0, atol=1e-4)
    manifest = json.loads((tmp_path / "model" / "hff.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    assert manifest["horizon"] == results["horizon"]
    assert (
        results["weights"] == SSLEncoder(results["encoder"], layers=results["layers"]).fingerprint
    )
    assert model.horizon == manifest["horizon"] and model.layers == manifest["layers"]
    assert list(model.encoder.adapters) == model.adapters


def test_the_run_s_score_comes_out_of_another_process_in_another_folder(
    learned, tones, tmp_path, encoder_folder
):
    folder, _, target = learned
    script = (
        "import json, sys, soundfile, torch\n"
        "from hff_modules.exported import load_exported\n"
        "model = load_exported(sys.argv[1])\n"
        "read = lambda f: torch.from_numpy(soundfile.read(f, dtype='float32')[0])[None]\n"
        "print(json.dumps([model(read(f))[0]['text'] for f in sys.argv[2:]]))\n"
    )
    expected = recognised(folder)
    assert len(set(expected.values())) > 3, "the run is meant to have learned something"
    files = [str(tones / f"{name}.wav") for name in expected]
    done = subprocess.run(
        [sys.executable, "-c", script, str(target), *files],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(expected.values())


def test_states_are_rounded_as_they_were_stored_in_training(learned, tones):
    _, seen, target = learned
    model = load_exported(target)
    assert model.manifest["stored_as"] == "fp16"
    signals = read_tones(tones)
    name, expected = next(iter(seen.items()))
    states, lengths = model.states(signals[name][None])
    torch.testing.assert_close(model.outputs(states, lengths)[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(states, states.half().float())


def test_speechbrain_s_own_encoder_asr_opens_it(learned, tones, tmp_path, monkeypatch):
    folder, _, target = learned
    monkeypatch.chdir(tmp_path)
    expected = recognised(folder)
    opened = EncoderASR.from_hparams(source=str(target), savedir=str(tmp_path / "kept"))
    for name, text in expected.items():
        assert " ".join(opened.transcribe_file(str(tones / f"{name}.wav")).split()) == text
    signals = read_tones(tones)
    texts, _ = opened.transcribe_batch(*batched([signals[name] for name in expected]))
    assert [" ".join(text.split()) for text in texts] == list(expected.values())
    assert not any(parameter.requires_grad for parameter in opened.mods.parameters())


def test_speechbrain_s_own_encoder_asr_searches_with_a_beam(learned, tones, trained):
    _, seen, target = learned
    opened = EncoderASR.from_hparams(source=str(target), hparams_file="hyperparams_beam.yaml")
    searcher = opened.decoding_function
    assert searcher.vocab_list == load_exported(target).units.vocab_list
    signals = read_tones(tones)
    texts, _ = opened.transcribe_batch(*batched([signals[name] for name in seen]))
    expected = [searcher(row[None], torch.ones(1))[0][0].text for row in seen.values()]
    assert texts == expected and len(set(texts)) > 3


def test_sentencepiece_models_open_in_speechbrain_too(trained, tones, tmp_path):
    folder, _ = trained("last_layer", "--units", "unigram", "--vocab_size", "8")
    export(folder, tmp_path / "model")
    for file in ("hyperparams.yaml", "hyperparams_beam.yaml"):
        opened = EncoderASR.from_hparams(source=str(tmp_path / "model"), hparams_file=file)
        opened.transcribe_file(str(tones / "u0.wav"))
    model, expected = load_exported(tmp_path / "model"), recognised(folder)
    signals = read_tones(tones)
    assert {name: model(signals[name][None])[0]["text"] for name in expected} == expected


def test_the_folder_holds_the_trained_tensors_and_nothing_else(trained, tmp_path):
    folder, _ = trained("fusion_tpa", "--layers", "[1, 3, 4]")
    export(folder, tmp_path / "model")
    assert {str(p.relative_to(tmp_path / "model")) for p in (tmp_path / "model").rglob("*")} == {
        *("README.md", "hff.json", "hyperparams.yaml", "hyperparams_beam.yaml"),
        *("trained.safetensors", "tokenizer", "tokenizer/units.json"),
    }
    results = json.loads((folder / "results.json").read_text())
    with safe_open(str(tmp_path / "model" / "trained.safetensors"), "pt") as file:
        numbers = sum(file.get_tensor(name).numel() for name in file.keys())
    assert numbers == results["trainable_parameters"]


def test_the_card_says_what_the_hub_and_a_reader_want_to_know(trained, tmp_path):
    folder, _ = trained("fusion_tpa", "--layers", "[1, 3, 4]")
    about = {"license": "cc-by-4.0", "language": "en", "data_license": "CC BY 4.0"}
    manifest = export(folder, tmp_path / "model", about=about)
    text = (tmp_path / "model" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = ruamel.yaml.YAML(typ="safe").load(front)
    assert front["license"] == "cc-by-4.0" and front["language"] == "en"
    assert front["pipeline_tag"] == "automatic-speech-recognition"
    assert {"speechbrain", "asr", "fusion_tpa"} <= set(front["tags"])
    results = json.loads((folder / "results.json").read_text())
    assert f"| test tones | loss {results['test']['tones']['loss']:.4g}" in body
    assert f"{results['trainable_parameters']:,} of {results['total_parameters']:,}" in body
    assert manifest["encoder"]["fingerprint"] in body and "CC BY 4.0" in body


def test_another_base_encoder_is_refused_with_both_named(
    learned, make_encoder_folder, encoder_folder
):
    _, _, target = learned
    made_on = json.loads((target / "hff.json").read_text())["encoder"]["fingerprint"]
    other = make_encoder_folder("wav2vec2-conformer-rel")
    with pytest.raises(ExportError, match=f"{made_on}.*this is {other}"):
        load_exported(target, base=other)
    with pytest.raises(ExportError, match=f"{made_on}.*this is {other}"):
        load_exported(target, encoder=SSLEncoder(other, layers=[2, 4]))
    with pytest.raises(ExportError, match=r"reads the layers \[2, 4\].* gives \[1, 4\]"):
        load_exported(target, encoder=SSLEncoder(encoder_folder, layers=[1, 4]))


def test_a_base_encoder_that_has_changed_or_is_gone_is_refused(learned, tmp_path, encoder_folder):
    _, _, target = learned
    with pytest.raises(ExportError, match=f"made on the encoder {encoder_folder}.*nowhere"):
        load_exported(target, base=str(tmp_path / "nowhere"))


def test_a_model_on_a_shared_encoder_gives_what_it_gives_alone(trained, tones, encoder_folder):
    names = ["fusion", "tpa", "bitfit", "layernorm", "elp"]
    shared, signals = SSLEncoder(encoder_folder), list(read_tones(tones).values())
    plain, _ = shared(*batched(signals))
    alone, together = {}, {}
    for name in names:
        folder, _ = trained(name, *(["--layers", "[1, 3, 4]"] if name == "fusion" else []))
        target = folder / "exported"
        export(folder, target)
        model = load_exported(target)
        alone[name] = model.outputs(*model.states(*batched(signals)))
        together[name] = load_exported(target, encoder=shared, name=f"my {name}")
    for name in [*names, *reversed(names)]:
        model = together[name]
        torch.testing.assert_close(model.outputs(*model.states(*batched(signals))), alone[name])
    assert together["tpa"].adapters == ["my tpa"]
    assert together["elp"].adapters == ["my elp-e_adapter", "my elp-p_adapter", "my elp-layernorm"]
    for name in shared.adapters:
        adapters.disable(shared, name)
    assert torch.equal(shared(*batched(signals))[0], plain)


def test_a_refused_model_leaves_no_adapter_on_a_shared_encoder(
    trained, tones, encoder_folder, tmp_path
):
    folder, _ = trained("tpa")
    export(folder, tmp_path / "model")
    shared, signals = SSLEncoder(encoder_folder, layers=4).eval(), [*read_tones(tones).values()]
    plain, _ = shared(*batched(signals))
    (tmp_path / "model" / "trained.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(ExportError, match="has no trained.safetensors"):
            load_exported(tmp_path / "model", encoder=shared)
    assert not shared.adapters and torch.equal(shared(*batched(signals))[0], plain)
    folder, _ = trained("bitfit")
    export(folder, tmp_path / "bitfit")
    (tmp_path / "bitfit" / "trained.safetensors").write_text("no tensors")
    mine = adapters.attach(shared, "bitfit", "mine")
    with torch.no_grad():
        for parameter in mine.trained():
            parameter += 0.1
    tuned, _ = shared(*batched(signals))
    with pytest.raises(ExportError, match="cannot be read"):
        load_exported(tmp_path / "bitfit", encoder=shared)
    assert list(shared.adapters) == ["mine"] and torch.equal(shared(*batched(signals))[0], tuned)


def test_packed_models_need_no_other_folder(trained, tones, tmp_path):
    folder, seen = trained("tpa")
    export(folder, tmp_path / "model", pack=True)
    hff = tmp_path / "model" / "hff.json"
    manifest = json.loads(hff.read_text())
    assert "/" not in manifest["encoder"]["source"], "a path tells names"
    manifest["encoder"]["source"] = "/gone"
    hff.write_text(json.dumps(manifest))
    model = load_exported(tmp_path / "model")
    name, expected = next(iter(seen.items()))
    outputs = model.outputs(*model.states(read_tones(tones)[name][None]))
    torch.testing.assert_close(outputs[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "bitfit", "top_k"])
def test_a_merged_model_is_a_plain_encoder_that_gives_the_same(trained, tones, tmp_path, method):
    folder, seen = trained(method)
    export(folder, tmp_path / "model", merge=True)
    model = load_exported(tmp_path / "model")
    assert model.adapters == [] and not model.encoder.adapters
    signals = read_tones(tones)
    for name, expected in seen.items():
        outputs = model.outputs(*model.states(signals[name][None]))
        torch.testing.assert_close(outputs[0], expected, rtol=0, atol=1e-4)
    plain = SSLEncoder(str(tmp_path / "model" / "encoder"))
    assert plain.num_layers == 4 and plain.fingerprint != model.manifest["encoder"]["source"]


@pytest.mark.parametrize("method", ["lora", "top_k"])
def test_what_was_trained_above_a_trunk_in_half_precision_stays_in_single(
    trained, tmp_path, method
):
    folder, _ = trained(method, "--encoder_precision", "bf16", "--cache", "null")
    export(folder, tmp_path / "model", merge=True)
    assert load_exported(tmp_path / "model").encoder.precision == "fp32"


def test_weights_that_lie_elsewhere_are_packed_too(encoder_folder, tmp_path, monkeypatch):
    encoder = SSLEncoder(encoder_folder)
    found = export_module._files
    # As of a hub repository without safetensors on its main branch.
    monkeypatch.setattr(
        export_module, "_files", lambda e, *n: [p for p in found(e, *n) if p.suffix == ".json"]
    )
    export_module.pack_encoder(encoder, tmp_path / "packed")
    assert SSLEncoder(str(tmp_path / "packed")).fingerprint == encoder.fingerprint


def test_an_encoder_of_fp16_runs_in_fp32_on_a_cpu(trained, tmp_path):
    folder, _ = trained("weighted_sum")
    export(folder, tmp_path / "model")
    hff = tmp_path / "model" / "hff.json"
    manifest = json.loads(hff.read_text())
    manifest["encoder"]["precision"] = "fp16"
    hff.write_text(json.dumps(manifest))
    assert load_exported(tmp_path / "model").encoder.precision == "fp32"


def test_what_cannot_be_folded_in_is_refused_and_nothing_is_left(trained, tmp_path):
    with pytest.raises(ExportError, match="tpa .* cannot be folded in"):
        export(trained("tpa")[0], tmp_path / "model", merge=True)
    with pytest.raises(ExportError, match="no adapters"):
        export(trained("weighted_sum")[0], tmp_path / "model", merge=True)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_only_when_asked(trained, tmp_path, monkeypatch):
    folder, _ = trained("weighted_sum")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ExportError, match="give another folder"):
        export(folder, tmp_path / "notes", force=True)
    export(folder, tmp_path / "model")
    with pytest.raises(ExportError, match="--force replaces it"):
        export(folder, tmp_path / "model")
    export(folder, tmp_path / "model", force=True)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    monkeypatch.chdir(tmp_path / "model")
    export(folder, ".", force=True)
    assert (tmp_path / "model" / "hff.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("hff.json", lambda text: text[:40], "is not JSON"),
        ("hff.json", lambda text: text.replace('"format": 1', '"format": 9'), "of format 1"),
        ("hff.json", lambda text: text.replace('"HierarchicalFusion"', '"nn"'), "'nn' is no class"),
        ("hff.json", lambda text: text.replace('"LinearHead"', '"nn"'), "'nn' is no class of"),
        ("hff.json", lambda text: text.replace('"num_units": ', '"num_units": 1'), "head.output"),
        ("hff.json", None, "has no hff.json"),
        ("trained.safetensors", None, "has no trained.safetensors"),
        ("trained.safetensors", lambda text: "no tensors", "cannot be read"),
        ("tokenizer/units.json", None, "units.json"),
        ("tokenizer/units.json", lambda text: text[: len(text) // 2], "tokenizer holds no units"),
        ("tokenizer/units.json", lambda text: "[]", "tokenizer holds no units"),
        ("tokenizer/units.json", lambda text: text.replace('"A"', '"A", "X"'), "of another model"),
    ],
)
def test_damaged_models_are_refused_by_file(trained, tmp_path, file, change, message):
    folder, _ = trained("fusion", "--layers", "[1, 3, 4]")
    export(folder, tmp_path / "model")
    path = tmp_path / "model" / file
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text() if path.suffix == ".json" else ""))
    with pytest.raises(ValueError, match=message):
        load_exported(tmp_path / "model")


@pytest.fixture(scope="module")
def utterance_run(tmp_path_factory, encoder_folder, tones):
    """Train a classifier with two slots or a speaker model on the tones; gives its folder."""

    def run(task):
        folder = tmp_path_factory.mktemp(task)
        rows = read_speech([tones / "train.csv"], tones).data
        table = [
            {
                "ID": name,
                "duration": row["duration"],
                "wav": row["wav"],
                "spk_id": f"s{number % 3}",
                "wrd": row["wrd"],
                "action": ["on", "off", "up"][number % 3],
                "object": ["lamp", "heat"][number % 2],
            }
            for number, (name, row) in enumerate(rows.items())
        ]
        write_manifest(folder / "all.csv", table, [*COLUMNS, "action", "object"])
        base = folder / "base.yaml"
        slots = "slots: [action, object]\n" if task == "classification" else ""
        base.write_text(f"extends: base/{task}.yaml\ndataset: tones\n{slots}")
        line = arguments(folder / "run", encoder_folder, "fusion", "--layers", "[2, 4]")
        where = line.index("--head")
        line[where + 1] = {
            "classification": "!name:hff_modules.heads.PooledClassifier {hidden_size: 8}",
            "speaker": "!name:hff_modules.heads.SpeakerHead {hidden_size: 8, embedding_size: 6}",
        }[task]
        hparams, run_opts = load_config(line, base)
        csv = folder / "all.csv"
        if task == "classification":
            manifests = {"train": csv, "dev": csv, "tones": csv}
            train_classification(hparams, run_opts, tones, manifests)
            return folder / "run"
        for row in table[6:]:  # other speakers
            row["spk_id"] = row["spk_id"].replace("s", "t")
        write_manifest(folder / "train.csv", table[:6])
        write_manifest(folder / "test.csv", table[6:])
        pairs = [(a, b) for a in table[6:] for b in table[6:] if a["ID"] < b["ID"]]
        trials = [f"{int(a['spk_id'] == b['spk_id'])} {a['ID']} {b['ID']}" for a, b in pairs]
        listed = folder / "trials.txt"
        listed.write_text("\n".join(trials) + "\n")
        test, lists = folder / "test.csv", {"dev": listed, "tones": listed}
        manifests = {"train": folder / "train.csv", "dev": test, "tones": test}
        train_speaker(hparams, run_opts, tones, manifests, lists)
        return folder / "run"

    return run


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels.json: expected classes by slot"),
        ({"action": ["on"], "object": ["lamp", "heat"]}, "labels.json has slots .*another model"),
    ],
)
def test_labels_that_are_not_the_models_are_refused_by_file(
    utterance_run, tmp_path, labels, message
):
    export(utterance_run("classification"), tmp_path / "model")
    (tmp_path / "model" / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(ExportError, match=message):
        load_exported(tmp_path / "model")


def test_speechbrain_s_own_encoder_classifier_opens_classifiers(utterance_run, tones, tmp_path):
    folder, target = utterance_run("classification"), tmp_path / "model"
    manifest = export(folder, target)
    assert manifest["task"] == "classification"
    model, signals = load_exported(target), read_tones(tones)
    found = json.loads((folder / "test-tones.json").read_text())
    for name, expected in found.items():
        (result,) = model(signals[name][None])
        assert {slot: one["label"] for slot, one in result.items()} == expected["found"]
        assert all(0 < one["probability"] <= 1 for one in result.values())
    wavs, wav_lens = batched(list(signals.values()))
    states, lengths = model.states(wavs, wav_lens)
    logits = model.outputs(states, lengths)
    for slot in (None, "action", "object"):
        opened = EncoderClassifier.from_hparams(source=str(target), overrides={"slot": slot})
        log_probs, _, index, labels = opened.classify_batch(wavs, wav_lens)
        torch.testing.assert_close(log_probs, logits[slot or "action"].log_softmax(-1))
        assert labels == [found[name]["found"][slot or "action"] for name in signals]
    *_, labels = opened.classify_file(str(tones / "u0.wav"))
    assert labels == [found["u0"]["found"]["object"]]
    with pytest.raises(ExportError, match="slot='colour': expected one of action, object"):
        EncoderClassifier.from_hparams(source=str(target), overrides={"slot": "colour"})


def test_speechbrain_s_own_speaker_recognition_opens_speaker_models(utterance_run, tones, tmp_path):
    folder, target = utterance_run("speaker"), tmp_path / "model"
    assert export(folder, target)["task"] == "speaker"
    with safe_open(str(target / "trained.safetensors"), "pt") as file:
        assert not any("classifier" in name for name in file.keys())
    model, signals = load_exported(target), read_tones(tones)
    opened = SpeakerRecognition.from_hparams(source=str(target))
    scored = [line.split() for line in (folder / "test-tones.txt").read_text().splitlines()]
    for _, first, second, expected, *_ in scored:
        ours = [torch.tensor(model(signals[name][None])[0]) for name in (first, second)]
        assert float(torch.cosine_similarity(*ours, dim=0)) == pytest.approx(
            float(expected), abs=2e-4
        )
        score, _ = opened.verify_files(*(str(tones / f"{n}.wav") for n in (first, second)))
        assert float(score) == pytest.approx(float(expected), abs=2e-4)
    assert opened.encode_batch(*batched(list(signals.values()))).shape == (12, 1, 6)


class FakeHub:
    """A hub in a folder."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def create_repo(self, name, private, exist_ok):
        (self.folder / name).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, folder_path, repo_id):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    def snapshot_download(self, name, revision=None, allow_patterns=None, **options):
        self.asked.append((name, revision, allow_patterns))
        if not (self.folder / name).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("404: no such repository")
        return str(self.folder / name)

    def hf_hub_download(self, repo_id, filename, **options):
        return str(self.folder / repo_id / filename)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def test_a_model_goes_to_the_hub_and_comes_back(learned, tones, tmp_path, hub, capsys, monkeypatch):
    folder, _, target = learned
    line = [str(folder), str(tmp_path / "model"), "--push", "me/tones"]
    with pytest.raises(ExportError, match="which others do not have; export it with --pack"):
        main(line)
    main([*line, "--pack", "--force", "--license", "mit"])
    assert capsys.readouterr().out.endswith("https://hub/me/tones\n")
    monkeypatch.chdir(tmp_path)
    model = load_exported("me/tones", revision="v1")
    name, revision, patterns = hub.asked[-1]
    assert (name, revision) == ("me/tones", "v1") and "hff.json" in patterns
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".yaml")) for pattern in patterns)
    expected = recognised(folder)
    signal = read_tones(tones)["u1"]
    assert model(signal[None])[0]["text"] == expected["u1"]
    opened = EncoderASR.from_hparams(source="me/tones", savedir=str(tmp_path / "kept"))
    assert " ".join(opened.transcribe_file(str(tones / "u1.wav")).split()) == expected["u1"]


def test_a_hub_name_that_is_not_there_is_said_in_one_line(hub):
    with pytest.raises(ExportError, match="me/nothing: .*hub does not give it .404") as error:
        load_exported("me/nothing")
    assert "\n" not in str(error.value)
    for name in ("nowhere", "./no/where", "a/b/c"):
        with pytest.raises(ExportError, match="no such folder"):
            load_exported(name)


def test_an_upload_that_fails_is_said_in_one_line(learned, tmp_path, hub, monkeypatch):
    export(learned[0], tmp_path / "model", pack=True)

    def refuse(name, private, exist_ok):
        raise OSError("403: not yours\nand more")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(ExportError, match="me/tones: the hub did not take .*403: not yours.$"):
        push(tmp_path / "model", "me/tones")


def test_nothing_of_the_folder_is_executed_or_unpickled(learned, tmp_path, monkeypatch):
    """A hostile folder: Python files and pickles lie in it, and its YAML runs code."""
    shutil.copytree(learned[2], tmp_path / "model")
    (tmp_path / "model" / "hyperparams.yaml").write_text("x: !apply:os.abort []\n")
    (tmp_path / "model" / "custom.py").write_text("import os\nos.abort()\n")

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(pickle, "Unpickler", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    assert load_exported(tmp_path / "model").task == "asr"
    EncoderASR.from_hparams(source=str(learned[2]))


def fusion_numbers(states, width, hidden, out):
    """Closed formula for hierarchical fusion with LayerNorms and concat merges."""
    entrance = states * (2 * width + width * hidden + hidden)
    merges = (states - 1) * (4 * hidden + 2 * hidden * hidden + hidden)
    return entrance + merges + hidden * out + out


def test_fusion_and_adapter_models_of_a_base_shaped_encoder_are_small():
    width, layers, rank = 768, 12, 32
    fusion = fusion_numbers(3, width, 256, width)
    assert fusion == sum(p.numel() for p in HierarchicalFusion(3, width, 256).parameters())
    head = 30 * width + 30
    tpa = layers * (2 * width * rank + width + rank)
    lora = layers * 2 * 2 * width * 8
    bitfit, norms = 101_376, 36_864
    for numbers in (fusion + head, tpa + head, lora + head, bitfit + head, norms + head):
        assert 4 * numbers < 9.9e6, numbers
    assert 4 * (fusion + tpa // 4 + head) < 10e6  # adapters in the upper three layers, and fusion


def test_a_real_file_of_a_base_shaped_encoder_is_below_ten_megabytes(tmp_path):
    fusion = HierarchicalFusion(3, 768, 256)
    head = LinearHead(768, 30)
    tensors = {f"fusion.{k}": t for k, t in fusion.state_dict().items()}
    write_tensors(tmp_path / "trained.safetensors", tensors | head.state_dict())
    size = (tmp_path / "trained.safetensors").stat().st_size
    assert 4 * fusion_numbers(3, 768, 256, 768) < size < 10e6
