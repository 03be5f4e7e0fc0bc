"""Preparation of every data set in its published layout, and a short run of every recipe."""

import importlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hff_modules.data.manifest import summarize_manifest
from hff_modules.data.prepare import at_most, check_apart
from tests import corpora

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    folder: str
    module: str
    function: str
    make: callable
    kind: str = "classification"
    options: dict = field(default_factory=dict)
    command: tuple = ()

    def load(self, name):
        path = RECIPES / self.folder / f"{name}.py"
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        return corpora.load_train(path.parent) if name == "train" else importlib.import_module(name)

    def prepare(self, data, save, **options):
        made = getattr(self.load(self.module), self.function)(
            data, save, **{**self.options, **options}
        )
        return made if self.kind == "speaker" else (made, {})

    def rows(self, data, save, **options):
        manifests, _ = self.prepare(data, save, **options)
        return {part: corpora.read_table(path) for part, path in manifests.items()}


ALL = {
    recipe.folder: recipe
    for recipe in (
        Recipe("EmoDB/emotion", "emodb_prepare", "prepare_emodb", corpora.make_emodb,
               options={"fold": 1}),
        Recipe("IEMOCAP/emotion", "iemocap_prepare", "prepare_iemocap", corpora.make_iemocap,
               options={"fold": 1}),
        Recipe("fluent-speech-commands/intent", "fluent_prepare", "prepare_fluent",
               corpora.make_fluent),
        Recipe("SpeechToIntent/intent", "intent_prepare", "prepare_intent", corpora.make_intent),
        Recipe("SpeechCommands/keyword", "speechcommands_prepare", "prepare_speechcommands",
               corpora.make_speechcommands),
        Recipe("ArabicSpeechCommands/keyword", "arabic_prepare", "prepare_arabic",
               corpora.make_arabic),
        Recipe("CommonVoice/SpeakerRec", "commonvoice_speakers_prepare",
               "prepare_commonvoice_speakers", corpora.make_commonvoice, "speaker"),
        Recipe("VoxCeleb/SpeakerRec", "voxceleb_prepare", "prepare_voxceleb",
               corpora.make_voxceleb, "speaker", {"dev_speakers": 2},
               ("--drawn", "{dev_speakers: 2}")),
    )
}  # fmt: skip
EVERY = pytest.mark.parametrize("recipe", ALL.values(), ids=ALL.keys())


@pytest.fixture
def save(tmp_path):
    return tmp_path / "save"


def test_every_recipe_of_utterances_is_in_these_tests():
    bases = ("classification.yaml", "speaker.yaml")
    found = {
        path.parents[1].relative_to(RECIPES).as_posix()
        for path in RECIPES.rglob("hparams/*.yaml")
        if any(f"extends: base/{base}" in path.read_text() for base in bases)
    }
    assert found == set(ALL)


@EVERY
def test_a_recipe_runs_from_its_data_to_its_results(recipe, tmp_path, encoder_folder, monkeypatch):
    data = recipe.make(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    options = ["--data_folder", str(data), "--cache", str(tmp_path / "store"), *recipe.command]
    argv = corpora.arguments(tmp_path / "run", encoder_folder, "weighted_sum", *options)
    recipe.load("train").main(argv)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["task"] == recipe.kind and results["test"].keys() == {"test"}
    assert list(results["layer_weights"]) == ["0", "1", "2", "3", "4"]
    expected = "eer" if recipe.kind == "speaker" else "accuracy"
    assert 0 <= results["test"]["test"][expected] <= 100
    assert list((tmp_path / "store").glob("*/*/*.safetensors")), "the states were stored"


@EVERY
def test_no_speaker_and_no_recording_of_a_test_part_is_in_its_training_part(recipe, tmp_path):
    data = recipe.make(tmp_path / "data")
    folds = range(1, 6) if "fold" in recipe.options else [None]
    for fold in folds:
        options = {} if fold is None else {"fold": fold}
        rows = recipe.rows(data, tmp_path / f"save{fold}", **options)
        assert rows.keys() == {"train", "dev", "test"}
        for column in ("wav", "spk_id"):
            values = {part: {row[column] for row in of_part} for part, of_part in rows.items()}
            if recipe.folder == "SpeechToIntent/intent" and column == "spk_id":
                assert values == {part: {""} for part in values}, "nobody knows who speaks there"
                continue
            assert not values["train"] & values["test"]
            assert not values["dev"] & (values["train"] | values["test"])


@pytest.mark.parametrize("fold", [0, 6, "all"])
@pytest.mark.parametrize("name", [name for name, it in ALL.items() if "fold" in it.options])
def test_a_fold_that_is_none_is_refused_with_those_that_are(name, fold, tmp_path, save):
    data = ALL[name].make(tmp_path / "data")
    with pytest.raises(ValueError, match=f"fold: expected one of 1, 2, 3, 4, 5, got {fold!r}"):
        ALL[name].rows(data, save, fold=fold)


@EVERY
def test_another_layout_is_refused_in_one_line_with_what_was_expected_and_found(
    recipe, tmp_path, save
):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=f"data_folder {nowhere}: no such folder; expected"):
        recipe.prepare(nowhere, save)
    other = tmp_path / "other"
    (other / "something").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match="no .* in it; expected .*; it holds something"
    ) as e:
        recipe.prepare(other, save)
    assert "\n" not in str(e.value)
    assert not save.exists()


@EVERY
def test_preparing_twice_reads_the_audio_once_and_anew_when_the_data_changed(
    recipe, tmp_path, save, monkeypatch
):
    data = recipe.make(tmp_path / "data")
    first = recipe.prepare(data, save)
    times = {path: path.stat().st_mtime_ns for path in first[0].values()}
    assert recipe.prepare(data, save) == first
    assert {path: path.stat().st_mtime_ns for path in times} == times
    moved = data.rename(tmp_path / "moved")
    recipe.prepare(moved, save)
    assert {path: path.stat().st_mtime_ns for path in times} != times


def test_parts_that_share_a_speaker_or_a_recording_are_refused():
    def row(wav, speaker):
        return {"ID": wav, "wav": wav, "spk_id": speaker}

    check_apart({"train": [row("a", "1"), row("b", "")], "test": [row("c", "2"), row("d", "")]})
    with pytest.raises(ValueError, match="the speaker 1 is in train and in test"):
        check_apart({"train": [row("a", "1")], "test": [row("b", "1")]})
    with pytest.raises(ValueError, match="the recording a is in dev and in test"):
        check_apart({"dev": [row("a", "1")], "test": [row("a", "2")]})


def test_of_each_value_no_more_than_the_limit_is_drawn_always_the_same():
    rows = [{"ID": str(n), "spk_id": "ab"[n % 3 == 0]} for n in range(12)]
    some = at_most(rows, "spk_id", 3, seed=1)
    assert [row["spk_id"] for row in some].count("a") == 3
    assert [row["spk_id"] for row in some].count("b") == 3
    assert some == at_most(rows[::-1], "spk_id", 3, seed=1)[::-1]
    assert some != at_most(rows, "spk_id", 3, seed=2)
    assert at_most(rows, "spk_id", None, seed=1) == rows


def test_absent_audio_is_named_and_refused_above_the_allowed_share(tmp_path, save):
    recipe = ALL["ArabicSpeechCommands/keyword"]
    data = recipe.make(tmp_path / "data")
    (data / "dataset/backward/00000014_NO_01.wav").unlink()
    with pytest.raises(ValueError, match="test: 1 of 4 .*absent.*00000014_NO_01.wav.*25.0%"):
        recipe.prepare(data, save)


def test_a_part_without_an_utterance_is_named_with_the_speakers_that_are_there(tmp_path, save):
    recipe = ALL["EmoDB/emotion"]
    data = recipe.make(tmp_path / "data")
    for path in (data / "wav").iterdir():
        if path.name[:2] in ("03", "08"):
            path.unlink()
    with pytest.raises(ValueError, match="nothing in it is for test; speakers there: 09, 10"):
        recipe.prepare(data, save)


# Each data set by itself


def test_emodb_takes_emotion_and_speaker_from_the_name_and_a_man_and_a_woman_for_test(
    tmp_path, save
):
    recipe = ALL["EmoDB/emotion"]
    data = recipe.make(tmp_path / "data")
    rows = recipe.rows(data, save, fold=5)
    assert {row["spk_id"] for row in rows["test"]} == {"15", "16"}
    assert {row["spk_id"] for row in rows["dev"]} == {"03", "08"}
    found = {row["ID"]: row["emotion"] for row in rows["test"] if row["spk_id"] == "15"}
    assert found == {
        "15a01Wa": "anger",
        "15a01La": "boredom",
        "15a01Ea": "disgust",
        "15a01Aa": "fear",
        "15a01Fa": "joy",
        "15a01Ta": "sadness",
        "15a01Na": "neutral",
    }
    tested = [recipe.rows(data, save, fold=fold)["test"] for fold in range(1, 6)]
    assert len({row["ID"] for part in tested for row in part}) == 70
    corpora.write_audio(data / "wav/03a01Xa.wav")
    with pytest.raises(ValueError, match="03a01Xa.wav: expected a name such as 03a01Fa"):
        recipe.prepare(data, save)


def test_iemocap_has_four_classes_of_which_happy_is_two_and_the_turns_speaker(tmp_path, save):
    recipe = ALL["IEMOCAP/emotion"]
    data = recipe.make(tmp_path / "data")
    rows = recipe.rows(data, save, fold=5)
    assert {row["wav"].split("/")[1] for row in rows["test"]} == {"Session5"}
    assert {row["wav"].split("/")[1] for row in rows["dev"]} == {"Session1"}
    assert len(rows["test"]) == 2 * 6 and len(rows["train"]) == 3 * 2 * 6
    row = next(row for row in rows["test"] if row["ID"] == "Ses05F_impro01_M000")
    assert (row["spk_id"], row["emotion"]) == ("Ses05M", "angry")
    assert row["wav"] == "$data_root/Session5/sentences/wav/Ses05F_impro01/Ses05F_impro01_M000.wav"
    emotions = [row["emotion"] for row in rows["test"] if row["ID"].startswith("Ses05M_script01_1")]
    assert sorted(emotions) == ["angry", "happy", "happy", "neutral", "neutral", "sad"]
    table = data / "Session2/dialog/EmoEvaluation/Ses02F_impro01.txt"
    table.write_text("Ses02F_impro01_F000,neu\n")
    with pytest.raises(ValueError, match=f"{table}: no turn in it; expected lines such as"):
        recipe.prepare(data, save)


def test_fluent_takes_three_slots_from_its_tables(tmp_path, save):
    recipe = ALL["fluent-speech-commands/intent"]
    data = recipe.make(tmp_path / "data")
    rows = recipe.rows(data, save)
    row = rows["dev"][1]
    assert (row["action"], row["object"], row["location"]) == ("deactivate", "music", "none")
    assert row["spk_id"] == "5o9BvRGEGvhaeBwA" and row["wav"].startswith("$data_root/wavs/speakers")
    corpora.write_table(data / "data/test_data.csv", ["path", "speakerId", "intent"], [])
    with pytest.raises(
        ValueError, match="test_data.csv: expected the columns .*action.* it has path"
    ):
        recipe.prepare(data, save)


def test_intents_have_every_slot_and_what_is_tested_was_seen_twice(tmp_path, save, caplog):
    recipe = ALL["SpeechToIntent/intent"]
    data = recipe.make(tmp_path / "data")
    rows = recipe.rows(data, save)
    assert {part: len(of_part) for part, of_part in rows.items()} == {
        "train": 42,
        "dev": 6,
        "test": 12,
    }
    assert (
        "1 of 61 utterances cannot be used: absent: 1 (clean/0075d273-51bb-0060.wav)" in caplog.text
    )
    assert summarize_manifest(save / "train.csv").speakers == 0, "nobody knows how many"
    for slot in corpora.INTENT_SLOTS:
        seen = [row[slot] for row in rows["train"]]
        assert all(value == value.strip() for value in seen) and "none" in seen
        assert all(seen.count(row[slot]) >= 2 for part in ("dev", "test") for row in rows[part])
    labels = json.loads((data / "label.json").read_text())
    labels["0075d273-51bb-0003.wav"]["slots"] = {"colour": "red"}
    (data / "label.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match="label.json: 0075d273-51bb-0003.wav has the slot colour"):
        recipe.prepare(data, save)


def test_the_benchmarks_own_folders_of_intents_are_found_too(tmp_path, save):
    recipe = ALL["SpeechToIntent/intent"]
    data = recipe.make(tmp_path / "data")
    (data / "speech").mkdir()
    (data / "label").mkdir()
    (data / "clean").rename(data / "speech/clean")
    (data / "label.json").rename(data / "label/label.json")
    rows = recipe.rows(data, save)
    assert rows["test"][0]["wav"].startswith("$data_root/speech/clean/0075d273")


def test_speech_commands_follow_their_own_lists(tmp_path, save):
    recipe = ALL["SpeechCommands/keyword"]
    data = recipe.make(tmp_path / "data")
    rows = recipe.rows(data, save)
    assert {row["ID"] for row in rows["dev"]} == {
        f"{word}-0132a06d_nohash_{number}" for word in ("bed", "cat", "yes") for number in (0, 1)
    }
    assert {row["spk_id"] for row in rows["test"]} == {"0c40e715"}
    assert len(rows["train"]) == 12 and {r["keyword"] for r in rows["train"]} == {
        "bed",
        "cat",
        "yes",
    }
    (data / "testing_list.txt").write_text("bed.wav\n")
    with pytest.raises(
        ValueError, match="testing_list.txt: 'bed.wav' is no clip; expected such as bed/"
    ):
        recipe.prepare(data, save)


def test_arabic_commands_follow_their_own_tables(tmp_path, save):
    recipe = ALL["ArabicSpeechCommands/keyword"]
    data = recipe.make(tmp_path / "data")
    rows = recipe.rows(data, save)
    assert [row["spk_id"] for row in rows["test"]] == ["00000014"] * 4
    assert rows["test"][3]["ID"] == "zoom_in-00000014_NO_02"
    assert rows["test"][3]["keyword"] == "zoom in"
    files = [[f"dataset/backward/00000030_NO_0{n}.wav", "backward"] for n in (1, 2)]
    corpora.write_table(data / "test.csv", ["file", "class"], files)
    with pytest.raises(ValueError, match="the recording dataset/.*00000030.* in train and in test"):
        recipe.prepare(data, save)


def test_trials_of_common_voice_are_drawn_by_speaker_and_always_the_same(tmp_path, save):
    recipe = ALL["CommonVoice/SpeakerRec"]
    data = recipe.make(tmp_path / "data")
    manifests, trials = recipe.prepare(data, save)
    lines = [line.split() for line in trials["test"].read_text().splitlines()]
    speakers = {row["ID"]: row["spk_id"] for row in corpora.read_table(manifests["test"])}
    assert len(lines) == 9 * 8 // 2 and len({tuple(line) for line in lines}) == 36
    for same, first, second in lines:
        assert (speakers[first] == speakers[second]) == (same == "1")
    clip = data / "clips/common_voice_fr_500.wav"
    clip.rename(clip.with_suffix(".flac"))  # converted: it is found by its stem
    made, again = recipe.prepare(data, tmp_path / "again")
    assert again["test"].read_text() == trials["test"].read_text()
    assert len(corpora.read_table(made["train"])) == len(corpora.read_table(manifests["train"]))
    _, other = recipe.prepare(data, tmp_path / "other", seed=7)
    assert other["test"].read_text() != trials["test"].read_text()
    few = recipe.rows(data, tmp_path / "few", max_per_speaker=2)
    assert sorted(row["spk_id"] for row in few["train"]) == ["train0"] * 2 + ["train1"] * 2 + [
        "train2"
    ]
    one = [["c", f"common_voice_fr_4{n}0.wav", "", 2, 0, "", "", "", "fr", ""] for n in range(2)]
    header = "client_id path sentence up_votes down_votes age gender accents locale segment".split()
    corpora.write_table(data / "test.tsv", header, one, "\t")
    with pytest.raises(ValueError, match="test.tsv: no trials from 2 utterances of 1 speakers"):
        recipe.prepare(data, save)


def test_voxceleb_uses_its_own_sets_and_trials(tmp_path, save):
    recipe = ALL["VoxCeleb/SpeakerRec"]
    data = recipe.make(tmp_path / "data")
    manifests, trials = recipe.prepare(data, save)
    rows = {part: corpora.read_table(path) for part, path in manifests.items()}
    assert {row["spk_id"] for row in rows["test"]} == {"id10270", "id10271"}
    assert len({row["spk_id"] for row in rows["train"]}) == 3
    assert rows["test"][0]["ID"] == "id10270/5r0dWxy17C8/00001"
    official = (data / "veri_test2.txt").read_text()
    assert trials["test"].read_text() == official.replace(".wav", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 id10270/5r0dWxy17C8/00009.wav id10270/5r0dWxy17C8/00001.wav",
         "veri_test2.txt, line 29: names id10270/5r0dWxy17C8/00009.wav, which is absent; expected"),
        ("0 id10001/5r0dWxy17C8/00001.wav id10270/5r0dWxy17C8/00001.wav",
         "line 29: id10001/.* is of no speaker of the test set of .*vox1_meta.csv"),
        ("id10270/5r0dWxy17C8/00001.wav id10270/5r0dWxy17C8/00002.wav",
         "line 29: expected `1 id10270/5r0dWxy17C8/00001.wav"),
    ],
)  # fmt: skip
def test_voxceleb_trials_that_cannot_be_right_are_refused(tmp_path, save, line, message):
    recipe = ALL["VoxCeleb/SpeakerRec"]
    data = recipe.make(tmp_path / "data")
    with open(data / "veri_test2.txt", "a") as file:
        file.write(line + "\n")
    with pytest.raises((ValueError, OSError), match=message):
        recipe.prepare(data, save)


def test_voxceleb_with_another_word_for_a_set_is_refused(tmp_path, save):
    recipe = ALL["VoxCeleb/SpeakerRec"]
    data = recipe.make(tmp_path / "data")
    meta = data / "vox1_meta.csv"
    meta.write_text(re.sub(r"dev$", "train", meta.read_text(), flags=re.M))
    with pytest.raises(
        ValueError, match="vox1_meta.csv: id10001 is in 'train'; expected dev or test"
    ):
        recipe.prepare(data, save)
