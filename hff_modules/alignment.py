"""Words and their times out of CTC's frames: the best path, or a given text aligned to them.

CTC: Graves et al., ICML 2006. Forced alignment is torchaudio's.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchaudio

from hff_modules.data.text import SPACE, Units
from hff_modules.data.writing import WITHOUT_SPACES, script_of

WORD_START = "\u2581"  # of SentencePiece


@dataclass(frozen=True)
class Span:
    """A unit and the frames that it lasts, ``end`` excluded."""

    unit: int
    start: int
    end: int


@dataclass(frozen=True)
class Word:
    """A word and its frames, ``end`` excluded; ``joined``: it needs no space before."""

    text: str
    start: int
    end: int
    joined: bool = False


def written(units: Units) -> list[str]:
    """Give what each unit writes: nothing for the blank and for unknown pieces.

    Joined and split at spaces, these are what ``units.decode`` gives.
    """
    silent = 1 if units.kind == "char" else 2  # the blank; in SentencePiece also <unk>
    pieces = [piece.replace(WORD_START, SPACE) for piece in units.vocab_list]
    return [""] * silent + pieces[silent:]


def best_path(labels: Sequence[int], blank: int = 0) -> list[Span]:
    """Collapse the best unit of each frame: CTC's greedy decoding with times.

    Arguments
    ---------
    labels : Sequence[int]
        The best unit of each frame, (frames,).
    blank : int

    Returns
    -------
    list[Span]

    Example
    -------
    >>> [(span.unit, span.start, span.end) for span in best_path([0, 3, 3, 0, 3, 5])]
    [(3, 1, 3), (3, 4, 5), (5, 5, 6)]
    """
    spans, start = [], 0
    for frame in range(1, len(labels) + 1):
        if frame == len(labels) or labels[frame] != labels[start]:
            if labels[start] != blank:
                spans.append(Span(labels[start], start, frame))
            start = frame
    return spans


def aligned(log_probs: torch.Tensor, targets: Sequence[int], blank: int = 0) -> list[Span]:
    """Find the frames of units that are known to be there.

    Arguments
    ---------
    log_probs : torch.Tensor
        (frames, units).
    targets : Sequence[int]
        Units in their order, no blanks. CTC must be able to fit them into the frames.
    blank : int

    Returns
    -------
    list[Span]
        One for each target.
    """
    if not targets:
        return []
    path, _ = torchaudio.functional.forced_align(
        log_probs[None].float().contiguous(), torch.tensor([list(targets)]), blank=blank
    )
    return best_path(path[0].tolist(), blank)


def words(spans: Sequence[Span], texts: Sequence[str], by_letter: bool = False) -> list[Word]:
    """Join units to words at spaces; letters of scripts without spaces can be words of their own.

    Arguments
    ---------
    spans : Sequence[Span]
        Units in their order.
    texts : Sequence[str]
        What each unit writes, from :func:`written`.
    by_letter : bool
        Each letter of a script without spaces, with its marks, joins the word before.

    Returns
    -------
    list[Word]
    """
    found, letters, start, end, joined, alone = [], "", 0, 0, False, False
    spaced = False  # there was a space just before
    for span in spans:
        for letter in texts[span.unit]:
            mark = unicodedata.category(letter)[0] == "M" and letters
            before, alone = alone, by_letter and script_of(letter) in WITHOUT_SPACES
            if mark:
                alone = before
            elif letters and (letter.isspace() or before or alone):
                found.append(Word(letters, start, end, joined))
                letters = ""
            if letter.isspace():
                spaced, alone = True, False
                continue
            if not letters:
                joined, start, spaced = (before or alone) and not spaced, span.start, False
            letters, end = letters + letter, span.end
    return [*found, Word(letters, start, end, joined)] if letters else found
