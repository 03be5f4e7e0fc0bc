"""N-gram models against sums and formulas by hand, and SpeechBrain's beam search with them."""

import itertools
import math
import random

import pytest
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.decoders.ctc import CTCBeamSearcher

from hff_modules import ngram
from hff_modules.brains.ctc import some_of
from hff_modules.data import CharUnits, SentencePieceUnits
from hff_modules.ngram import (
    END,
    LOG10,
    START,
    UNKNOWN,
    CharScorer,
    Fused,
    WordScorer,
    load_arpa,
    model_for,
    tokens,
    train_ngram,
    write_arpa,
)

TEXTS = ["the cat sat", "the mat", "a cat", "the cat ate a hat"]


@pytest.mark.parametrize("kind", ["char", "word"])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_after_any_context_add_up_to_one(kind, order):
    lm = train_ngram([tokens(text, kind) for text in TEXTS], order)
    vocabulary = {token for text in TEXTS for token in tokens(text, kind)} | {END, UNKNOWN}
    contexts = [(), (START,), (START, *tokens("the", kind)), tokens("tac eh", kind)]
    for context in contexts:
        total = sum(10 ** lm.logprob(token, context[max(0, len(context) - order + 1) :])
                    for token in vocabulary)  # fmt: skip
        assert total == pytest.approx(1, abs=1e-9), context


def test_estimates_are_those_of_witten_and_bell():
    lm = train_ngram([("a", "b"), ("a", "c"), ("a", "b")], order=2)
    # Unigrams: a 3, b 2, c 1, </s> 3, of 9; four kinds, and a fifth of their share each for unknown
    of_b = (2 + 4 / 5) / (9 + 4)
    assert 10 ** lm.logprob("b", ()) == pytest.approx(of_b)
    assert 10 ** lm.logprob(UNKNOWN, ()) == pytest.approx(4 / 5 / 13)
    assert 10 ** lm.logprob("b", ("a",)) == pytest.approx((2 + 2 * of_b) / (3 + 2))
    of_a = (3 + 4 / 5) / 13
    assert 10 ** lm.logprob("a", ("a",)) == pytest.approx(2 / 5 * of_a), "by backing off"


def test_an_arpa_file_holds_the_same_model(tmp_path):
    lm = train_ngram([tokens(text, "char") for text in TEXTS], 3)
    write_arpa(lm, tmp_path / "lm.arpa")
    again = load_arpa(tmp_path / "lm.arpa")
    assert again.top_order == 3
    for context in [(), ("t",), (START, "t"), ("▁", "c"), ("x", "y")]:
        for token in ("t", "▁", END, "h"):
            assert again.logprob(token, context) == pytest.approx(
                lm.logprob(token, context), abs=1e-5
            )
    (tmp_path / "no.arpa").write_text("\\data\\\nnothing\n")
    with pytest.raises(ValueError, match="no.arpa: no ARPA file"):
        load_arpa(tmp_path / "no.arpa")


def test_a_character_model_scores_a_sentence_in_its_whole_context():
    lm = train_ngram([tokens(text, "char") for text in TEXTS], 4)
    scorer = CharScorer(lm, alpha=0.5, beta=0.25)
    padded = (START, *tokens("the hat", "char"), END)
    by_hand = sum(
        0.5 * LOG10 * lm.logprob(padded[i], padded[max(0, i - 3) : i])
        for i in range(1, len(padded))
    )
    assert scorer.score((), "the␣hat")[0] == pytest.approx(by_hand + 0.25 * 7)
    assert scorer.score_partial_token("the␣h") > scorer.score_partial_token("the␣x")


def test_a_word_model_scores_words_and_knows_how_words_begin():
    lm = train_ngram([tokens(text, "word") for text in TEXTS], 2)
    scorer = WordScorer(lm, alpha=1.0, beta=0.0)
    value, state = scorer.score(scorer.get_start_state(), "the")
    assert value == pytest.approx(LOG10 * lm.logprob("the", (START,))) and state == ("the",)
    assert scorer.score(state, "cat")[0] > scorer.score(state, "hat")[0] > -10
    assert scorer.score(state, "dog")[0] < -10
    assert scorer.score_partial_token("ca") == 0 > scorer.score_partial_token("cx")


def every_text_by_hand(log_probs, units, value):
    """The best text: log of the sum over all paths that collapse to it, plus ``value`` of it."""
    totals = {}
    for path in itertools.product(range(units.size), repeat=len(log_probs)):
        labels = [label for label, _ in itertools.groupby(path) if label != units.blank_index]
        text = "".join(units.vocab_list[label] for label in labels)
        score = sum(float(log_probs[frame, label]) for frame, label in enumerate(path))
        totals[text] = math.log(math.exp(totals.get(text, -math.inf)) + math.exp(score))
    return max(totals, key=lambda text: totals[text] + value(text))


def test_the_search_finds_the_text_that_is_best_by_both_of_all_texts():
    units = CharUnits.from_texts(["ab"])
    lm = train_ngram([tokens(text, "char") for text in ("ab ab", "ab", "ba b")], 3)
    differing = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        log_probs = (2 * torch.randn(5, units.size, generator=generator)).log_softmax(-1)
        search = Fused(lm, "char", units, alpha=1.0, beta=0.5, beam_size=300)
        search.searcher.token_prune_min_logp = search.searcher.beam_prune_logp = -1000.0

        def value(text):
            return CharScorer(lm, 1.0, 0.5).score((), text.replace(" ", "␣"))[0] if text else 0.0

        expected = every_text_by_hand(log_probs, units, value)
        assert search(log_probs[None], torch.ones(1)) == [" ".join(expected.split())]
        differing += expected != every_text_by_hand(log_probs, units, lambda text: 0.0)
    assert differing >= 3, "else the model decided nothing"


def test_without_weight_the_search_is_speechbrains_own():
    units = CharUnits.from_texts(TEXTS)
    generator = torch.Generator().manual_seed(3)
    log_probs = (3 * torch.randn(2, 20, units.size, generator=generator)).log_softmax(-1)
    lens = torch.tensor([1.0, 0.6])
    plain = CTCBeamSearcher(blank_index=0, vocab_list=units.vocab_list, beam_size=16)
    expected = [found[0].text for found in plain(log_probs, lens)]
    lm = train_ngram([tokens("the cat", "char")], 3)
    assert Fused(lm, "char", units, 0.0, 0.0, 16)(log_probs, lens) == expected
    words = train_ngram([tokens("the cat", "word")], 2)
    assert Fused(words, "word", units, 0.0, 0.0, 16)(log_probs, lens) == expected


@pytest.mark.parametrize("units", ["char", "unigram"])
def test_a_model_of_words_mends_a_word(units):
    random.seed(0)
    made = CharUnits.from_texts(TEXTS)
    if units == "unigram":
        made = SentencePieceUnits.from_texts(TEXTS * 5, vocab_size=14)
    ids = made.encode("the cat sat")
    log_probs = torch.full((2 * len(ids), made.size), math.log(0.002))
    log_probs[:, 0] = math.log(0.9)
    for place, unit in enumerate(ids):
        log_probs[2 * place, 0] = math.log(0.002)
        log_probs[2 * place, unit] = math.log(0.9)
    wrong = made.encode("the mat")[-1]
    log_probs[2 * len(ids) - 2] = math.log(0.002)
    log_probs[2 * len(ids) - 2, [ids[-1], wrong if wrong != ids[-1] else 2]] = torch.tensor(
        [0.44, 0.46]
    ).log()
    lm = train_ngram([tokens(text, "word") for text in TEXTS], 2)
    found = Fused(lm, "word", made, 1.0, 1.0)(log_probs[None], torch.ones(1))
    assert found == ["the cat sat"]


def test_models_that_cannot_serve_are_refused(tmp_path):
    units = CharUnits.from_texts(TEXTS)
    with pytest.raises(ValueError, match="lm: expected char or word, got 'syllable'"):
        model_for("syllable", 3, TEXTS, None, units)
    with pytest.raises(ValueError, match="order of an n-gram model: .* got 0"):
        model_for("char", 0, TEXTS, None, units)
    with pytest.raises(ValueError, match="needs text with spaces"):
        model_for("word", 3, ["漢字"], None, CharUnits.from_texts(["漢字"]))
    (tmp_path / "text.txt").write_text("THE CAT SAT ON THE MAT\n")
    with pytest.raises(ValueError, match="17 of its 17 characters are not among the units"):
        model_for("char", 3, TEXTS, tmp_path / "text.txt", units)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="there is no sentence"):
        model_for("char", 3, TEXTS, tmp_path / "empty.txt", units)
    pieces = SentencePieceUnits.from_texts(TEXTS * 5, vocab_size=14)
    with pytest.raises(ValueError, match="a model of characters needs units: char, not unigram"):
        Fused(train_ngram([("a",)], 2), "char", pieces, 1.0, 0.0)
    with pytest.raises(ValueError, match="a model of characters needs units: char, not unigram"):
        model_for("char", 3, TEXTS, None, pieces)  # before anything is trained


@pytest.mark.parametrize(
    "keep, said", [(3, "is all of it there"), (-9, "is all of it there"), (1, "is all of it")]
)
def test_a_model_file_that_breaks_off_is_named(tmp_path, keep, said):
    write_arpa(train_ngram([tokens(text, "char") for text in TEXTS], 3), tmp_path / "lm.arpa")
    lines = (tmp_path / "lm.arpa").read_text().splitlines()
    (tmp_path / "lm.arpa").write_text("\n".join(lines[:keep]))
    with pytest.raises(ValueError, match=f"lm.arpa: no ARPA file .*{said}"):
        load_arpa(tmp_path / "lm.arpa")
    (tmp_path / "lm.arpa").write_text("\\data\\\n\\end\\\n")
    with pytest.raises(ValueError, match="lm.arpa: no ARPA file"):
        load_arpa(tmp_path / "lm.arpa")


def test_long_texts_are_scored_after_memory_is_cleared(monkeypatch):
    lm = train_ngram([tokens(text, "char") for text in TEXTS], 3)
    text = "the cat " * 300
    expected = CharScorer(lm, 0.7, 0.3).score_partial_token(text)
    scorer = CharScorer(lm, 0.7, 0.3)
    by_steps = [scorer.score_partial_token(text[:end]) for end in range(1, len(text) + 1)]
    assert by_steps[-1] == pytest.approx(expected)
    monkeypatch.setattr(ngram, "MOST_KNOWN", 5)
    assert scorer.score_partial_token(text + "s") < expected
    assert scorer.score_partial_token(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("written", "kind", "message"),
    [
        ("word", "char", "lm: char, but .*lm.arpa is a model of words"),
        ("char", "word", "lm: word, but .*lm.arpa is a model of characters"),
        ("CHAR", "char", "lm_text .*lm.arpa: most of its text is of characters that are not among"),
    ],
)
def test_an_arpa_file_of_other_tokens_is_refused(tmp_path, written, kind, message):
    sentences = [tokens(text, written.lower()) for text in TEXTS]
    if written == "CHAR":
        sentences = [[token.upper() for token in sentence] for sentence in sentences]
    write_arpa(train_ngram(sentences, 2), tmp_path / "lm.arpa")
    with pytest.raises(ValueError, match=message):
        model_for(kind, 2, [], tmp_path / "lm.arpa", CharUnits.from_texts(TEXTS))


def test_rare_characters_of_an_arpa_file_may_be_unknown(tmp_path):
    sentences = [tokens(text, "char") for text in TEXTS * 20]
    sentences += [(chr(number),) for number in range(0x4E00, 0x4E80)]
    write_arpa(train_ngram(sentences, 2), tmp_path / "lm.arpa")
    assert model_for("char", 2, [], tmp_path / "lm.arpa", CharUnits.from_texts(TEXTS))


def test_weights_are_chosen_on_no_more_of_dev_than_allowed():
    durations = {f"u{n:02}": {"duration": str(6.0)} for n in range(30)}  # three minutes
    dataset = DynamicItemDataset(durations)
    assert some_of(dataset, 3).data_ids == sorted(durations)
    assert some_of(dataset, 1).data_ids == sorted(durations)[::3]


def test_the_command_line_writes_a_model_that_a_run_can_use(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    ngram.main([str(tmp_path / "text.txt"), str(tmp_path / "lm.arpa"), "--order", "3"])
    units = CharUnits.from_texts(TEXTS)
    lm = model_for("char", 9, [], tmp_path / "lm.arpa", units)
    assert lm.top_order == 3
    assert lm.logprob("h", ("▁", "t")) == pytest.approx(
        train_ngram([tokens(t, "char") for t in TEXTS], 3).logprob("h", ("▁", "t")), abs=1e-5
    )
