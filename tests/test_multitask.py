import json
import shutil

import pytest
import torch

from hff_modules import HierarchicalFusion, SSLEncoder, adapters
from hff_modules.checkpoint import write_tensors
from hff_modules.data import CharUnits
from hff_modules.export_format import ExportError, described_adapters, named_tensors
from hff_modules.exported import load_exported
from hff_modules.heads import LinearHead, PooledClassifier, SpeakerHead
from hff_modules.multitask import MultiTask
from tests.conftest import FAMILIES
from tests.test_adapters_together import randomise
from tests.test_encoder import SAMPLES, speech

UNITS = CharUnits.from_texts(["ABCD"])
HEADS = {
    "asr": (LinearHead, {"num_units": UNITS.size}),
    "classification": (PooledClassifier, {"slots": {"mood": 3, "voice": 2}, "hidden_size": 8}),
    "speaker": (SpeakerHead, {"embedding_size": 6, "hidden_size": 8}),
}
LENGTHS = (9_000, SAMPLES, 7_001)


def write_model(
    folder, encoder_folder, task="speaker", layers=(2, 4), adapted=None, stored_as=None, seed=0
):
    """Write an exported model whose every weight is random; gives its folder."""
    torch.manual_seed(seed)
    encoder = SSLEncoder(encoder_folder, layers=list(layers))
    for method, options in (adapted or {}).items():
        for parameter in adapters.attach(encoder, method, **options).trained():
            parameter.data += 0.1 * torch.randn_like(parameter)
    parts = {
        "fusion": (HierarchicalFusion, {"num_states": len(layers), "input_size": 24,
                                        "hidden_size": 8}),
        "head": (HEADS[task][0], {"input_size": 24, **HEADS[task][1]}),
    }  # fmt: skip
    modules = {part: kind(**arguments) for part, (kind, arguments) in parts.items()}
    for module in modules.values():
        for tensor in module.state_dict().values():
            tensor += 0.1 * torch.randn_like(tensor)
    tensors = named_tensors(encoder.adapters, **modules)
    manifest = {
        "format": 1,
        "task": task,
        "encoder": {**encoder.manifest(), "precision": "fp32", "packed": False, "seed": 0},
        "layers": list(layers),
        "horizon": encoder.horizon,
        "stored_as": stored_as if encoder.stored_layers else None,  # as an export has it
        "adapters": described_adapters(encoder.adapters),
        **{part: {"class": k.__name__, "arguments": a} for part, (k, a) in parts.items()},
    }
    folder.mkdir(parents=True)
    write_tensors(folder / "trained.safetensors", tensors)
    (folder / "hff.json").write_text(json.dumps(manifest))
    labels = {"mood": ["calm", "glad", "sad"], "voice": ["low", "high"]}
    (folder / "labels.json").write_text(json.dumps(labels))
    UNITS.save(folder / "tokenizer")
    return str(folder)


TPA, LORA = {"bottleneck": 4}, {"rank": 2}
MODELS = {
    "asr": {"task": "asr", "stored_as": "fp16"},
    "emotion": {"task": "classification", "layers": (1, 3)},
    "speaker": {"adapted": {"tpa": {**TPA, "layers": "last:2"}}, "layers": (1, 4)},
    "french": {"adapted": {"lora": {**LORA, "layers": [3]}}, "layers": (0, 3), "stored_as": "int8"},
    "german": {"adapted": {"lora": {**LORA, "layers": [3, 4]}}, "seed": 1, "task": "asr"},
    "houlsby": {"adapted": {"houlsby": {"bottleneck": 4}}},
    "two": {"adapted": {"unipet": {"bottleneck": 4, "length": 2}, "prompts": {"length": 3}}},
    "p_adapter": {"adapted": {"p_adapter": {"length": 3}}},
    "prefix": {"adapted": {"prefix": {"length": 3, "layers": "last:1"}}},
    "elp": {"adapted": {"e_adapter": {"bottleneck": 4}, "layernorm": {}}},
    "top": {"adapted": {"top_k": {"layers": "last:1"}}, "task": "classification"},
    "bitfit": {"adapted": {"bitfit": {"layers": "last:2"}}},
    "full": {"adapted": {"full": {}}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_encoder_folder):
    """Exported models of a family: their folders by task."""
    made = {}

    def make(family):
        if family not in made:
            root, encoder = tmp_path_factory.mktemp(family), make_encoder_folder(family)
            made[family] = {t: write_model(root / t, encoder, **m) for t, m in MODELS.items()}
        return made[family]

    return make


def same(found, expected):
    """Equal texts, labels and times, and numbers up to rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return found == pytest.approx(expected, abs=1e-4, rel=1e-4)
    return found == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_task_gives_what_its_model_gives_alone(family, folders):
    batch = speech(*LENGTHS)
    together = MultiTask(None, folders(family))(*batch)
    assert list(together) == list(MODELS)
    for task, folder in folders(family).items():
        assert same(together[task], load_exported(folder)(*batch)), task
    embeddings = [together[task][0] for task in ("houlsby", "two", "elp", "bitfit", "full")]
    assert not any(same(a, b) for a in embeddings for b in embeddings if a is not b)


@pytest.mark.parametrize("family", ["wavlm-base", "w2v-bert-2", "whisper"])
def test_utterances_of_a_batch_may_have_different_tasks(family, folders):
    model = MultiTask(None, folders(family))
    wanted = [["asr", "speaker", "top"], ["french", "german", "elp", "two"], ["asr", "bitfit"]]
    found = model(*speech(*LENGTHS), tasks=wanted)
    assert set(found) == {task for tasks in wanted for task in tasks}
    for row, length in enumerate(LENGTHS):
        wavs, _ = speech(*LENGTHS)
        alone = model(wavs[row : row + 1, :length], tasks=wanted[row])
        for task, answers in found.items():
            if task in wanted[row]:
                assert same(answers[row], alone[task][0]), task
            else:
                assert answers[row] is None


@pytest.fixture
def count_rows():
    """Count the utterances that each call of each layer has."""

    def count(model):
        calls = {}
        for number, layer in enumerate(model.encoder._family.layers, start=1):
            layer.register_forward_hook(
                lambda m, args, out, n=number: calls.setdefault(n, []).append(len(args[0]))
            )
        return calls

    return count


def test_tasks_without_adapters_run_every_layer_once(folders, count_rows):
    chosen = {task: folders("w2v-bert-2")[task] for task in ("asr", "emotion")}
    model = MultiTask(None, chosen)
    calls = count_rows(model)
    model(*speech(*LENGTHS))
    assert calls == {1: [3], 2: [3], 3: [3], 4: [3]}
    calls.clear()
    model(*speech(*LENGTHS), tasks="emotion")
    assert calls == {1: [3], 2: [3], 3: [3]}  # nothing reads layer 4


def test_only_what_lies_above_the_horizon_is_run_again(folders, count_rows):
    tasks = ("emotion", "speaker", "german")
    model = MultiTask(None, {task: folders("w2v-bert-2")[task] for task in tasks})
    calls = count_rows(model)
    model(*speech(*LENGTHS))
    assert calls == {1: [3], 2: [3], 3: [3, 3, 3], 4: [3, 3]}
    calls.clear()
    model(*speech(*LENGTHS), tasks=["speaker", "german"])
    assert calls == {1: [3], 2: [3], 3: [3, 3], 4: [3, 3]}


def test_utterances_with_different_adapters_go_through_the_upper_layers_together(
    folders, count_rows
):
    model = MultiTask(None, {t: folders("w2v-bert-2")[t] for t in ("speaker", "french", "german")})
    calls = count_rows(model)
    model(*speech(*LENGTHS), tasks=[["speaker"], ["french"], ["german"]])
    assert calls == {1: [3], 2: [3], 3: [3], 4: [3]}


def test_a_given_encoder_is_used_and_left_as_it_was(folders, make_encoder_folder):
    encoder, batch = SSLEncoder(make_encoder_folder("w2v-bert-2")), speech(*LENGTHS)
    before, _ = encoder(*batch)
    weights = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    model = MultiTask(encoder, {t: folders("w2v-bert-2")[t] for t in ("asr", "elp", "top", "full")})
    assert model.encoder is encoder
    model(*batch)
    assert all(torch.equal(weights[n], t) for n, t in encoder.model.state_dict().items())
    assert torch.equal(encoder(*batch)[0], before)


def test_the_encoder_of_models_may_have_moved(make_encoder_folder, tmp_path):
    moved = shutil.copytree(make_encoder_folder("w2v-bert-2"), tmp_path / "encoder")
    models = {t: write_model(tmp_path / t, str(moved), **MODELS[t]) for t in ("asr", "emotion")}
    batch = speech(*LENGTHS)
    expected = MultiTask(None, models)(*batch)
    place = str(moved.rename(tmp_path / "elsewhere"))
    with pytest.raises(ExportError, match="give its place with --encoder"):
        MultiTask(None, models)
    assert same(MultiTask(None, models, base=place)(*batch), expected)
    with pytest.raises(ExportError, match="asr was made on the encoder .* this is .*hubert"):
        MultiTask(None, models, base=make_encoder_folder("hubert-base"))


def test_an_utterance_may_have_several_adapters(make_encoder_folder):
    encoder, batch = SSLEncoder(make_encoder_folder("wavlm-base"), layers=[4]), speech(*LENGTHS)
    encoder.eval()
    for method, options in (("prompts", {"length": 2}), ("unipet", {"length": 3, **TPA})):
        randomise(adapters.attach(encoder, method, **options), 0)
    with torch.no_grad():
        both, lengths = encoder(*batch)
        one, _ = encoder(*batch, adapters="unipet")
        mixed, _ = encoder(*batch, adapters=[("prompts", "unipet"), "unipet", None])
    for row, expected in enumerate((both, one)):
        frames = int(lengths[row])
        torch.testing.assert_close(
            mixed[0, row, :frames], expected[0, row, :frames], rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(both[0, 0], one[0, 0], atol=1e-3)


# Refusals


def test_models_of_different_encoders_are_refused_with_both_named(
    folders, make_encoder_folder, tmp_path
):
    other = write_model(tmp_path / "other", make_encoder_folder("hubert-base"), layers=(1, 2))
    with pytest.raises(ExportError) as refusal:
        MultiTask(None, {"asr": folders("w2v-bert-2")["asr"], "other": other})
    message = str(refusal.value)
    assert "different encoders" in message and "\n" not in message
    assert other in message and folders("w2v-bert-2")["asr"] in message


def test_models_whose_encoders_ran_in_different_precisions_are_refused(
    folders, make_encoder_folder, tmp_path
):
    one = folders("w2v-bert-2")["asr"]
    other = tmp_path / "half"
    write_model(other, make_encoder_folder("w2v-bert-2"))
    manifest = json.loads((other / "hff.json").read_text())
    manifest["encoder"]["precision"] = "bf16"
    (other / "hff.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="'asr' .*fp32, 'half' .*bf16; give the encoder to use"):
        MultiTask(None, {"asr": one, "half": str(other)})


def test_an_encoder_that_is_not_the_model_s_or_gives_too_few_layers_is_refused(
    folders, make_encoder_folder
):
    models = {"asr": folders("w2v-bert-2")["asr"]}
    with pytest.raises(ExportError, match="asr was made on the encoder .* this is .*hubert"):
        MultiTask(SSLEncoder(make_encoder_folder("hubert-base")), models)
    with pytest.raises(ExportError, match=r"reads the layers \[2, 4\].* gives \[3, 4\]"):
        MultiTask(SSLEncoder(make_encoder_folder("w2v-bert-2"), layers=[3, 4]), models)


def test_a_task_that_is_not_there_is_refused(folders):
    model = MultiTask(None, {t: folders("w2v-bert-2")[t] for t in ("asr", "emotion")})
    with pytest.raises(KeyError, match="there is no task 'mood'; there are asr, emotion"):
        model(*speech(SAMPLES), tasks="mood")
    with pytest.raises(ValueError, match="2 lists of tasks were given for 1 utterances"):
        model(*speech(SAMPLES), tasks=[["asr"], ["asr"]])


@pytest.mark.parametrize("name", ["a/b", "", "a.b"])
def test_a_name_that_cannot_stand_in_an_address_is_refused(name, folders):
    with pytest.raises(ExportError, match="expected one or more names of letters"):
        MultiTask(None, {name: folders("w2v-bert-2")["asr"]})
