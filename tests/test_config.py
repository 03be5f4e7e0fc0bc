import pytest
import torch

from hff_modules import cli, config
from hff_modules.cli import given, separated, without_wait
from hff_modules.config import METHODS, load_config, merge_files


@pytest.fixture
def files(tmp_path):
    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path

    return write


def test_keys_are_found_in_both_ways_of_writing_them():
    line = ["fusion", "--few_shot=true", "--source_languages=[ca, it]", "--check_only"]
    assert given(line, "few_shot") is True and given(line, "source_languages") == ["ca", "it"]
    assert given(line, "check_only") is True and given(line, "language") is None
    assert separated(["--language=mt", "fusion"]) == ["fusion", "--language", "mt"]
    line = ["fusion", "--start_from=a=b"]
    assert without_wait(line)[-2:] == ["--frozen_epochs", "0"]
    assert without_wait([*line, "--frozen_epochs=3"])[-1] == "--frozen_epochs=3"


def test_command_line_wins_over_method_over_base_over_what_it_extends(files):
    folder = files(
        task="one: task\ntwo: task\nthree: task\nfour: task\n",
        base="extends: task.yaml\ntwo: base\nthree: base\nfour: base\n",
        method="three: method\nfour: method\n",
    )
    hparams, _ = load_config([str(folder / "method.yaml"), "--four", "line"], folder / "base.yaml")
    del hparams["config"]
    assert hparams == {"one": "task", "two": "base", "three": "method", "four": "line"}


def test_of_several_files_that_are_extended_the_later_one_wins(files):
    folder = files(
        a="one: a\ntwo: a\nthree: a\n",
        b="two: b\nthree: b\n",
        both="extends: [a, b]\nthree: both\n",
    )
    assert merge_files(folder / "both.yaml") == {"one": "a", "two": "b", "three": "both"}


def test_references_and_objects_see_the_merged_values(files):
    folder = files(
        base="size: 1\nthing: !new:collections.Counter\n    n: !ref <size>\nname: !ref m/<size>\n",
        method="maker: !name:collections.Counter\nsize: 2\n",
    )
    argv = [str(folder / "method.yaml"), "--size", "7", "--thing", "{m: 5}"]
    hparams, _ = load_config(argv, folder / "base.yaml")
    assert hparams["thing"] == {"n": 7, "m": 5}
    assert hparams["name"] == "m/7"
    assert hparams["maker"]("aab") == {"a": 2, "b": 1}
    assert "size: 7" in hparams["config"] and "!ref <size>" in hparams["config"]


def test_a_whole_object_can_be_replaced_on_the_command_line(files):
    folder = files(base="thing: !new:collections.Counter\n    n: 1\n", method="m: 0\n")
    argv = [str(folder / "method.yaml"), "--thing", "!name:collections.OrderedDict"]
    hparams, _ = load_config(argv, folder / "base.yaml")
    assert hparams["thing"]() == {}


@pytest.mark.parametrize(
    ("said", "value"),
    [
        *[
            ("results/run #2", "results/run #2"),
            ("a: b.csv", "a: b.csv"),
            ("k=v/x.csv", "k=v/x.csv"),
        ],
        *[("2024-05-01", "2024-05-01"), ("/a b/x.wav", "/a b/x.wav"), ("no", "no"), ("@x", "@x")],
        *[
            ("null", None),
            ("7", 7),
            ("0.5", 0.5),
            ("[3, 6]", [3, 6]),
            ("'7'", "7"),
            ("'", "'"),
            ("{a: x}", {"a": "x"}),
        ],
    ],
)
def test_what_is_no_number_and_no_list_is_taken_as_it_stands(files, said, value):
    folder = files(base="key: x\n", method="m: 0\n")
    for line in (["--key", said], [f"--key={said}"]):
        hparams, _ = load_config([str(folder / "method.yaml"), *line], folder / "base.yaml")
        assert hparams["key"] == value == given(["method", *line], "key")


def test_a_key_without_a_value_is_a_switch_or_refused(files):
    folder = files(base="drop: false\nlm: null\n", method="m: 0\n")
    line = [str(folder / "method.yaml"), "--drop"]
    assert load_config(line, folder / "base.yaml")[0]["drop"] is True
    for more, message in (
        (["--lm"], "--lm: expected a value"),
        (["--lm", "[char"], r"--lm: \[char is no YAML"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config([*line, *more], folder / "base.yaml")
    with pytest.raises(
        ValueError, match="expected `--key value` after the method file, got 'more'"
    ):
        load_config([line[0], "more"], folder / "base.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--test_only false", "--test_only is a switch, without a value; got 'false'"),
        ("--debug=false", "--debug is a switch"),
        ("--device cpu extra", "--device: expected one value, got 'cpu extra'"),
        ("--bfloat16_mix_prec", "is not taken; take --precision bf16"),
        ("--drop no", "--drop: expected true or false, got no"),
        ("--cache false", "--cache: expected a value, or null, got false"),
        ("--size abc", "--size: expected a number, got abc"),
        ("--weights 0.5", r"--weights: expected a list such as \[0.5\], got 0.5"),
        ("--weights a", r"--weights: expected a list such as \[a\], got a"),
        ("--rates 0.1", r"--rates: expected a mapping such as \{head: 0.1\}, got 0.1"),
        ("--thing LinearHead", "--thing: expected an object such as '!new:hff_modules.heads.Lin"),
        ("--thing null", "--thing: expected an object such as"),
        ("--rates {haed: 1}", "--rates has no 'haed'; it has head"),
        ("--thing {m: 5}", "a setting does not fit: .*m"),
        ("--param_file x", "--param_file: there is no such key"),
    ],
)
def test_a_value_of_another_kind_is_refused(files, line, message):
    thing = "!new:hff_modules.heads.LinearHead\n    input_size: 1\n    num_units: 2\n"
    keys = f"drop: false\ncache: a\nsize: 1\nweights: [1]\nrates: {{head: 2}}\nthing: {thing}"
    folder = files(base=keys, method="m: 0\n")
    key, _, said = line.partition(" ")
    words = said.split() if key == "--device" else [said] if said else []
    with pytest.raises((ValueError, KeyError), match=message):
        load_config([str(folder / "method.yaml"), key, *words], folder / "base.yaml")


def test_a_folder_that_is_named_like_a_number_is_a_folder(files):
    folder = files(base="csv: !PLACEHOLDER\n", method="m: 0\n")
    hparams, _ = load_config([str(folder / "method.yaml"), "--csv", "2024"], folder / "base.yaml")
    assert hparams["csv"] == "2024"


def test_a_key_without_a_value_is_asked_for(files):
    folder = files(base="csv: !PLACEHOLDER\nfolder: !PLACEHOLDER\n", method="m: 0\n")
    with pytest.raises(ValueError, match="--folder must be given$"):
        load_config([str(folder / "method.yaml"), "--csv", "a.csv"], folder / "base.yaml")


def test_the_method_file_comes_first_and_an_empty_text_is_one(files):
    with pytest.raises(
        ValueError, match="the method file first, such as hparams/fusion.yaml --few"
    ):
        separated(["--few_shot", "fusion"])
    with pytest.raises(ValueError, match="the method file first"):
        separated(["--language=mt", "--few_shot", "fusion"])
    folder = files(base="language: ''\n", method="m: 0\n")
    line = [str(folder / "method.yaml"), "--language", ""]
    assert load_config(line, folder / "base.yaml")[0]["language"] == ""


def test_of_a_key_given_twice_the_last_counts(files):
    folder = files(base="size: 1\n", method="other: 0\n")
    argv = [str(folder / "method.yaml"), "--size", "2", "--size=3"]
    assert load_config(argv, folder / "base.yaml")[0]["size"] == 3


def test_run_options_of_speechbrain_are_not_taken_for_keys(files):
    folder = files(base="a: 1\n", method="b: 2\n")
    argv = [str(folder / "method.yaml"), "--device", "cpu", "--precision", "bf16"]
    hparams, run_opts = load_config(argv, folder / "base.yaml")
    assert run_opts["device"] == "cpu" and run_opts["precision"] == "bf16"
    assert "device" not in hparams


def test_unknown_key_is_refused_with_the_nearest_one(files):
    folder = files(base="learning_rate: 1\nseed: 2\n", method="m: 0\n")
    with pytest.raises(KeyError, match="--lerning_rate.*mean --learning_rate.*seed"):
        load_config([str(folder / "method.yaml"), "--lerning_rate", "3"], folder / "base.yaml")


def test_unknown_method_is_refused_with_those_there_are(files):
    folder = files(base="a: 1\n")
    with pytest.raises(
        FileNotFoundError, match="hparams/fuson.yaml.*fusion.yaml.*weighted_sum.yaml"
    ):
        load_config(["hparams/fuson.yaml"], folder / "base.yaml")


def test_extending_what_is_not_there_names_both_files(files):
    folder = files(base="extends: nowhere.yaml\n")
    with pytest.raises(FileNotFoundError, match="base.yaml extends nowhere.yaml"):
        merge_files(folder / "base.yaml")


@pytest.mark.parametrize("text", ["", "a: [1, 2", "- a list", "caf\xe9: 1"])
def test_a_file_that_is_damaged_is_named(files, text):
    folder = files(base="a: 1", method="b: 2")
    (folder / "method.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=str(folder / "method.yaml")):
        load_config([str(folder / "method.yaml")], folder / "base.yaml")


def test_a_key_that_counts_on_the_command_line_alone_is_refused_in_a_file():
    for line in (["fusion"], ["fusion", "--few_shot"]):
        cli.check_said(line, {"few_shot": len(line) > 1}, "few_shot")
    with pytest.raises(ValueError, match="few_shot: it has an effect on the command line alone"):
        cli.check_said(["fusion"], {"few_shot": True}, "few_shot")


def test_a_device_that_is_not_there_is_refused(files, monkeypatch):
    folder = files(base="a: 1", method="b: 2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda:99", "toaster"):
        line = [str(folder / "method.yaml"), "--device", device]
        with pytest.raises(ValueError, match=f"--device {device}: PyTorch has no such device"):
            load_config(line, folder / "base.yaml")


def test_a_process_without_a_gpu_of_its_own_is_refused_before_anything_is_prepared(
    files, monkeypatch
):
    folder = files(base="a: 1", method="b: 2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("speechbrain.utils.distributed.infer_device", lambda: "cuda:1")
    with pytest.raises(ValueError, match="--device cuda:1: PyTorch has no such device"):
        load_config([str(folder / "method.yaml")], folder / "base.yaml")


def test_a_circle_of_extends_is_refused(files):
    folder = files(a="extends: b.yaml\n", b="extends: a.yaml\n")
    with pytest.raises(ValueError, match="circle.*a.yaml -> .*b.yaml -> .*a.yaml"):
        merge_files(folder / "a.yaml")


def test_the_same_key_twice_in_a_file_is_refused(files):
    with pytest.raises(Exception, match="duplicate key"):
        merge_files(files(a="x: 1\nx: 2\n") / "a.yaml")


def test_a_recipe_without_a_method_of_its_own_uses_the_projects(files, monkeypatch):
    folder = files(base="layers: all\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(config, "load_hyperpyyaml", lambda text: {"text": text})
    hparams, _ = load_config(["hparams/fusion.yaml"], folder / "base.yaml")
    assert "layers: every:3" in hparams["text"]


def test_a_recipe_may_refine_the_projects_method_of_the_same_name(files):
    folder = files(fusion="extends: fusion\nlr_fusion: 0.5\n")
    merged = merge_files(folder / "fusion.yaml")
    assert merged["method"] == "fusion" and merged["lr_fusion"] == 0.5


@pytest.mark.parametrize("path", sorted(METHODS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_method_file_is_called_what_it_is(path):
    assert merge_files(path)["method"] == path.stem


@pytest.mark.parametrize(
    ("recipe", "activation"),
    [
        ("EmoDB/emotion", "relu"),
        ("IEMOCAP/emotion", "relu"),
        ("CommonVoice/SpeakerRec", "relu"),
        ("SpeechToIntent/intent", "gelu"),
        ("LibriSpeech/ASR", "gelu"),
    ],
)
@pytest.mark.parametrize("method", ["l_adapters", "elp"])
def test_l_adapters_have_their_authors_activation_for_the_task(recipe, activation, method):
    (base,) = (METHODS.parent / "recipes" / recipe / "hparams").glob("*.yaml")
    line = [f"hparams/{method}.yaml", "--data_folder", "x", "--device", "cpu"]
    hparams, _ = load_config(line, base)
    assert hparams["fusion"].keywords["activation"] == activation


def test_a_job_that_is_done_leaves_its_process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def main(argv):
        torch.distributed.barrier()
        raise SystemExit(0)  # as --fill_only ends

    cli.run(main)
    assert not torch.distributed.is_initialized()
