"""Sentences as people write them -> text to recognise, by the rules of their writing system.

Unicode: composition (UAX 15), joiners in Indic and Arabic scripts (chapters 9, 12 and 23 of the
standard), chillu letters of Malayalam (12.9).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from speechbrain.utils.logger import get_logger

from hff_modules.data.manifest import read_rows
from hff_modules.files import read_text, write_atomically

logger = get_logger(__name__)

WITHOUT_SPACES = ("HAN AND KANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
MAIN_SHARE = 0.05  # of a language's letters: a script with fewer is no script of the language
# Codes of three letters for those of two, where a rule below is for the language
SHORT_CODES = {
    **{"tur": "tr", "aze": "az", "azj": "az", "azb": "az", "mlt": "mt", "uzb": "uz", "uzn": "uz"},
    **{"hau": "ha", "afr": "af", "nld": "nl", "dut": "nl", "fry": "fy"},
}
DOTLESS = ("tr", "az", "crh", "gag")  # languages whose lower case of I is a letter of its own
FINAL_APOSTROPHE = ("mt", "uz")  # languages in which it ends words, as a letter does: ta', tog'
# And begins them, before these letters: 'yan; or before a word of one of these letters: 'n, 's
INITIAL_APOSTROPHE = {"ha": "y", "af": r"n\b", "nl": r"[stnkm]\b", "fy": r"[tkesn]\b"}

LETTER_APOSTROPHES = "\u02bb\u02bc"  # to Unicode, letters: no quotation marks look so
GERESH, GERSHAYIM = "\u05f3", "\u05f4"  # of Hebrew; the second, in acronyms, is often typed as "
APOSTROPHES = f"'\u2019\u2018\u201b{LETTER_APOSTROPHES}\u00b4`\u2032{GERESH}"
# Not a quotation that follows a prefix, ב"תל אביב": that has its end, behind a letter, further on
QUOTED = '(?![^"\u201c\u201d]*[א-ת]["\u201c\u201d](?![א-ת]))'
TYPED_GERSHAYIM = re.compile(
    f"(?<=[א-ת])(?:[\"\u201c\u201d]{QUOTED}|\u05f4|['\u2019\u05f3]{{2}})(?=[א-ת])"
)
ZWNJ, ZWJ = "\u200c", "\u200d"
TATWEEL, TSHEG = "\u0640", "\u0f0b"
LETTER_COLON = "\ua789"  # ꞉, a letter's part though to Unicode a sign
INSIDE = "\u055b\u055c\u055e"  # Armenian writes its emphasis and question marks inside words
HARAKAT = re.compile("[\u064b-\u0652\u0670\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed]")
# A consonant, a virama and a joiner are the old way to write a chillu; NFC leaves them apart.
CHILLUS = {"ണ": "ൺ", "ന": "ൻ", "ര": "ർ", "ല": "ൽ", "ള": "ൾ", "ക": "ൿ"}
OLD_CHILLU = re.compile(f"([{''.join(CHILLUS)}])\u0d4d{ZWJ}")
# Thai and Lao am, typed as the two signs that it looks like, with or without a tone mark between
PARTED_AM = re.compile("\u0e4d([\u0e48-\u0e4b]?)\u0e32|\u0ecd([\u0ec8-\u0ecb]?)\u0eb2")
READ_OUT = frozenset("%&@#+=§°‰№")  # and numbers, and signs of money

_SCRIPTS = {
    name: "HAN AND KANA"
    for name in ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "BOPOMOFO")
}
# Letters of any script by their names: ⁿ of Southern Min, º and ª, µ
_SCRIPTS |= dict.fromkeys(("SUPERSCRIPT", "MASCULINE", "FEMININE", "MICRO"), "MODIFIER")
NO_LETTERS = "no letters"
NUMBERS = "numbers or signs that are read out"
OTHER_SCRIPT = "letters of another script"


def script_of(letter: str) -> str:
    """The script of a letter, by its name in Unicode.

    Example
    -------
    >>> [script_of(letter) for letter in "aжക漢カ"]
    ['LATIN', 'CYRILLIC', 'MALAYALAM', 'HAN AND KANA', 'HAN AND KANA']
    """
    name = unicodedata.name(letter, "UNNAMED").split()[0]
    return _SCRIPTS.get(name, name)


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] == "L" or character == "〇"  # which is a number


def _is_read_out(character: str) -> bool:
    kind = unicodedata.category(character)
    return character in READ_OUT or kind == "Sc" or (kind[0] == "N" and character != "〇")


@dataclass(frozen=True)
class Writing:
    """How a language is written; made by :func:`writing_of`.

    Arguments
    ---------
    scripts : tuple[str, ...]
        Its scripts, the one of most letters first.
    dotless : bool
        I and ı are one letter, İ and i another.
    final_apostrophe : bool
        Keep an apostrophe at the end of a word.
    initial_apostrophe : str
        Regular expression: before what an apostrophe is kept at the beginning of a word, too.
    keep_harakat : bool
        Keep the vowel marks of Arabic script.
    letters : str
        Signs that are letters in this language, such as digits for tones; an apostrophe stands for
        all forms in which it is typed.

    Example
    -------
    >>> Writing(("LATIN",)).clean("L’homme, dit-il : « Où ? »")
    "l'homme dit il où"
    >>> Writing(("HAN AND KANA",)).clean("ワインと、日本酒。")
    'ワインと日本酒'
    """

    scripts: tuple[str, ...]
    dotless: bool = False
    final_apostrophe: bool = False
    initial_apostrophe: str = ""
    keep_harakat: bool = False
    letters: str = ""

    @property
    def has_spaces(self) -> bool:
        """Whether words are set apart by spaces."""
        return self.scripts[0] not in WITHOUT_SPACES

    def clean(self, sentence: str, dropped: Counter | None = None) -> str:
        """Text of a sentence: composed, lower case, no punctuation.

        An apostrophe (in one form) or a middle dot stays between two letters of a script with
        spaces, an apostrophe in some languages at an end of a word, too, U+02BB and U+02BC, to
        Unicode letters, at both ends, and a Hebrew geresh at the end; hyphens, dashes and
        everything else that is no letter, mark or number become spaces. Tibetan has its tsheg, and
        nothing else, between syllables.
        Numbers and signs that are read out stay, see :meth:`problem`.

        Arguments
        ---------
        sentence : str
        dropped : Counter, optional
            Counts the characters that are left out.

        Returns
        -------
        str
        """
        dropped = Counter() if dropped is None else dropped
        text = unicodedata.normalize("NFC", "".join(map(_plain_form, sentence)))
        text = text.translate({ord("İ"): "i", **({ord("I"): "ı"} if self.dotless else {})}).lower()
        text = TYPED_GERSHAYIM.sub(GERSHAYIM, text)
        text = OLD_CHILLU.sub(lambda found: CHILLUS[found[1]], unicodedata.normalize("NFC", text))
        text = PARTED_AM.sub(_joined_am, text)
        if not self.keep_harakat:
            dropped.update(HARAKAT.findall(text))
            text = HARAKAT.sub("", text)
        kept = []
        for place, character in enumerate(text):
            before, after = text[max(place - 1, 0) : place], text[place + 1 : place + 3]
            written = self._written(character, before, after)
            if not written.strip() and not character.isspace():
                dropped[character] += 1
            kept.append(written)
        between = " " if self.has_spaces else TSHEG if self.scripts[0] == "TIBETAN" else ""
        return between.join("".join(kept).split())

    def _written(self, character: str, before: str, after: str) -> str:
        """What stands for a character before and after others: itself, a space or nothing."""
        kind = unicodedata.category(character)
        if character in self.letters:
            return character
        if character in APOSTROPHES and (own := set(self.letters) & set(APOSTROPHES)):
            return min(own)
        if character == GERSHAYIM:
            return character if _is_word(before) and _is_word(after) else " "
        if character in APOSTROPHES or character == "·":
            sign = "·" if character == "·" else "'"
            starts, ends = _is_word(after), _is_word(before)  # a word, or goes on with it
            letter, begins = character in LETTER_APOSTROPHES, self.initial_apostrophe
            may_end = letter or character == GERESH or (self.final_apostrophe and sign == "'")
            may_begin = letter or (begins and sign == "'" and re.match(begins, after))
            stays = (ends and (starts or may_end)) or (starts and may_begin)
            return sign if stays and self.has_spaces else " "
        stray = kind[0] == "M" and not _is_word(before) and before not in (ZWNJ, ZWJ)
        if character == LETTER_COLON:
            return character if _is_word(before) else " "
        if character == TATWEEL or character in INSIDE or stray:
            return ""
        if character in (ZWNJ, ZWJ):
            return character if self._joins(before, after[:1]) else ""
        if _is_letter(character) or kind[0] == "M" or _is_read_out(character):
            return character
        return "" if kind == "Cf" else " "

    def _joins(self, before: str, after: str) -> bool:
        # Elsewhere a joiner only changes how the same letters look. Beside a virama it says which
        # of several forms is meant; in Arabic script it parts the pieces of a word.
        if not before or not after or not _is_word(after):
            return False
        beside_virama = unicodedata.combining(before) == 9 or unicodedata.combining(after) == 9
        arabic = _is_letter(before) and script_of(before) == "ARABIC" == script_of(after)
        return beside_virama or arabic

    def problem(self, text: str) -> str | None:
        """What is wrong with a cleaned text as something to learn from; None if nothing is."""
        if not any(map(_is_letter, text)):
            return NO_LETTERS
        text = text.translate(dict.fromkeys(map(ord, self.letters)))
        if any(map(_is_read_out, text)):
            return NUMBERS
        letters = (letter for letter in text if _is_letter(letter))
        if any(script_of(letter) not in self.scripts for letter in letters):
            return OTHER_SCRIPT
        return None


def _is_word(characters: str) -> bool:
    """Whether it begins with a letter or a mark."""
    return bool(characters) and unicodedata.category(characters[0])[0] in "LM"


def _joined_am(found: re.Match) -> str:
    am = "\u0e33" if found[0][0] == "\u0e4d" else "\u0eb3"
    return (found[1] or found[2] or "") + am


def _plain_form(character: str) -> str:
    # How a letter is shown: ligatures, Arabic by its place in the word, full and half width
    shown = "\ufb00" <= character <= "\uffdc"
    return unicodedata.normalize("NFKC", character) if shown else character


def writing_of(
    sentences: Iterable[str], language: str = "", keep_harakat: bool = False, letters: str = ""
) -> Writing:
    """Find out how a language is written from its training sentences.

    Arguments
    ---------
    sentences : iterable of str
    language : str
        Its code; only for those that Unicode's rules of case, or apostrophes, do not fit.
    keep_harakat : bool
    letters : str
        See :class:`Writing`.

    Returns
    -------
    Writing

    Raises
    ------
    ValueError
        There is no letter in any sentence.
    """
    if not isinstance(letters, str):  # YAML's reading of 012
        raise ValueError(f"letters: expected them in quotation marks, '\"123\"', got {letters!r}")
    counts = Counter(script_of(c) for text in sentences for c in text if _is_letter(c))
    counts.pop("MODIFIER", None)  # letters such as ʻ, of any script
    if not counts:
        raise ValueError("no letters in the training sentences")
    most = sum(counts.values())
    scripts = tuple(name for name, count in counts.most_common() if count >= MAIN_SHARE * most)
    code = language.replace("_", "-").split("-")[0].lower()
    code = SHORT_CODES.get(code, code)
    return Writing(
        (*scripts, "MODIFIER"),
        dotless=code in DOTLESS,
        final_apostrophe=code in FINAL_APOSTROPHE,
        initial_apostrophe=INITIAL_APOSTROPHE.get(code, ""),
        keep_harakat=keep_harakat,
        letters=letters,
    )


def clean_parts(
    parts: Mapping[str, Mapping[str, str]],
    language: str = "",
    keep_harakat: bool = False,
    drop_shared_texts: bool = False,
    letters: str = "",
) -> dict[str, dict[str, str]]:
    """Clean the sentences of all parts, by rules found in the training part; logs what is lost.

    Sentences without letters are left out of every part. Those with numbers, signs that are read
    out or letters of another script are left out of ``train``: what is said for them is not
    written. Other parts keep them, and what the units lack there counts as errors.

    Arguments
    ---------
    parts : mapping of str to mapping of str to str
        Sentences by ID, of each part; "train" is one of them.
    language : str
        Its code, for messages and for rules of case.
    keep_harakat : bool
    drop_shared_texts : bool
        Leave texts that another part has, too, out of ``train``. They are counted in any case.
    letters : str
        See :class:`Writing`.

    Returns
    -------
    dict
        Texts by ID, of each part.
    """
    name = f"{language}: " if language else ""
    try:
        writing = writing_of(parts["train"].values(), language, keep_harakat, letters)
    except ValueError as error:
        raise ValueError(f"{name}{error}") from None
    scripts = ", ".join(script.title() for script in writing.scripts if script != "MODIFIER")
    logger.info(f"{name}written in {scripts}{'' if writing.has_spaces else ', without spaces'}")
    cleaned, dropped = {}, Counter()
    for part, sentences in parts.items():
        texts = {ID: writing.clean(sentence, dropped) for ID, sentence in sentences.items()}
        odd: dict[str, list[str]] = {}
        for ID, text in texts.items():
            problem = writing.problem(text)
            if problem:
                odd.setdefault(problem, []).append(ID)
        for problem, IDs in odd.items():
            fate = "kept, characters unknown in training count as errors"
            if part == "train" or problem == NO_LETTERS:
                fate = "left out"
                for ID in IDs:
                    del texts[ID]
            named = ", ".join(IDs[:3]) + (", ..." if len(IDs) > 3 else "")
            logger.warning(f"{name}{part}: {len(IDs)} sentences with {problem} ({named}): {fate}")
        if not texts:
            raise ValueError(f"{name}{part}: none of {len(sentences)} sentences can be used")
        cleaned[part] = texts
    if dropped:
        logger.info(f"{name}characters left out: {_counted(dropped)}")
    _judge_shared(cleaned, drop_shared_texts, name)
    return cleaned


def _judge_shared(parts: dict[str, dict[str, str]], drop: bool, name: str) -> None:
    """Count the texts of other parts that train has, too; take them from train where asked for."""
    train = parts["train"]
    known = set(train.values())
    for part, texts in parts.items():
        shared = sum(text in known for text in texts.values())
        if part != "train" and shared and not drop:
            logger.warning(
                f"{name}{part}: {shared} of {len(texts)} sentences are said in train, too: scores "
                "on them are of new voices, not of new sentences (see drop_shared_texts)"
            )
    if not drop:
        return
    others = {text for part, texts in parts.items() if part != "train" for text in texts.values()}
    parts["train"] = {ID: text for ID, text in train.items() if text not in others}
    left_out = len(train) - len(parts["train"])
    logger.info(f"{name}train: {left_out} of {len(train)} left out, said in another part, too")
    if not parts["train"]:
        raise ValueError(f"{name}train: all {len(train)} sentences are said in another part, too")


def clean_text_file(
    text: str | Path | None,
    target: str | Path,
    manifests: Iterable[str | Path],
    language: str,
    keep_harakat: bool = False,
    others: Iterable[str | Path] = (),
    drop_shared_texts: bool = False,
    letters: str = "",
) -> str | Path | None:
    """Clean a text for a language model, by rules found in the training transcripts.

    In a small language the sentences that were read often come from the very text at hand: a model
    of it knows the answers, and its weights are chosen on them.

    Arguments
    ---------
    text : str or path, optional
        Sentences in lines. None, and ARPA files, come back as they are.
    target : str or path
        File to write.
    manifests : iterable of str or path
        Of the training part.
    language : str
        Its code.
    keep_harakat : bool
        See :class:`Writing`.
    others : iterable of str or path
        Manifests of dev and test, whose sentences are counted.
    drop_shared_texts : bool
        Leave these out of the text.
    letters : str
        See :class:`Writing`.

    Returns
    -------
    str, path or None
        ``target``, if anything was cleaned.
    """
    if text is None or str(text).endswith(".arpa"):
        return text
    texts = [row["wrd"] for csv in manifests for row in read_rows(csv, "").values()]
    writing = writing_of(texts, str(language), keep_harakat, letters)
    cleaned = [writing.clean(line) for line in read_text(text).splitlines()]
    kept = [line for line in cleaned if writing.problem(line) is None]
    said = {row["wrd"] for csv in others for row in read_rows(csv, "").values()}
    said_in, shared, unheard = _finder(said, writing.has_spaces), set(), []
    for line in kept:
        found = said_in(line)
        shared |= found
        if not found:
            unheard.append(line)
    if drop_shared_texts:
        kept = unheard
    elif shared:
        logger.warning(
            f"{text}: {len(shared)} of the {len(said)} sentences of dev and test are in it: a "
            "language model of it knows these answers (see drop_shared_texts)"
        )
    few = 2 * len(kept) < len(cleaned)
    (logger.warning if few else logger.info)(
        f"{text}: {len(kept)} of {len(cleaned)} lines are used for the language model"
        + "; others have numbers, another script, or no letters: is each a sentence?" * few
    )
    write_atomically(target, "".join(f"{line}\n" for line in kept))
    return target


def _finder(sentences: set[str], has_spaces: bool) -> Callable[[str], set[str]]:
    """A function that gives the sentences that a line is, or, if they are long, has in it."""
    size = 3 if has_spaces else 10  # words, or characters
    long_ones: dict[tuple[str, ...], list[str]] = {}
    for sentence in sentences:
        pieces = tuple(sentence.split() if has_spaces else sentence)
        if len(pieces) >= size:
            long_ones.setdefault(pieces[:size], []).append(sentence)

    def said_in(line: str) -> set[str]:
        found = sentences & {line}
        pieces, between = tuple(line.split() if has_spaces else line), " " if has_spaces else ""
        for place in range(len(pieces) - size + 1):
            for sentence in long_ones.get(pieces[place : place + size], ()):
                rest = between.join(pieces[place:])
                if f"{rest}{between}".startswith(f"{sentence}{between}"):
                    found.add(sentence)
        return found

    return said_in


def describe_units(texts: Iterable[str], rare: int = 5) -> str:
    """The characters of training texts on one line, and those to look at by their names.

    Arguments
    ---------
    texts : iterable of str
    rare : int
        Characters that occur less often are named, and so are marks, joiners and punctuation.

    Returns
    -------
    str
    """
    counts = Counter(character for text in texts for character in text if character != " ")
    plain = (c for c in sorted(counts) if unicodedata.category(c)[0] not in "MC")
    strange = Counter({c: n for c, n in counts.items() if n < rare or not _is_letter(c)})
    named = f"; of these rare or no letters: {_counted(strange)}" if strange else ""
    return f"{len(counts)} characters to recognise: {' '.join(plain)}{named}"


def _counted(counts: Counter, limit: int = 40) -> str:
    pairs = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [
        f"{'' if unicodedata.category(c)[0] in 'MC' else c + ' '}U+{ord(c):04X} "
        f"{unicodedata.name(c, 'unnamed')} {n}"
        for c, n in pairs[:limit]
    ]
    more = f", and {len(pairs) - limit} more" if len(pairs) > limit else ""
    return ", ".join(shown) + more
