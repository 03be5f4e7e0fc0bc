"""Text rules, writing system by writing system."""

import logging
import unicodedata
from collections import Counter

import pytest

from hff_modules.data.writing import (
    NO_LETTERS,
    NUMBERS,
    OTHER_SCRIPT,
    Writing,
    clean_parts,
    clean_text_file,
    describe_units,
    script_of,
    writing_of,
)
from tests.corpora import write_table

LATIN, ARABIC, MALAYALAM = Writing(("LATIN",)), Writing(("ARABIC",)), Writing(("MALAYALAM",))


@pytest.mark.parametrize(
    ("sentence", "text"),
    [
        ("L’homme, dit-il : « Où ? »", "l'homme dit il où"),
        ("'Quoted' words, dogs' tails", "quoted words dogs tails"),
        ("E\u0301TE\u0301", "été"),
        ("Straße GROẞ", "straße groß"),
        ("col·legi · x", "col·legi x"),
        ("oui…non", "oui non"),
        ("so\u00adft\ufeff hy\u200dphen", "soft hyphen"),
        ("M`gr\u00b4s", "m'gr's"),
    ],
)
def test_latin_words_keep_their_apostrophes_and_lose_case_and_punctuation(sentence, text):
    assert LATIN.clean(sentence) == text


def test_case_follows_the_language_and_the_script():
    turkish = writing_of(["ISPARTA İZMİR"], "tr")
    assert turkish.clean("ISPARTA İzmir") == "ısparta izmir"
    assert writing_of(["ISPARTA"], "id").clean("ISPARTA") == "isparta"
    assert writing_of(["Σ"], "el").clean("ΌΛΟΣ Ο ΚΌΣΜΟΣ·") == "όλος ο κόσμος"
    assert writing_of(["Ж"], "ru").clean("Ёлка — да!") == "ёлка да"


def test_arabic_loses_tatweel_and_vowel_marks_unless_asked_but_no_letter():
    sentence = "الســَّلامُ عَلَيْكُمْ، أهلاً؟"
    assert ARABIC.clean(sentence) == "السلام عليكم أهلا"
    kept = Writing(("ARABIC",), keep_harakat=True).clean(sentence)
    assert "\u0640" not in kept and kept.count("\u064e") == 3 and "أ" in kept and "ا" in kept
    assert ARABIC.clean("می\u200cخواهم \u200c") == "می\u200cخواهم", "it parts the pieces of a word"


def test_the_vowel_marks_that_a_script_cannot_do_without_stay():
    thaana = "އެތަނަށް"
    assert Writing(("THAANA",)).clean(thaana + "،") == thaana
    thai = Writing(("THAI",))
    assert thai.clean("เมื่อไหร่ จะถึง?") == "เมื่อไหร่จะถึง"


def test_malayalam_chillus_have_one_form_and_joiners_stay_where_they_tell_forms_apart():
    old = "അവന\u0d4d\u200d പറഞ്ഞു"
    assert MALAYALAM.clean(old) == "അവൻ പറഞ്ഞു"
    assert MALAYALAM.clean("തമിഴ്\u200cനാട്") == "തമിഴ്\u200cനാട്"
    assert MALAYALAM.clean("മഴ്\u200c") == "മഴ്", "at the end of a word it only changes the looks"
    bengali = Writing(("BENGALI",))
    assert bengali.clean("র\u200d\u09cdযাব।") == "র\u200d\u09cdযাব"


def test_composed_and_decomposed_spellings_are_one_text():
    sentences = ["Việt Nam", "ഫോട്ടൊ", "ড়", "Ó"]
    for sentence in sentences:
        writing = writing_of([sentence])
        apart = unicodedata.normalize("NFD", sentence)
        assert writing.clean(apart) == writing.clean(sentence)


def test_scripts_without_spaces_lose_them_and_wide_letters_become_plain():
    chinese = writing_of(["我们去卡拉OK吧" * 3])
    assert chinese.scripts[:2] == ("HAN AND KANA", "LATIN") and not chinese.has_spaces
    assert chinese.clean("约翰·史密斯 ＯＫ！") == "约翰史密斯ok"
    assert writing_of(["ワインと、日本酒"]).scripts[0] == "HAN AND KANA"
    assert writing_of(["안녕 하세요"]).clean("안녕  하세요.") == "안녕 하세요"


def test_letters_typed_by_their_looks_are_the_letters_that_are_read():
    thai, lao = Writing(("THAI",)), Writing(("LAO",))
    assert thai.clean("น\u0e49\u0e4dา ท\u0e4dา") == thai.clean("น้ำทำ") == "น\u0e49\u0e33ท\u0e33"
    assert thai.clean("ท\u0e4d\u0e48า") == "ท\u0e48\u0e33"
    assert lao.clean("ນ\u0ec9\u0ecdາ") == "ນ\u0ec9\u0eb3"
    assert ARABIC.clean("\ufefb \ufeb3\ufefc\ufee1") == "لا سلام"
    assert ARABIC.clean("محمد ﷺ") == "محمد صلى الله عليه وسلم"
    assert LATIN.clean("ﬁn") == "fin"


def test_an_apostrophe_ends_words_where_it_is_spelled():
    sentences = ["Jista' jkun ta', jew ma' l-oħrajn, 'l hawn?"]
    assert (
        writing_of(sentences, "mt").clean(sentences[0]) == "jista' jkun ta' jew ma' l oħrajn l hawn"
    )
    assert writing_of(sentences, "it").clean("'Un po'' di") == "un po di"
    letters = "\u02bcYan \u02bc Tog\u02bc va, \u02bcbog\u02bc"  # as Hausa begins words
    assert writing_of(sentences, "ha").clean(letters) == "'yan tog' va 'bog'"
    quoted = "'Yan, 'ya'ya: 'sannu' da ƴa"  # sannu is quoted
    assert writing_of(sentences, "ha").clean(quoted) == "'yan 'ya'ya sannu da ƴa"
    assert writing_of(sentences, "fr").clean("'yan") == "yan"
    assert writing_of(sentences, "uz").clean("Tog\u2018 va \u2018bog'") == "tog' va bog'"


def test_words_that_begin_with_an_apostrophe_are_kept_where_they_are_words():
    for language, sentence, text in (
        ("af", "Dit is 'n mooi huis, 'n 'nuwe' een", "dit is 'n mooi huis 'n nuwe een"),
        ("nl", "'s Avonds in ’t 'stille' huis", "'s avonds in 't stille huis"),
        ("fy-NL", "Yn 'e stêd, oan 't wetter", "yn 'e stêd oan 't wetter"),
        ("de", "'s ist", "s ist"),
    ):
        assert writing_of([sentence], language).clean(sentence) == text


def test_uzbek_apostrophes_have_one_form_however_they_are_typed():
    sentence = "O\u02bbzbek o\u2018zbek o'zbek tog\u02bb tog\u2018"
    assert writing_of([sentence], "uz").clean(sentence) == "o'zbek o'zbek o'zbek tog' tog'"


def test_hebrew_acronyms_are_one_word_and_a_geresh_stays():
    hebrew = Writing(("HEBREW",))
    for typed in ("דו״ח", 'דו"ח', "דו”ח", "דו''ח"):
        assert hebrew.clean(f"{typed} של") == "דו״ח של"
    assert hebrew.clean("סנדוויץ׳ ו-ג'ירפה") == "סנדוויץ' ו ג'ירפה"
    assert hebrew.clean('אמר: "שלום"') == "אמר שלום"
    assert hebrew.clean('גר ב"תל אביב" היום') == "גר ב תל אביב היום"
    assert hebrew.clean('צה"ל אמר "שלום"') == "צה״ל אמר שלום"


def test_tibetan_syllables_are_parted_by_their_tsheg():
    tibetan = Writing(("TIBETAN",))
    assert not tibetan.has_spaces
    assert tibetan.clean("བཀྲ་ཤིས་བདེ་ལེགས། ང་། ") == "བཀྲ་ཤིས་བདེ་ལེགས་ང"


def test_a_dotted_capital_i_is_one_letter_in_every_language():
    assert LATIN.clean("İstanbul I") == LATIN.clean("I\u0307stanbul I") == "istanbul i"
    assert writing_of(["İ"], "tr").clean("İstanbul I") == "istanbul ı"


def test_a_text_for_a_language_model_keeps_the_marks_that_transcripts_keep(tmp_path):
    write_table(
        tmp_path / "train.csv",
        ["ID", "duration", "wav", "spk_id", "wrd"],
        [["a", "1.0", "a.wav", "", "كَتَبَ"]],
    )
    (tmp_path / "text.txt").write_text("كَتَبَ!\n")
    for keep, expected in ((True, "كَتَبَ\n"), (False, "كتب\n")):
        target = tmp_path / f"{keep}.txt"
        given = [tmp_path / "text.txt", target, [tmp_path / "train.csv"], "ar", keep]
        assert clean_text_file(*given) == target and target.read_text() == expected


def test_a_text_that_has_the_sentences_of_dev_and_test_is_said_or_cleared_of_them(tmp_path, caplog):
    (tmp_path / "text.txt").write_text("A cat.\nA dog!\nA bird\n")
    for part, words in (("train", "a cow"), ("dev", "a dog"), ("test", "a fish")):
        row = [part, "1.0", f"{part}.wav", "", words]
        write_table(tmp_path / f"{part}.csv", ["ID", "duration", "wav", "spk_id", "wrd"], [row])
    given = [tmp_path / "text.txt", tmp_path / "made.txt", [tmp_path / "train.csv"], "en"]
    others = [tmp_path / "dev.csv", tmp_path / "test.csv"]
    clean_text_file(*given, others=others)
    assert "1 of the 2 sentences of dev and test are in it" in caplog.text
    clean_text_file(*given, others=others, drop_shared_texts=True)
    assert (tmp_path / "made.txt").read_text() == "a cat\na bird\n"


@pytest.mark.parametrize(
    ("paragraph", "sentence"),
    [
        ("Hello. We saw a big dog! Bye", "we saw a big dog"),
        ("我们看见了一只很大的狗。再见", "我们看见了一只很大的狗"),
    ],
)
def test_sentences_of_test_are_found_inside_a_paragraph(tmp_path, caplog, paragraph, sentence):
    (tmp_path / "text.txt").write_text(f"{paragraph}\n{paragraph} 7\n{paragraph} 8\n")
    for part, words in (("train", sentence[:2]), ("test", sentence)):
        row = [part, "1.0", f"{part}.wav", "", words]
        write_table(tmp_path / f"{part}.csv", ["ID", "duration", "wav", "spk_id", "wrd"], [row])
    given = [tmp_path / "text.txt", tmp_path / "made.txt", [tmp_path / "train.csv"], "en"]
    clean_text_file(*given, others=[tmp_path / "test.csv"])
    assert "1 of the 1 sentences of dev and test are in it" in caplog.text
    assert "1 of 3 lines are used for the language model; others have numbers" in caplog.text
    clean_text_file(*given, others=[tmp_path / "test.csv"], drop_shared_texts=True)
    assert (tmp_path / "made.txt").read_text() == ""


def test_a_code_of_three_letters_has_the_rules_of_the_language():
    assert writing_of(["a"], "tur").clean("IŞIK") == writing_of(["a"], "tr").clean("IŞIK") == "ışık"
    assert writing_of(["a"], "mlt").clean("Ta'") == "ta'"


def test_signs_that_are_letters_can_be_told():
    tones = writing_of(["ku12", "ma 3"], letters="123!")
    assert tones.clean("Ku12, !xóõ!") == "ku12 !xóõ!" and tones.problem("ku12") is None
    assert tones.problem("ku14") == NUMBERS
    glottal = writing_of(["a"], letters="'")
    assert glottal.clean("’ōlelo ʻOkina b’aq‘ 'a") == "'ōlelo 'okina b'aq' 'a"
    assert writing_of(["a"], letters="ʻ").clean("’ōlelo") == "ʻōlelo"
    found = clean_parts({"train": {"a": "ku12", "b": "ku 45"}}, letters="12")
    assert found == {"train": {"a": "ku12"}}
    with pytest.raises(ValueError, match="letters: expected them in quotation marks.*got 12"):
        writing_of(["ku12"], letters=12)


def test_raised_letters_and_the_letter_colon_are_letters():
    writing = writing_of(["soaⁿ", "ma\ua789ba", "1 µ"])
    assert writing.scripts == ("LATIN", "MODIFIER")
    assert writing.problem("soaⁿ") is None and writing.clean("Ma\ua789ba \ua789") == "ma\ua789ba"


def test_what_is_left_out_is_counted():
    dropped = Counter()
    LATIN.clean("«Oui», dit-il…", dropped)
    assert dropped == {"«": 1, "»": 1, ",": 1, "-": 1, "…": 1}


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        ("a plain text", None),
        ("…!", NO_LETTERS),
        ("12", NO_LETTERS),
        ("12 monkeys", NUMBERS),
        ("५ apples", NUMBERS),
        ("5€", NO_LETTERS),
        ("rhythm & blues", NUMBERS),
        ("mаma", OTHER_SCRIPT),  # the first a is Cyrillic
    ],
)
def test_sentences_that_do_not_say_what_is_spoken_are_found(sentence, problem):
    assert LATIN.problem(LATIN.clean(sentence)) == problem


def test_the_number_zero_of_chinese_is_a_letter():
    chinese = Writing(("HAN AND KANA",))
    assert chinese.problem(chinese.clean("二〇二六年")) is None
    assert script_of("々") == script_of("ー") == "HAN AND KANA"


def test_odd_sentences_are_named_left_out_of_training_and_kept_in_test(caplog):
    sentences = {"a": "one two " * 30, "b": "3 four", "c": "?", "d": "five шесть"}
    with caplog.at_level(logging.INFO):
        texts = clean_parts({"train": sentences, "test": sentences}, "en")
    assert texts["train"].keys() == {"a"} and texts["test"].keys() == {"a", "b", "d"}
    assert (
        "en: train: 1 sentences with numbers or signs that are read out (b): left out"
        in caplog.text
    )
    assert "train: 1 sentences with letters of another script (d): left out" in caplog.text
    assert "test: 1 sentences with no letters (c): left out" in caplog.text
    assert "script (d): kept, characters unknown in training count as errors" in caplog.text
    assert "characters left out: ? U+003F QUESTION MARK 2" in caplog.text


def test_a_language_written_in_two_scripts_is_trained_on_in_both():
    texts = clean_parts({"train": {"a": "ljubav", "b": "љубав"}}, "sr")
    assert texts["train"] == {"a": "ljubav", "b": "љубав"}


def test_a_part_without_any_usable_sentence_is_refused():
    with pytest.raises(ValueError, match="xx: no letters in the training sentences"):
        clean_parts({"train": {"a": "12"}}, "xx")
    with pytest.raises(ValueError, match="xx: dev: none of 1 sentences can be used"):
        clean_parts({"train": {"a": "abc"}, "dev": {"b": "!"}}, "xx")


def test_units_to_look_at_are_named():
    described = describe_units(["aaaaaé", "bbbbb കാ"])
    assert described.startswith("5 characters to recognise: a b é ക; ")
    assert "é U+00E9 LATIN SMALL LETTER E WITH ACUTE 1" in described
    assert "U+0D3E MALAYALAM VOWEL SIGN AA 1" in described and "LETTER A 5" not in described
