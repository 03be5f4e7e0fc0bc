"""N-gram language models of characters or words, and CTC beam search with them.

    python -m hff_modules.ngram text.txt lm.arpa --kind char --order 6

Interpolated Witten-Bell estimates (Witten & Bell, IEEE Trans. Inf. Theory, 1991), which need no
counts of counts and so suit seventy sentences as well as a book; written as ARPA. Search and lookup
are SpeechBrain's. kenlm, which SpeechBrain's search would load, has to be compiled.
"""

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from speechbrain.decoders.ctc import CTCBeamSearcher
from speechbrain.lm.arpa import read_arpa
from speechbrain.lm.ngram import BackoffNgramLM

from hff_modules.cli import run
from hff_modules.data.text import SPACE, Units, normalize
from hff_modules.files import open_atomically, read_text

KINDS = ("char", "word")
LM_FILE = "lm.arpa"  # in the folder of a run, and of an exported model
START, END, UNKNOWN = "<s>", "</s>", "<unk>"
SPACE_TOKEN = "\u2581"  # the space among characters, in ARPA files
NO_TEXT = (START, END, UNKNOWN, SPACE_TOKEN)
SPACE_UNIT = "\u2423"  # the space in the search's texts: to it, a sentence is one word
UNKNOWN_WORD = -10.0  # added to the log probability of a word that is not in the model
LOG10 = math.log(10)
MOST_KNOWN = 500_000  # beginnings of sentences whose scores are kept


def tokens(text: str, kind: str) -> tuple[str, ...]:
    """Characters (a space is ``▁``) or words of a text.

    Example
    -------
    >>> tokens("to do", "char"), tokens("to do", "word")
    (('t', 'o', '▁', 'd', 'o'), ('to', 'do'))
    """
    text = normalize(text)
    return tuple(text.replace(SPACE, SPACE_TOKEN)) if kind == "char" else tuple(text.split())


def train_ngram(sentences: Iterable[Sequence[str]], order: int) -> BackoffNgramLM:
    """Estimate a model.

    Arguments
    ---------
    sentences : iterable of sequence of str
        Tokens of each sentence.
    order : int
        Tokens that are looked at together, 1 or more.

    Returns
    -------
    speechbrain.lm.ngram.BackoffNgramLM
        Logarithms to the base 10, as in an ARPA file; unknown tokens have a probability, too.

    Raises
    ------
    ValueError
        There is no sentence, or the order is not positive.

    Example
    -------
    >>> lm = train_ngram([("a", "b"), ("a", "c")], order=2)
    >>> round(10 ** lm.logprob("a", ("<s>",)), 3), round(10 ** lm.logprob("c", ("a",)), 3)
    (0.76, 0.34)
    """
    if type(order) is not int or order < 1:
        raise ValueError(f"order of an n-gram model: expected a number above 0, got {order!r}")
    counts: dict[tuple[str, ...], Counter] = defaultdict(Counter)
    for sentence in sentences:
        padded = (START, *sentence, END)
        for place in range(1, len(padded)):
            for length in range(min(order, place + 1)):
                counts[padded[place - length : place]][padded[place]] += 1
    if not counts:
        raise ValueError("an n-gram model needs text: there is no sentence")
    probabilities: dict[tuple[str, ...], dict[str, float]] = {}
    ngrams: dict[int, dict] = {n: {} for n in range(1, order + 1)}
    backoffs: dict[int, dict] = {n: {} for n in range(1, order + 1)}
    for context in sorted(counts, key=len):
        seen = counts[context]
        total, kinds = seen.total(), len(seen)
        if context:
            shorter = probabilities[context[1:]]
            backoffs[len(context)][context] = math.log10(kinds / (total + kinds))
        else:
            shorter = dict.fromkeys([*seen, UNKNOWN], 1 / (kinds + 1))
            seen = seen | {UNKNOWN: 0}
        known = {
            token: (count + kinds * shorter[token]) / (total + kinds)
            for token, count in seen.items()
        }
        probabilities[context] = known
        ngrams[len(context) + 1][context] = {t: math.log10(p) for t, p in known.items()}
    return BackoffNgramLM(ngrams, backoffs)


def write_arpa(lm: BackoffNgramLM, path: str | Path) -> None:
    """Write a model as an ARPA file."""
    lines = {
        n: {
            (*context, token): value
            for context, seen in grams.items()
            for token, value in seen.items()
        }
        for n, grams in lm.ngrams.items()
    }
    lines[1].setdefault((START,), -99.0)  # never predicted, but a context
    with open_atomically(path) as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {n}={len(grams)}\n" for n, grams in lines.items())
        for n, grams in lines.items():
            file.write(f"\n\\{n}-grams:\n")
            for gram, value in grams.items():
                back = lm.backoffs.get(n, {}).get(gram)
                end = "" if back is None else f"\t{back:.6f}"
                file.write(f"{value:.6f}\t{' '.join(gram)}{end}\n")
        file.write("\n\\end\\\n")


def load_arpa(path: str | Path) -> BackoffNgramLM:
    """Read an ARPA file.

    Raises
    ------
    ValueError
        It is none; names it.
    """
    try:
        with open(path, encoding="utf-8") as file:
            if not any(line.strip() == "\\end\\" for line in file):  # it would be read for ever
                raise ValueError("there is no \\end\\: is all of it there?")
            file.seek(0)
            _, ngrams, backoffs = read_arpa(file)
    except (ValueError, LookupError, NameError) as error:  # NameError: a head without counts
        raise ValueError(f"{path}: no ARPA file ({error})") from None
    return BackoffNgramLM(ngrams, backoffs)


class CharScorer:
    """A model of characters, as SpeechBrain's CTC searches ask for one (its ``KenlmScorer``).

    A sentence is one word to the search, so that every character is scored in its full context.

    Arguments
    ---------
    lm : BackoffNgramLM
    alpha : float
        Weight of the logarithm of a probability.
    beta : float
        Added for each character.
    """

    def __init__(self, lm: BackoffNgramLM, alpha: float, beta: float):
        self.lm, self.alpha, self.beta, self.order = lm, alpha, beta, lm.top_order
        self._known = {"": (0.0, (START,)[: self.order - 1])}

    def get_start_state(self) -> tuple:
        """Nothing: a sentence is scored from its beginning."""
        return ()

    def score_partial_token(self, text: str) -> float:
        """Score of the beginning of a sentence."""
        return self._begun(text)[0]

    def score(self, state: Any, text: str, is_last_word: bool = False) -> tuple[float, tuple]:
        """Score of a whole sentence, its end included."""
        del state, is_last_word
        score, context = self._begun(text)
        return score + self.alpha * LOG10 * self.lm.logprob(END, context), ()

    def _begun(self, text: str) -> tuple[float, tuple]:
        if text not in self._known:
            if len(self._known) > MOST_KNOWN:
                self._known = {"": self._known[""]}
            known = next(n for n in range(len(text) - 1, -1, -1) if text[:n] in self._known)
            score, context = self._known[text[:known]]
            for end in range(known + 1, len(text) + 1):
                token = SPACE_TOKEN if text[end - 1] == SPACE_UNIT else text[end - 1]
                score += self.alpha * LOG10 * _log10(self.lm, token, context) + self.beta
                longer = (*context, token)
                context = longer[max(0, len(longer) - self.order + 1) :]
                self._known[text[:end]] = score, context
        return self._known[text]


class WordScorer:
    """A model of words, as SpeechBrain's CTC searches ask for one.

    Arguments
    ---------
    lm : BackoffNgramLM
    alpha : float
        Weight of the logarithm of a probability.
    beta : float
        Added for each word.
    """

    def __init__(self, lm: BackoffNgramLM, alpha: float, beta: float):
        self.lm, self.alpha, self.beta, self.order = lm, alpha, beta, lm.top_order
        self.words = lm.ngrams[1][()].keys()
        self.beginnings = {word[:end] for word in self.words for end in range(1, len(word) + 1)}

    def get_start_state(self) -> tuple:
        """The context of a first word."""
        return (START,)[: self.order - 1]

    def score_partial_token(self, part: str) -> float:
        """What a word that begins so loses already: nothing while it can become a known one."""
        return 0.0 if part in self.beginnings or self.alpha == 0 else UNKNOWN_WORD

    def score(self, state: tuple, word: str, is_last_word: bool = False) -> tuple[float, tuple]:
        """Score of a word after a context, and the context that follows."""
        del is_last_word
        value = self.alpha * LOG10 * _log10(self.lm, word, state) + self.beta
        if word not in self.words and self.alpha != 0:
            value += UNKNOWN_WORD
        longer = (*state, word)
        return value, longer[max(0, len(longer) - self.order + 1) :]


def _log10(lm: BackoffNgramLM, token: str, context: tuple) -> float:
    value = lm.logprob(token, context)
    if value > -math.inf:
        return value
    return max(lm.logprob(UNKNOWN, context), -7.0)  # an ARPA file of others may lack <unk>


class Fused:
    """Beam search over CTC's outputs and a language model.

    Arguments
    ---------
    lm : BackoffNgramLM
    kind : str
        "char" or "word".
    units : CharUnits | SentencePieceUnits
        The outputs; with a model of characters they must be characters.
    alpha, beta : float
        Weight of the model, and what is added for each character or word.
    beam_size : int

    Example
    -------
    >>> from hff_modules.data import CharUnits
    >>> units = CharUnits.from_texts(["ab", "aa"])
    >>> lm = train_ngram([tokens("ab ab", "char")] * 9, order=3)
    >>> log_probs = torch.tensor([[0.1, 0.0, 0.9, 0.0], [0.1, 0.0, 0.46, 0.44]]).log()
    >>> Fused(lm, "char", units, alpha=1.0, beta=0.0)(log_probs[None], torch.ones(1))
    ['ab']
    """

    def __init__(
        self,
        lm: BackoffNgramLM,
        kind: str,
        units: Units,
        alpha: float,
        beta: float,
        beam_size: int = 32,
    ):
        _check_kind(kind, units)
        vocabulary = list(units.vocab_list)
        if kind == "char":
            vocabulary = [SPACE_UNIT if unit == SPACE else unit for unit in vocabulary]
        self.kind = kind
        self.searcher = CTCBeamSearcher(
            blank_index=units.blank_index,
            vocab_list=vocabulary,
            space_token=vocabulary[units.blank_index] if kind == "char" else SPACE,
            beam_size=beam_size,
        )
        self.searcher.lm = (CharScorer if kind == "char" else WordScorer)(lm, alpha, beta)

    def __call__(self, log_probs: torch.Tensor, wav_lens: torch.Tensor) -> list[str]:
        """Texts for log probabilities (batch, frames, units) and relative lengths (batch,)."""
        found = self.searcher(log_probs.cpu(), wav_lens.cpu())
        return [" ".join(best[0].text.replace(SPACE_UNIT, SPACE).split()) for best in found]


def _check_kind(kind: str, units: Units) -> None:
    if kind not in KINDS:
        raise ValueError(f"lm: expected {' or '.join(KINDS)}, got {kind!r}")
    if kind == "char" and units.kind != "char":
        raise ValueError(f"lm: a model of characters needs units: char, not {units.kind}")


def model_for(
    kind: str, order: int, texts: Iterable[str], text_file: str | Path | None, units: Units
) -> BackoffNgramLM:
    """The language model that a run asks for.

    Arguments
    ---------
    kind : str
        "char" or "word".
    order : int
    texts : iterable of str
        Training transcripts, used without a ``text_file``.
    text_file : str | Path | None
        Sentences in lines, written like the transcripts; or an ARPA file.
    units : CharUnits | SentencePieceUnits

    Returns
    -------
    BackoffNgramLM

    Raises
    ------
    ValueError, FileNotFoundError
        No such kind, or not for such units; no such file, or a text of characters that the units
        do not have.
    """
    _check_kind(kind, units)
    if text_file is not None and str(text_file).endswith(".arpa"):
        lm = load_arpa(text_file)
        shares = {t: 10**p for t, p in lm.ngrams[1][()].items() if t not in NO_TEXT}
        of_words = sum(len(token) > 1 for token in shares) > len(shares) / 2
        if of_words != (kind == "word"):
            found = "words" if of_words else "characters"
            raise ValueError(f"lm: {kind}, but {text_file} is a model of {found}")
        strange = units.count_unknown(shares)
        unknown = sum(p * sum(c in strange for c in token) for token, p in shares.items())
        if unknown > sum(p * len(token) for token, p in shares.items()) / 2:
            raise ValueError(
                f"lm_text {text_file}: most of its text is of characters that are not among the "
                "units; expected it written like the transcripts. "
                f"{units.describe_unknown(strange)}"
            )
        return lm
    if text_file is not None:
        texts = read_text(text_file).splitlines()
    texts = [text for text in map(normalize, texts) if text]
    letters = sum(len(text.replace(SPACE, "")) for text in texts)
    unknown = units.count_unknown(texts)
    if unknown.total() > letters / 2:
        raise ValueError(
            f"lm_text {text_file}: {unknown.total()} of its {letters} characters are not among the "
            f"units; expected text written like the transcripts. {units.describe_unknown(unknown)}"
        )
    if kind == "word" and not any(SPACE in text for text in texts):
        raise ValueError("lm: a model of words needs text with spaces; expected lm: char")
    return train_ngram((tokens(text, kind) for text in texts), order)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m hff_modules.ngram", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("text", help="sentences in lines, written like the transcripts")
    parser.add_argument("arpa", help="file to write")
    parser.add_argument("--kind", choices=KINDS, default="char")
    parser.add_argument("--order", type=int, default=6)
    options = parser.parse_args(argv)
    lines = read_text(options.text).splitlines()
    lm = train_ngram((tokens(line, options.kind) for line in lines if line.strip()), options.order)
    write_arpa(lm, options.arpa)
    print(
        f"{options.arpa}: {sum(map(len, lm.ngrams[options.order].values()))} {options.order}-grams"
    )


if __name__ == "__main__":
    run(main)
