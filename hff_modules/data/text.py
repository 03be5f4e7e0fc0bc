"""Text units for CTC: characters of any script, or SentencePiece units; index 0 is the blank."""

import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import jiwer
import sentencepiece

from hff_modules.files import read_json, write_atomically

BLANK = "<blank>"
SPACE = " "
UNITS_FILE = "units.json"
MODEL_FILE = "units.model"


def normalize(text: str) -> str:
    """Composed characters (NFC), and one space between words.

    Arguments
    ---------
    text : str
        Any text.

    Returns
    -------
    str

    Example
    -------
    >>> normalize("  E\u0301TE\u0301  ")
    'ÉTÉ'
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def error_rates(references: Iterable[str], hypotheses: Iterable[str]) -> dict[str, float]:
    """WER and CER in percent, both texts as :func:`normalize` writes them.

    Example
    -------
    >>> error_rates(["a  b"], ["a c"])
    {'wer': 50.0, 'cer': 33.33333333333333}
    """
    truth, found = (list(map(normalize, texts)) for texts in (references, hypotheses))
    return {"wer": 100 * jiwer.wer(truth, found), "cer": 100 * jiwer.cer(truth, found)}


class _Units:
    """What both kinds of units share: known characters, and a count of the unknown ones."""

    kind: str
    blank_index = 0

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = frozenset(characters)
        self.unknown: Counter[str] = Counter()

    def count_unknown(self, texts: Iterable[str]) -> Counter:
        """Characters of ``texts`` that are not among the units, with how often each occurs.

        Arguments
        ---------
        texts : iterable of str
            For example the transcripts of a test set.

        Returns
        -------
        Counter
            Empty when all are known. ``encode`` would leave these characters out.
        """
        counts = Counter()
        for text in texts:
            counts.update(c for c in normalize(text) if c != SPACE and c not in self.characters)
        return counts

    def describe_unknown(self, counts: Counter | None = None) -> str:
        """One line that names each unknown character; empty when there is none.

        Arguments
        ---------
        counts : Counter, optional
            From ``count_unknown``; default: those that ``encode`` met so far.

        Returns
        -------
        str
        """
        counts = self.unknown if counts is None else counts
        if not counts:
            return ""
        named = (
            f"{c!r} ({unicodedata.name(c, f'U+{ord(c):04X}')}): {n}"
            for c, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        )
        return f"{len(counts)} characters not among the units, left out: {', '.join(named)}"

    def _known(self, text: str) -> str:
        text = normalize(text)
        unknown = [c for c in text if c != SPACE and c not in self.characters]
        if unknown:
            self.unknown.update(unknown)
            text = " ".join("".join(c for c in text if c not in unknown).split())
        return text


class CharUnits(_Units):
    """Characters as units; the word boundary is the unit ``" "`` with index 1.

    Arguments
    ---------
    units : sequence of str
        All units in their order: the blank, the space, then the characters.

    Example
    -------
    >>> units = CharUnits.from_texts(["HELLO WORLD"])
    >>> units.size, units.vocab_list[:4]
    (9, ['<blank>', ' ', 'D', 'E'])
    >>> units.decode(units.encode("HELLO, WORLD"))
    'HELLO WORLD'
    >>> units.describe_unknown()
    "1 characters not among the units, left out: ',' (COMMA): 1"
    """

    kind = "char"

    def __init__(self, units: Sequence[str]) -> None:
        if list(units[:2]) != [BLANK, SPACE] or len(set(units)) != len(units):
            raise ValueError(
                f"units must be different and begin with {BLANK!r} and {SPACE!r}, got {list(units)}"
            )
        super().__init__(units[2:])
        self.vocab_list = list(units)
        self._index = {unit: index for index, unit in enumerate(units)}

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "CharUnits":
        """All characters that occur, in code point order.

        Arguments
        ---------
        texts : iterable of str
            Training transcripts.

        Returns
        -------
        CharUnits
        """
        characters = {c for text in texts for c in normalize(text)} - {SPACE}
        if not characters:
            raise ValueError("no characters to make units of: the training texts are empty")
        return cls([BLANK, SPACE, *sorted(characters)])

    @property
    def size(self) -> int:
        """Number of units, blank included: the output width of a CTC head."""
        return len(self.vocab_list)

    def encode(self, text: str) -> list[int]:
        """Indices of the characters; unknown ones are left out and counted in ``unknown``."""
        return [self._index[c] for c in self._known(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of indices (repeats are not merged: that is the decoder's work); blanks vanish."""
        kept = (self.vocab_list[int(i)] for i in ids if int(i) != self.blank_index)
        return " ".join("".join(kept).split())

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``units.json`` into ``folder``."""
        _write_json(folder, {"kind": self.kind, "units": self.vocab_list})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "CharUnits":
        """Read what ``save`` wrote."""
        return cls(_read_json(folder, (cls.kind,))["units"])


class SentencePieceUnits(_Units):
    """SentencePiece units (Kudo & Richardson, 2018); index 0 is the blank, index 1 is ``<unk>``.

    Training gives the same model for the same texts every time. Characters that did not occur in
    training are left out before encoding, so ``<unk>`` never becomes a target.

    Arguments
    ---------
    model : bytes
        A serialized SentencePiece model whose piece 0 is the blank.
    characters : iterable of str
        Characters of the training texts.
    kind : str
        "unigram" or "bpe".

    Example
    -------
    >>> units = SentencePieceUnits.from_texts(["THE CAT SAT", "THE MAT"] * 9, vocab_size=12)
    >>> units.size
    12
    >>> units.decode(units.encode("THE CAT"))
    'THE CAT'
    """

    def __init__(self, model: bytes, characters: Iterable[str], kind: str = "unigram") -> None:
        super().__init__(characters)
        self.kind = kind
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        if self._processor.id_to_piece(self.blank_index) != BLANK:
            raise ValueError(f"piece 0 of the SentencePiece model is not {BLANK!r}")

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], vocab_size: int, kind: str = "unigram"
    ) -> "SentencePieceUnits":
        """Train a SentencePiece model.

        Arguments
        ---------
        texts : iterable of str
            Training transcripts.
        vocab_size : int
            Number of units, blank and ``<unk>`` included.
        kind : str
            "unigram" or "bpe".

        Returns
        -------
        SentencePieceUnits
        """
        texts = [text for text in map(normalize, texts) if text]
        if not texts:
            raise ValueError("no text to train SentencePiece on: the training texts are empty")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type=kind,
                vocab_size=vocab_size,
                character_coverage=1.0,
                normalization_rule_name="identity",
                max_sentence_length=1 << 20,  # bytes; longer lines would be skipped silently
                num_threads=1,  # more threads may sum in another order
                pad_id=0,
                pad_piece=BLANK,
                unk_id=1,
                bos_id=-1,
                eos_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"vocab_size={vocab_size} does not suit these {len(texts)} texts: {error}"
            ) from error
        return cls(model.getvalue(), {c for text in texts for c in text} - {SPACE}, kind)

    @property
    def size(self) -> int:
        """Number of units, blank and ``<unk>`` included: the output width of a CTC head."""
        return self._processor.get_piece_size()

    @property
    def vocab_list(self) -> list[str]:
        """The pieces in their order, as SpeechBrain's CTC searchers take them."""
        return [self._processor.id_to_piece(i) for i in range(self.size)]

    def encode(self, text: str) -> list[int]:
        """Indices of the pieces; unknown characters are left out and counted in ``unknown``."""
        return self._processor.encode(self._known(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of indices (repeats are not merged); blanks and ``<unk>`` vanish."""
        pieces = (self._processor.id_to_piece(int(i)) for i in ids if int(i) > 1)
        return " ".join("".join(pieces).replace("\u2581", SPACE).split())

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``units.model`` and ``units.json`` into ``folder``."""
        write_atomically(Path(folder) / MODEL_FILE, self.model)
        _write_json(folder, {"kind": self.kind, "characters": sorted(self.characters)})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "SentencePieceUnits":
        """Read what ``save`` wrote."""
        saved = _read_json(folder, ("unigram", "bpe"))
        return cls((Path(folder) / MODEL_FILE).read_bytes(), saved["characters"], saved["kind"])


Units = CharUnits | SentencePieceUnits


def build_units(kind: str, texts: Iterable[str], vocab_size: int | None = None) -> Units:
    """Make units of training transcripts.

    Arguments
    ---------
    kind : str
        "char", "unigram" or "bpe".
    texts : iterable of str
        Training transcripts.
    vocab_size : int, optional
        Number of units for SentencePiece; characters need none.

    Returns
    -------
    CharUnits or SentencePieceUnits
    """
    if kind == "char":
        return CharUnits.from_texts(texts)
    if kind not in ("unigram", "bpe"):
        raise ValueError(f"units are {kind!r}; expected char, unigram or bpe")
    if vocab_size is None:
        raise ValueError(f"units of kind {kind!r} need a vocab_size")
    return SentencePieceUnits.from_texts(texts, vocab_size, kind)


def load_units(folder: str | os.PathLike) -> Units:
    """Load units of whatever kind ``save`` wrote into ``folder``.

    Arguments
    ---------
    folder : str or path
        Folder with ``units.json``.

    Returns
    -------
    CharUnits or SentencePieceUnits
    """
    kind = _read_json(folder, ("char", "unigram", "bpe"))["kind"]
    return (CharUnits if kind == "char" else SentencePieceUnits).load(folder)


def _read_json(folder: str | os.PathLike, kinds: Sequence[str]) -> dict:
    path = Path(folder) / UNITS_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file, so there are no units to load")
    saved = read_json(path)
    if saved.get("kind") not in kinds:
        raise ValueError(f"{path}: kind is {saved.get('kind')!r}, expected {' or '.join(kinds)}")
    return saved


def _write_json(folder: str | os.PathLike, content: dict) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    write_atomically(Path(folder) / UNITS_FILE, text)
