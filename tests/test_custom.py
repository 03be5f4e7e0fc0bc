"""The recipe for people's own recordings: checks, splits, and a short run."""

import csv
import json
import logging
import sys
from pathlib import Path

import pytest

from tests import corpora

RECIPE = Path(__file__).parent.parent / "recipes/Custom/ASR"
sys.path.insert(0, str(RECIPE))
from custom_prepare import prepare_custom  # noqa: E402

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def write_csv(path: Path, rows) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def recordings(folder: Path, count: int = 30, seconds: float = 0.6, **columns) -> list[dict]:
    """Rows; a column is a function of the row's number."""
    rows = []
    for number in range(count):
        wav = f"audio/{number}.wav"
        corpora.write_audio(folder / wav, seconds)
        text = f"{WORDS[number % 10]}, {WORDS[number // 10]}!"
        rows.append({"wav": wav, "text": text} | {k: f(number) for k, f in columns.items()})
    return rows


@pytest.fixture
def save(tmp_path):
    return tmp_path / "save"


def parts(manifests):
    return {part: corpora.read_table(path) for part, path in manifests.items()}


def test_rows_become_manifests_of_the_parts_that_they_name(tmp_path, save):
    names = ["train", "dev", "test", "train", "validation"]
    rows = recordings(tmp_path, split=lambda n: names[n % 5], speaker=lambda n: f"s{n}")
    rows[0]["wav"] = str(tmp_path / rows[0]["wav"])
    manifests, root = prepare_custom(write_csv(tmp_path / "my.csv", rows), save)
    made = parts(manifests)
    assert root == tmp_path and {part: len(rows) for part, rows in made.items()} == {
        "train": 12,
        "dev": 12,
        "test": 6,
    }
    assert made["train"][0] == {
        "ID": "00002-0",
        "duration": "0.6000",
        "wav": str(tmp_path / "audio/0.wav"),
        "spk_id": "s0",
        "wrd": "one one",
    }
    assert made["train"][1]["wav"] == "$data_root/audio/3.wav"
    report = (save / "report.txt").read_text()
    assert "30 usable rows, parts as the column split says" in report
    assert "train: 0.1 min, 12 utterances" in report and "characters to recognise: e f" in report
    assert "no suspicious rows" in report


def test_without_a_split_no_speaker_is_in_two_parts_and_the_same_rows_give_the_same_parts(
    tmp_path, save
):
    rows = recordings(tmp_path, speaker=lambda n: f"speaker {n % 15}")
    first = parts(prepare_custom(write_csv(tmp_path / "my.csv", rows), save)[0])
    speakers = {part: {row["spk_id"] for row in rows} for part, rows in first.items()}
    assert not speakers["train"] & (speakers["dev"] | speakers["test"])
    assert not speakers["dev"] & speakers["test"]
    assert len(first["train"]) == 22 and len(first["dev"]) == len(first["test"]) == 4
    again = parts(prepare_custom(write_csv(tmp_path / "my.csv", rows), save)[0])
    assert again == first


@pytest.mark.parametrize("speaker", [lambda n: "", lambda n: "one", lambda n: f"of {n % 2}"])
def test_without_speakers_or_with_too_few_no_text_is_in_two_parts(tmp_path, save, speaker):
    rows = recordings(tmp_path, speaker=speaker)
    for row in rows[1::2]:
        row["text"] = rows[rows.index(row) - 1]["text"].upper()  # each text is said twice
    made = parts(prepare_custom(write_csv(tmp_path / "my.csv", rows), save)[0])
    texts = {part: {row["wrd"] for row in rows} for part, rows in made.items()}
    assert not texts["train"] & (texts["dev"] | texts["test"]) and not texts["dev"] & texts["test"]
    assert min(map(len, made.values())) >= 3
    assert "parts by text" in (save / "report.txt").read_text()


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("missing", r"no such file: 1 \(line 3: .*audio/1.wav\)"),
        ("twice", r"the file of another row: 1 \(line 3: as line 2\)"),
        ("empty", r"text without letters: 1 \(line 3\)"),
        ("broken", r"unreadable or empty audio: 1 \(.*1.wav"),
    ],
)
def test_unusable_rows_are_named_left_out_and_refused_above_a_share(
    tmp_path, save, caplog, trouble, message
):
    rows = recordings(tmp_path)
    if trouble == "missing":
        (tmp_path / "audio/1.wav").unlink()
    elif trouble == "twice":
        rows[1]["wav"] = rows[0]["wav"]
    elif trouble == "empty":
        rows[1]["text"] = " 12 … "
    else:
        (tmp_path / "audio/1.wav").write_bytes(b"")
    path = write_csv(tmp_path / "my.csv", rows)
    with pytest.raises(
        ValueError, match=f"my.csv: 1 of 30 .*{message}.* 1.0% may be .--max_bad_share"
    ):
        prepare_custom(path, save, max_bad_share=0.01)
    with caplog.at_level(logging.WARNING):
        made = parts(prepare_custom(path, save)[0])
    assert sum(map(len, made.values())) == 29 and "They are left out" in caplog.text


def test_rows_whose_text_and_audio_do_not_belong_together_are_reported_and_kept(tmp_path, save):
    rows = recordings(tmp_path)
    rows[4]["text"] = "far too many words for so short a sound " * 3
    corpora.write_audio(tmp_path / "audio/9.wav", 31.0)
    corpora.write_audio(tmp_path / "audio/11.wav", 0.1)
    made = parts(prepare_custom(write_csv(tmp_path / "my.csv", rows), save)[0])
    assert sum(map(len, made.values())) == 30
    report = (save / "report.txt").read_text()
    assert "3 suspicious rows, which are kept:" in report
    assert "line 6, 4.wav: many characters" in report
    assert "line 11, 9.wav: few characters, 0.2 per second" in report and "31.0 s long" in report
    assert "line 13, 11.wav:" in report and "0.1 s long" in report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "trian"}, "my.csv, line 3: split is 'trian'; expected train, dev, test"),
        ({"split": "eval"}, "split is 'eval'"),  # dev to some, test to others
        ({"split": ""}, "my.csv, line 3: no split; expected one in all rows or none"),
    ],
)
def test_splits_that_are_none_are_refused(tmp_path, save, change, message):
    rows = recordings(tmp_path, split=lambda n: "train" if n % 2 else "dev")
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        prepare_custom(write_csv(tmp_path / "my.csv", rows), save)


def test_files_that_cannot_serve_are_refused(tmp_path, save):
    with pytest.raises(FileNotFoundError, match="csv .*no.csv: no such file"):
        prepare_custom(tmp_path / "no.csv", save)
    (tmp_path / "my.csv").write_text("file,sentence\na.wav,b\n")
    with pytest.raises(ValueError, match="expected the columns wav, text; it has file, sentence"):
        prepare_custom(tmp_path / "my.csv", save)
    (tmp_path / "my.csv").write_text("wav,text\n")
    with pytest.raises(ValueError, match="no rows below the line of headings"):
        prepare_custom(tmp_path / "my.csv", save)
    rows = recordings(tmp_path, split=lambda n: "train")
    with pytest.raises(ValueError, match="no usable row of the split dev"):
        prepare_custom(write_csv(tmp_path / "my.csv", rows), save)
    with pytest.raises(ValueError, match="2 rows are too few to be split"):
        prepare_custom(write_csv(tmp_path / "my.csv", recordings(tmp_path, 2)), save)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"three, one!"', "three, one!", "line 4: expected 2 fields; a text with commas needs quo"),
        (
            '"three, one!"',
            '"three, one!',
            "line .*: a text goes over several lines, in the column text; is a quotation",
        ),
    ],
)
def test_texts_that_a_comma_or_an_open_quotation_mark_would_cut_are_refused(
    tmp_path, save, old, new, message
):
    path = write_csv(tmp_path / "my.csv", recordings(tmp_path))
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        prepare_custom(path, save)


def test_an_open_quotation_mark_in_a_column_that_is_not_used_is_refused(tmp_path, save):
    rows = recordings(tmp_path, notes=lambda n: "fine")
    path = write_csv(tmp_path / "my.csv", rows)
    for line in (5, 20):
        lines = path.read_text().splitlines()
        lines[line] = lines[line].replace("fine", '"once more')
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match="in the column notes; is a quotation mark left open"):
            prepare_custom(path, save)


def test_a_tab_in_a_text_of_a_tsv_file_is_refused(tmp_path, save):
    rows = recordings(tmp_path)
    lines = ["wav\ttext", *(f"{row['wav']}\t{row['text']}" for row in rows)]
    lines[3] += "\tmore of it"
    (tmp_path / "my.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="line 4: expected 2 fields; is there a tab in a text"):
        prepare_custom(tmp_path / "my.tsv", save)


@pytest.mark.parametrize(("speakers", "train"), [(5, 18), (10, 24), (15, 22)])
def test_dev_and_test_take_about_a_tenth_each(tmp_path, save, speakers, train):
    rows = recordings(tmp_path, speaker=lambda n: f"speaker {n % speakers}")
    made = parts(prepare_custom(write_csv(tmp_path / "my.csv", rows), save)[0])
    assert len(made["train"]) == train and len(made["dev"]) == len(made["test"])


def test_a_speaker_of_a_few_clips_does_not_end_the_split_by_speakers(tmp_path, save):
    big = [f"speaker {n}" for n in range(6) for _ in range(5)]
    for small in ("a", "b", "c", "d", "e", "f", "g", "h"):  # some come first
        rows = recordings(tmp_path, 31, speaker=lambda n, small=small: [*big, small][n])
        prepare_custom(write_csv(tmp_path / "my.csv", rows), save)
        assert "parts by speaker" in (save / "report.txt").read_text()


def test_the_report_has_the_warnings_too(tmp_path, save):
    rows = recordings(tmp_path, split=lambda n: ["train", "dev", "test"][n % 3])
    rows[0]["wav"], rows[3]["text"] = "audio/gone.wav", "12 of 20"
    prepare_custom(write_csv(tmp_path / "my.csv", rows), save)
    report = (save / "report.txt").read_text()
    assert "no such file: 1 (line 2" in report and "train: 1 sentences with numbers" in report
    assert "utterances of" in report and "1 of 9 rows left out" in report
    assert not logging.getLogger("hff_modules").handlers, "nothing is collected any more"


def test_lines_are_counted_as_an_editor_does(tmp_path, save):
    path = write_csv(tmp_path / "my.csv", recordings(tmp_path))
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, "", second, *rest]) + "\n")
    made = parts(prepare_custom(path, save)[0])
    assert {row["ID"] for rows in made.values() for row in rows} >= {"00003-0", "00032-29"}


def test_a_table_of_common_voice_is_taken_as_it_is(tmp_path, save):
    rows = recordings(tmp_path / "clips")
    lines = ["client_id\tpath\tsentence_id\tsentence\taccents"]
    lines += [f"s{n}\t{row['wav']}\tx\t{row['text']}\t" for n, row in enumerate(rows)]
    (tmp_path / "validated.tsv").write_text("\n".join(lines) + "\n")
    made = parts(prepare_custom(tmp_path / "validated.tsv", save)[0])
    assert sum(map(len, made.values())) == 30
    row = made["train"][0]
    assert row["wav"].startswith("$data_root/clips/audio/") and row["spk_id"].startswith("s")


def test_speakers_in_two_given_parts_and_an_absent_test_part_are_said(tmp_path, save, caplog):
    rows = recordings(
        tmp_path, split=lambda n: "dev" if n % 5 == 0 else "train", speaker=lambda n: "me"
    )
    with caplog.at_level(logging.WARNING):
        manifests, _ = prepare_custom(write_csv(tmp_path / "my.csv", rows), save)
    assert manifests.keys() == {"train", "dev"}
    assert "1 speakers (me) are in train and in dev: scores there are of known" in caplog.text
    assert "no row of the split test: nothing is tested" in caplog.text


@pytest.mark.parametrize("spelt", ["Split", " split", "SPLIT"])
def test_headings_may_be_spelt_with_capitals_and_spaces(tmp_path, save, spelt):
    names = ["train", "dev", "test"]
    rows = recordings(tmp_path, **{spelt: lambda n: names[n % 3], "Speaker": lambda n: f"s{n}"})
    made = parts(prepare_custom(write_csv(tmp_path / "my.csv", rows), save)[0])
    assert {part: len(rows) for part, rows in made.items()} == dict.fromkeys(names, 10)
    assert made["dev"][0]["spk_id"] == "s1"


@pytest.mark.parametrize(("column", "key"), [("set", "split"), ("spk_id", "speaker")])
def test_a_heading_that_must_mean_a_split_or_speakers_is_refused(tmp_path, save, column, key):
    rows = recordings(tmp_path, **{column: lambda n: "train"})
    with pytest.raises(ValueError, match=f"no column {key}, but {column}; call it {key}"):
        prepare_custom(write_csv(tmp_path / "my.csv", rows), save)


def test_columns_that_are_not_used_are_named(tmp_path, save, caplog):
    rows = recordings(tmp_path, age=lambda n: "20")
    with caplog.at_level(logging.WARNING):
        prepare_custom(write_csv(tmp_path / "my.csv", rows), save)
    assert "columns that are not used: age" in caplog.text


def test_a_voice_with_two_clips_is_no_dev_set(tmp_path, save):
    # Whoever's hash comes first: the third voice alone is far below a tenth.
    for third in "CDEFGHIJ":
        rows = recordings(
            tmp_path, 40, speaker=lambda n, third=third: "A" if n < 34 else "B" if n < 39 else third
        )
        made = parts(prepare_custom(write_csv(tmp_path / "my.csv", rows), save / third)[0])
        assert min(len(of_part) for of_part in made.values()) >= 2


def test_a_table_with_tabs_a_bom_and_windows_line_ends_is_read(tmp_path, save):
    rows = recordings(tmp_path)
    lines = ["wav\ttext", *(f'{row["wav"]}\tsay "{row["text"]}"' for row in rows)]
    (tmp_path / "my.tsv").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    made = parts(prepare_custom(tmp_path / "my.tsv", save)[0])
    texts = {row["ID"]: row["wrd"] for rows in made.values() for row in rows}
    assert texts["00002-0"] == "say one one" and len(texts) == 30


def test_the_recipe_checks_alone_or_runs_to_its_results(tmp_path, encoder_folder, monkeypatch):
    train = corpora.load_train(RECIPE)
    monkeypatch.chdir(tmp_path)
    path = write_csv(tmp_path / "my.csv", recordings(tmp_path))
    options = ["--csv", str(path), "--head", "!name:hff_modules.heads.LinearHead"]
    argv = corpora.arguments(tmp_path / "run", encoder_folder, "weighted_sum", *options)
    assert train.main([*argv, "--check_only"]) is None
    assert (tmp_path / "run/checked/report.txt").is_file()
    assert not (tmp_path / "run/manifests").exists()
    assert not (tmp_path / "run/results.json").exists()
    train.main([*argv, "--few_shot", "--frozen_epochs", "0"])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["dataset"] == "custom" and {"cer", "wer"} <= results["test"]["test"].keys()


def test_other_rows_do_not_go_on_with_the_run_on_those_before(
    tmp_path, encoder_folder, monkeypatch
):
    train = corpora.load_train(RECIPE)
    monkeypatch.chdir(tmp_path)
    rows = recordings(tmp_path, split=lambda n: "train" if n % 3 else "dev")
    path = write_csv(tmp_path / "my.csv", rows)
    options = ["--csv", str(path), "--head", "!name:hff_modules.heads.LinearHead"]
    options += ["--lm", "char", "--lm_alpha", "[0.5]", "--lm_beta", "[0.0]"]
    argv = corpora.arguments(tmp_path / "run", encoder_folder, "weighted_sum", *options)
    train.main(argv)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["test"] == {} and results["lm"]["dev_utterances"] == 10, "no test part needed"
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in left if path.name != "log.txt"}
    with pytest.raises(ValueError, match="holds a run with keep_harakat False"):
        train.main([*argv, "--keep_harakat", "true"])
    assert before == {path: path.read_bytes() for path in before}, "nothing is touched"
    write_csv(path, rows[:-1])
    with pytest.raises(ValueError, match="on other data: train had 20 utterances, now it has 19"):
        train.main(argv)
    assert len(corpora.read_table(tmp_path / "run/manifests/train.csv")) == 20, "as it was trained"
    assert len(corpora.read_table(tmp_path / "run/manifests-now/train.csv")) == 19
    write_csv(path, [*rows[:-1], {**rows[-1], "text": "three ten"}])
    with pytest.raises(ValueError, match="now it has 20, not all the same .manifests-now"):
        train.main([*argv, "--test_only"])
    (tmp_path / "moved").mkdir()
    (tmp_path / "audio").rename(tmp_path / "moved/audio")
    argv[argv.index(str(path))] = str(write_csv(tmp_path / "moved/my.csv", rows))
    train.main(argv)  # the same rows elsewhere
