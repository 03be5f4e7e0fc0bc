"""The recipe of any language of Common Voice: its data, its bad input, and short runs."""

import json
import logging
import sys
from pathlib import Path

import numpy
import pytest
import soundfile

from hff_modules.auto_layers import Analysis
from hff_modules.data.manifest import summarize_manifest
from tests import corpora

RECIPE = Path(__file__).parent.parent / "recipes/CommonVoice/ASR"
sys.path.insert(0, str(RECIPE))
from commonvoice_prepare import prepare_commonvoice  # noqa: E402

HEADER = ["client_id", "path", "sentence", "up_votes"]
WORDS = {"fr": "L’été, dit-il.", "ml": "മഴ പെയ്തു.", "th": "ฝน ตก"}


@pytest.fixture(scope="module")
def main():
    return corpora.load_train(RECIPE).main


def write_language(root: Path, language: str, sentence: str, clips: int = 3) -> None:
    """Two speakers in each part, so many clips of each."""
    for part in ("train", "dev", "test"):
        rows = []
        for number in range(2 * clips):
            path = f"{part}_{number}.wav"
            corpora.write_audio(root / language / "clips" / path, 0.5)
            rows.append([f"{language}{part}{number % 2}", path, sentence, 2])
        corpora.write_table(root / language / f"{part}.tsv", HEADER, rows, "\t")


@pytest.fixture
def data(tmp_path):
    for language, sentence in WORDS.items():
        write_language(tmp_path / "data", language, sentence)
    return tmp_path / "data"


@pytest.fixture
def save(tmp_path):
    return tmp_path / "save"


def rows(data, save, language="fr", part="train", **options):
    return corpora.read_table(prepare_commonvoice(data, save, language, **options)[language][part])


def edit(table: Path, old: str, new: str, count: int = 1) -> None:
    table.write_text(table.read_text().replace(old, new, count), encoding="utf-8")


def test_a_language_becomes_three_manifests_of_cleaned_text(data, save):
    assert rows(data, save)[0] == {
        "ID": "fr-train_0",
        "duration": "0.5000",
        "wav": "$data_root/fr/clips/train_0.wav",
        "spk_id": "frtrain0",
        "wrd": "l'été dit il",
    }
    assert rows(data, save, "th", "test")[0]["wrd"] == "ฝนตก"


def test_a_table_with_a_bom_windows_line_ends_and_quotes_in_sentences_is_read(data, save):
    before = rows(data, save)
    table = data / "fr/train.tsv"
    edit(table, "L’été", '"L’été" "')
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r\n"))
    assert rows(data, save) == before


def test_a_language_that_is_not_there_is_answered_with_those_that_are(data, save):
    with pytest.raises(FileNotFoundError, match="language eo: no such .* there: fr, ml, th"):
        prepare_commonvoice(data, save, "eo")
    with pytest.raises(FileNotFoundError, match="no such folder with a train.tsv .* holds clips"):
        prepare_commonvoice(data / "fr", save, "fr")
    with pytest.raises(ValueError, match="language: expected a folder's name .* got False"):
        prepare_commonvoice(data, save, False)  # YAML's reading of `no`


def test_a_language_without_parts_is_sent_to_the_recipe_that_makes_them(data, save):
    for part in ("train", "dev", "test"):
        (data / "fr" / f"{part}.tsv").rename(data / "fr" / "validated.tsv")
    with pytest.raises(FileNotFoundError, match="fr/validated.tsv recipes/Custom/ASR makes parts"):
        rows(data, save)


@pytest.mark.parametrize("minutes", ["ten", 0, -1.0])
def test_minutes_that_are_none_are_refused(data, save, minutes):
    with pytest.raises(ValueError, match=f"max_minutes: expected minutes above 0, got {minutes}"):
        rows(data, save, max_minutes=minutes)


def test_a_part_without_rows_says_what_to_do(data, save):
    table = data / "fr" / "dev.tsv"
    table.write_text(table.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="dev.tsv has no rows; .* recipes/Custom/ASR takes valid"):
        rows(data, save)


def test_clips_that_break_off_are_named_before_anything_is_computed(data, save, caplog):
    path = data / "fr" / "clips" / "train_1.flac"
    (data / "fr" / "clips" / "train_1.wav").unlink()
    soundfile.write(path, numpy.random.default_rng(0).uniform(-0.5, 0.5, 48000), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        made = rows(data, save, max_missing=0.5)
    assert len(made) == 5 and "train_1.flac: breaks off" in caplog.text


def test_misspelt_names_are_refused_before_the_sources_are_trained(data, main, tmp_path):
    argv = ["hparams/fusion.yaml", "--data_folder", str(data), "--language", "frr"]
    argv += ["--source_languages", "[ru]", "--sources_folder", str(tmp_path / "sources")]
    with pytest.raises(FileNotFoundError, match="language frr: no such folder"):
        main(argv)
    with pytest.raises(FileNotFoundError, match="lm_text=txet.txt: there is no such file"):
        main([*argv, "--language", "fr", "--lm", "char", "--lm_text", "txet.txt"])
    with pytest.raises(ValueError, match="say with --language what is to be learned"):
        main(["hparams/fusion.yaml", "--source_languages", "[ru]"])
    assert not (tmp_path / "sources").exists()


def test_absent_clips_are_counted_named_and_refused_above_the_share(data, save, caplog):
    (data / "fr/clips/train_3.wav").unlink()
    told = r"absent: 1 \(train_3.wav\).* 16.7%, and at most 5.0% may be .--max_missing"
    with pytest.raises(ValueError, match=told):
        rows(data, save)
    with caplog.at_level(logging.WARNING):
        assert len(rows(data, save, max_missing=0.2)) == 5
    assert "1 of 6 utterances cannot be used: clips that the table names are absent" in caplog.text


def test_unreadable_clips_are_refused_above_the_same_share(data, save):
    (data / "fr/clips/train_3.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match="unreadable .* at most 5.0% may be .--max_missing"):
        rows(data, save)
    assert len(rows(data, save, max_missing=0.2)) == 5


def test_clips_that_were_converted_are_found_by_their_stem(data, save):
    edit(data / "fr/train.tsv", ".wav", ".mp3", 99)
    assert rows(data, save)[0]["wav"] == "$data_root/fr/clips/train_0.wav"


def test_empty_sentences_and_mixed_scripts_are_left_out_of_training_and_counted(data, save, caplog):
    table = data / "fr/train.tsv"
    edit(table, "train_0.wav\tL’été, dit-il.", "train_0.wav\t")
    edit(table, "train_1.wav\tL’été", "train_1.wav\tЛ")
    with caplog.at_level(logging.WARNING):
        assert [row["ID"] for row in rows(data, save)] == [f"fr-train_{n}" for n in (2, 3, 4, 5)]
    assert "fr: train: 1 sentences with no letters (fr-train_0): left out" in caplog.text
    assert "letters of another script (fr-train_1): left out" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sentence", "text", "expected the columns client_id, path, sentence; it has client_id"),
        ("train_1.wav", "train_0.wav", "the clip fr/clips/train_0.wav is named twice"),
        ("frtrain0\ttrain_0", "frdev0\ttrain_0", "speaker frdev0 is in train and in dev"),
        ("train_5.wav\tL’été, dit-il.\t2", "train_5.wav", "line 7: expected 4 fields"),
    ],
)
def test_tables_that_cannot_be_right_are_refused(data, save, old, new, message):
    edit(data / "fr/train.tsv", old, new)
    with pytest.raises(ValueError, match=message):
        rows(data, save)


def test_minutes_are_drawn_from_all_speakers_the_same_ones_every_time(data, save):
    path = prepare_commonvoice(data, save, "fr", max_minutes=1.5 / 60)["fr"]["train"]
    assert path.name == "train-0.025min.csv"
    assert summarize_manifest(path).utterances == 3 and summarize_manifest(path).speakers == 2
    again = prepare_commonvoice(data, save.with_name("again"), "fr", max_minutes=1.5 / 60)
    assert again["fr"]["train"].read_text() == path.read_text()
    assert len(rows(data, save, part="dev", max_minutes=1.5 / 60)) == 6, "train alone is cut"
    assert len(rows(data, save, part="dev", max_dev_minutes=1 / 60)) == 2
    assert len(rows(data, save, max_dev_minutes=1 / 60)) == 6
    with pytest.raises(ValueError, match="max_minutes: expected minutes above 0, got 0"):
        rows(data, save, max_minutes=0)


def test_sentences_that_train_shares_are_counted_and_left_out_of_it_on_demand(data, save, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(rows(data, save)) == 6
    assert "fr: dev: 6 of 6 sentences are said in train, too" in caplog.text
    assert "fr: test: 6 of 6 sentences are said in train, too" in caplog.text
    with pytest.raises(ValueError, match="fr: train: all 6 sentences are said in another part"):
        rows(data, save, drop_shared_texts=True)
    edit(data / "fr/train.tsv", "train_0.wav\tL’été", "train_0.wav\tHiver")
    edit(data / "fr/dev.tsv", "dev_0.wav\tL’été", "dev_0.wav\tPluie")
    assert [row["wrd"] for row in rows(data, save, drop_shared_texts=True)] == ["hiver dit il"]
    assert len(rows(data, save, part="dev", drop_shared_texts=True)) == 6, "scored as it is"


def test_the_units_are_shown_before_training(data, save, caplog):
    with caplog.at_level(logging.INFO):
        rows(data, save, "ml")
    assert "ml: written in Malayalam" in caplog.text
    assert "ml: 8 characters to recognise: ത പ മ യ ഴ; of these" in caplog.text
    assert "U+0D41 MALAYALAM VOWEL SIGN U 6" in caplog.text


def test_the_recipe_runs_from_its_data_to_its_results(
    main, data, tmp_path, encoder_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = ["--data_folder", str(data), "--language", "ml"]
    main(corpora.arguments(tmp_path / "run", encoder_folder, "weighted_sum", *options))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["task"], results["dataset"]) == ("asr", "commonvoice-ml")
    assert results["test"].keys() == {"ml"} and {"cer", "wer"} <= results["test"]["ml"].keys()
    # A run that was given its layers is there: refused before anything is probed.
    monkeypatch.setattr(Analysis, "choose", None)
    with pytest.raises(ValueError, match="run that was given its layers .now auto:1"):
        auto = [*options, "--layers", "auto:1"]
        main(corpora.arguments(tmp_path / "run", encoder_folder, "weighted_sum", *auto))


def test_two_processes_train_one_recogniser_on_stored_states_first(data, encoder_folder, tmp_path):
    argv = corpora.arguments(tmp_path / "run", encoder_folder, "fusion_tpa", "--language", "fr")
    argv += ["--data_folder", str(data), "--frozen_epochs", "1", "--number_of_epochs", "2"]
    corpora.in_two_processes(RECIPE / "train.py", [*argv, "--cache", str(tmp_path / "cache")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [epoch["epoch"] for epoch in results["history"]] == [1, 2]
    assert numpy.isfinite(results["test"]["fr"]["loss"])


def test_two_processes_try_a_run_out(data, encoder_folder, tmp_path):
    argv = corpora.arguments(tmp_path / "run", encoder_folder, "fusion", "--language", "fr")
    argv += ["--data_folder", str(data), "--number_of_epochs", "2", "--debug"]
    corpora.in_two_processes(RECIPE / "train.py", argv)


def test_test_characters_unknown_in_training_are_counted(
    main, data, tmp_path, encoder_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    edit(data / "ml/test.tsv", "മഴ", "കടൽ")
    options = ["--data_folder", str(data), "--language", "ml"]
    main(corpora.arguments(tmp_path / "run", encoder_folder, "last_layer", *options))
    log = (tmp_path / "run/log.txt").read_text()
    assert "ml: 3 characters not among the units" in log
    assert "'ൽ' (MALAYALAM LETTER CHILLU L): 1" in log


def test_sentences_longer_than_their_audio_allows_are_left_out_by_name(
    main, data, tmp_path, encoder_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    edit(data / "fr/train.tsv", "L’été", "L’été " * 50)
    options = ["--data_folder", str(data), "--language", "fr"]
    main(corpora.arguments(tmp_path / "run", encoder_folder, "last_layer", *options))
    log = (tmp_path / "run/log.txt").read_text()
    assert "1 of 6 training utterances are too short for their CTC targets" in log
    assert "fr-train_0 (" in log


def test_several_languages_are_trained_on_together_and_tested_apart(
    main, data, tmp_path, encoder_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = ["--data_folder", str(data), "--language", "[fr, ml]"]
    argv = corpora.arguments("", encoder_folder, "last_layer", *options)
    place = argv.index("--output_folder")
    results = main([*argv[:place], *argv[place + 2 :]])
    assert results["dataset"] == "commonvoice-fr-ml" and results["test"].keys() == {"fr", "ml"}
    folder = tmp_path / "results/commonvoice-fr-ml/last_layer/1986"
    units = json.loads((folder / "units/units.json").read_text())["units"]
    assert "é" in units and "മ" in units
