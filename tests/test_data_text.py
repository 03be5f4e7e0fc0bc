"""Text units: round trips, unknown characters, files."""

import hashlib
import json
import pickle
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch
from speechbrain.decoders.ctc import CTCBeamSearcher

from hff_modules.data import text as text_module
from hff_modules.data.text import (
    CharUnits,
    SentencePieceUnits,
    build_units,
    error_rates,
    load_units,
    normalize,
)

TEXTS = [
    "THE OLD FERRY CROSSES THE RIVER",
    "SHE LEFT HER UMBRELLA ON THE SEAT",
    "THE CAT'S SHADOW FELL ON THE RIVER",
    "A THIN LAYER OF ICE COVERED THE POND",
    "THE CHILDREN BUILT A BRIDGE OVER THE STREAM",
    "NOBODY ANSWERED WHEN I KNOCKED AT THE DOOR",
    "RAIN FELL ON THE ROOF ALL NIGHT AND KEPT US AWAKE",
]
KINDS = [("char", None), ("unigram", 40), ("bpe", 40)]


@pytest.mark.parametrize(("kind", "vocab_size"), KINDS)
def test_training_texts_survive_encoding_and_decoding(kind, vocab_size):
    units = build_units(kind, TEXTS, vocab_size)
    for text in TEXTS:
        ids = units.encode(text)
        assert ids and all(0 < i < units.size for i in ids)  # never the blank
        assert units.decode(ids) == text
    assert units.unknown == Counter()
    assert units.describe_unknown() == ""


def test_character_units_are_blank_space_and_characters_in_code_point_order():
    units = CharUnits.from_texts(["BA C'A"])
    assert units.vocab_list == ["<blank>", " ", "'", "A", "B", "C"]
    assert units.encode("AB A") == [3, 4, 1, 3]
    assert units.decode([0, 3, 0, 4, 1, 1, 3]) == "AB A"
    assert units.decode(torch.tensor([5, 3])) == "CA"


@pytest.mark.parametrize(
    "text", ["നല്ല ദിവസം", "это мой дом", "这 是 我", "مرحبا بكم", "ÉTÉ À L'ŒUVRE", "ありがとう"]
)
@pytest.mark.parametrize(("kind", "vocab_size"), [("char", None), ("bpe", 30)])
def test_any_script_survives(text, kind, vocab_size):
    texts = [text] * 20 + (["abcdefghijklmnopq"] if kind == "bpe" else [])
    units = build_units(kind, texts, vocab_size)
    assert units.decode(units.encode(text)) == text


@pytest.mark.parametrize(("kind", "vocab_size"), KINDS)
def test_composed_and_decomposed_letters_are_the_same_unit(kind, vocab_size):
    units = build_units(kind, [*TEXTS, "\u00c9T\u00c9 CAF\u00c9"], vocab_size)
    assert units.encode("E\u0301TE\u0301") == units.encode("\u00c9T\u00c9")
    assert units.decode(units.encode("E\u0301TE\u0301")) == "\u00c9T\u00c9"
    assert units.unknown == Counter()


def test_references_are_scored_as_units_write_them():
    decomposed = unicodedata.normalize("NFD", "ÉTÉ  À LA MER")
    said = CharUnits.from_texts([decomposed])
    assert error_rates([decomposed], [said.decode(said.encode(decomposed))]) == {"wer": 0, "cer": 0}


def test_whitespace_of_any_kind_becomes_one_word_boundary():
    assert normalize("\tA\u00a0 B\u3000C\n") == "A B C"
    units = CharUnits.from_texts(["A B"])
    assert units.encode(" A \u00a0 B ") == units.encode("A B")


@pytest.mark.parametrize(("kind", "vocab_size"), KINDS)
def test_unknown_characters_are_left_out_counted_and_named(kind, vocab_size):
    units = build_units(kind, TEXTS, vocab_size)
    assert units.decode(units.encode("THE ÉÉ CAT\u00df €")) == "THE CAT"
    assert units.unknown == Counter({"É": 2, "ß": 1, "€": 1})
    assert units.describe_unknown() == (
        "3 characters not among the units, left out: 'É' (LATIN CAPITAL LETTER E WITH ACUTE): 2, "
        "'ß' (LATIN SMALL LETTER SHARP S): 1, '€' (EURO SIGN): 1"
    )
    assert units.encode("ÉÉ") == []


def test_unknown_characters_of_a_test_set_can_be_counted_beforehand():
    units = CharUnits.from_texts(TEXTS)
    counts = units.count_unknown(["THE PÂTÉ", "THE\x00 É"])
    assert counts == Counter({"É": 2, "P": 0, "Â": 1, "\x00": 1}) - Counter({"P": 0})
    assert "U+0000" in units.describe_unknown(counts)
    assert units.unknown == Counter()


@pytest.mark.parametrize(("kind", "vocab_size"), KINDS)
def test_saved_units_load_as_they_were(tmp_path, kind, vocab_size):
    units = build_units(kind, TEXTS, vocab_size)
    units.save(tmp_path / "new")
    loaded = load_units(tmp_path / "new")
    assert type(loaded) is type(units)
    assert (loaded.kind, loaded.size, loaded.vocab_list) == (kind, units.size, units.vocab_list)
    assert loaded.characters == units.characters
    assert [loaded.encode(text) for text in TEXTS] == [units.encode(text) for text in TEXTS]
    assert json.loads((tmp_path / "new" / "units.json").read_text())["kind"] == kind
    copied = pickle.loads(pickle.dumps(units))  # as DataLoader workers get it
    assert copied.encode(TEXTS[0]) == units.encode(TEXTS[0])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_training_gives_the_same_model_in_another_process(kind):
    here = SentencePieceUnits.from_texts(TEXTS, 40, kind)
    code = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1]); import text;"
        "units = text.SentencePieceUnits.from_texts(sys.argv[3:], 40, sys.argv[2]);"
        "print(hashlib.sha256(units.model).hexdigest())"
    )
    folder = str(Path(text_module.__file__).parent)  # the package as a whole is slow to import
    there = subprocess.run(
        [sys.executable, "-c", code, folder, kind, *TEXTS], capture_output=True, text=True
    )
    assert there.stdout.strip() == hashlib.sha256(here.model).hexdigest(), there.stderr


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_has_the_asked_size_with_blank_first(kind):
    units = SentencePieceUnits.from_texts(TEXTS, vocab_size=45, kind=kind)
    assert units.size == len(units.vocab_list) == 45
    assert units.vocab_list[:2] == ["<blank>", "<unk>"]
    assert units.decode([0, *units.encode("THE RIVER"), 0, 1]) == "THE RIVER"


def test_units_that_cannot_be_made_say_why(tmp_path):
    with pytest.raises(ValueError, match="training texts are empty"):
        build_units("char", ["", "  "])
    with pytest.raises(ValueError, match="training texts are empty"):
        build_units("unigram", [], vocab_size=30)
    with pytest.raises(ValueError, match="'word'; expected char, unigram or bpe"):
        build_units("word", TEXTS)
    with pytest.raises(ValueError, match="'bpe' need a vocab_size"):
        build_units("bpe", TEXTS)
    with pytest.raises(ValueError, match="vocab_size=5000 does not suit these 7 texts.*too high"):
        build_units("unigram", TEXTS, vocab_size=5000)
    with pytest.raises(ValueError, match=r"units\.json: no such file"):
        load_units(tmp_path)
    build_units("char", TEXTS).save(tmp_path)
    with pytest.raises(ValueError, match="kind is 'char', expected unigram or bpe"):
        SentencePieceUnits.load(tmp_path)


@pytest.mark.parametrize(("kind", "vocab_size"), KINDS)
def test_speechbrains_beam_searcher_takes_the_units_and_finds_the_text(kind, vocab_size):
    units = build_units(kind, TEXTS, vocab_size)
    ids = [0]
    for index in units.encode("THE RIVER"):
        ids += [index, 0]
    log_probs = torch.full((1, len(ids), units.size), -20.0)
    log_probs[0, torch.arange(len(ids)), ids] = 0.0
    searcher = CTCBeamSearcher(blank_index=units.blank_index, vocab_list=units.vocab_list)
    assert searcher(log_probs, torch.ones(1))[0][0].text == "THE RIVER"
