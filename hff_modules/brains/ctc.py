"""CTC speech recognition: loss, decoding, WER and CER; and the whole job from manifests to results.

CTC: Graves et al., ICML 2006.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset, FilteredSortedDynamicItemDataset
from speechbrain.decoders import ctc_greedy_decode
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger
from torch.utils.data import DataLoader

from hff_modules.auto_layers import choose_layers
from hff_modules.brains.base import SSLBrain
from hff_modules.brains.job import (
    asked_for,
    build_modules,
    evaluation_loader,
    keep,
    to_be_read,
    train_and_test,
)
from hff_modules.data.loading import (
    add_ctc_items,
    drop_unalignable,
    read_speech,
    transcripts,
)
from hff_modules.data.speed import vary_speed
from hff_modules.data.text import Units, build_units, error_rates
from hff_modules.files import write_atomically
from hff_modules.ngram import LM_FILE, Fused, model_for, write_arpa
from hff_modules.probes import CTCTask
from hff_modules.warm_start import STARTED_FROM, begun_with, check_unheard, start_from

logger = get_logger(__name__)


class CTCBrain(SSLBrain):
    """CTC on fused states.

    Arguments
    ---------
    units : CharUnits | SentencePieceUnits
        Output units; the blank has index 0.
    *args, **kwargs
        As for :class:`hff_modules.brains.base.SSLBrain`.
    """

    task = "asr"
    selectable = ("wer", "cer", "loss")

    def __init__(self, units: Units, *args, **kwargs):
        vocabulary = hashlib.sha256("\n".join(units.vocab_list).encode()).hexdigest()[:16]
        task = {"units": units.kind, "num_units": units.size, "vocabulary": vocabulary}
        super().__init__(*args, task=task, **kwargs)
        self.units = units
        self.searcher = None
        self.lm, self.dev_loader = None, None
        self.searches: dict[str, Fused] = {}  # by what scores of theirs end in
        self.about: dict[str, Any] = {}  # what results.json says besides

    def compute_forward(self, batch, stage):
        """Log probabilities (batch, frames, units) and valid frames (batch,)."""
        batch = batch.to(self.device)
        features, lengths = self.features(batch)
        logits = self.modules.head(features, lengths)
        return logits.float().log_softmax(-1), lengths

    def compute_objectives(self, predictions, batch, stage):
        """CTC loss per target unit; outside training also decode."""
        log_probs, lengths = predictions
        targets, target_lens = batch.targets
        target_lengths = (target_lens.nan_to_num() * targets.shape[1]).round().long()
        # Infinite for utterances too short for their targets; dropped from training, 0 on dev.
        losses = torch.nn.functional.ctc_loss(
            log_probs.transpose(0, 1),
            targets,
            lengths,
            target_lengths,
            blank=self.units.blank_index,
            reduction="none",
            zero_infinity=True,
        )
        count = int(target_lengths.sum())
        if stage != sb.Stage.TRAIN:
            self.loss_total += float(losses.sum())
            self.loss_count += count
            self.ids += batch.id
            self.references += batch.wrd
            self.hypotheses += self.decode(log_probs, lengths, stage)
            if stage == sb.Stage.TEST:
                relative = relative_lengths(lengths, log_probs)
                for name, search in self.searches.items():
                    self.searched[name] += search(log_probs, relative)
        return self.mean_loss(losses.sum(), count, stage)

    def decode(self, log_probs, lengths, stage) -> list[str]:
        """Texts: the best path, or SpeechBrain's prefix beam search on test if asked for."""
        relative = relative_lengths(lengths, log_probs)
        if stage == sb.Stage.TEST and self.hparams.decoding == "beam":
            if self.searcher is None:
                self.searcher = self.hparams.beam_searcher(
                    blank_index=self.units.blank_index, vocab_list=self.units.vocab_list
                )
            return [found[0].text for found in self.searcher(log_probs.cpu(), relative.cpu())]
        best = ctc_greedy_decode(log_probs, relative, blank_id=self.units.blank_index)
        return [self.units.decode(ids) for ids in best]

    def on_stage_start(self, stage, epoch=None) -> None:
        """Forget what was decoded before."""
        super().on_stage_start(stage, epoch)
        self.loss_total, self.loss_count = 0.0, 0
        self.ids, self.references, self.hypotheses = [], [], []
        self.searched: dict[str, list[str]] = {name: [] for name in self.searches}

    def scores(self, stage) -> dict[str, float]:
        """WER and CER in percent, loss per unit; on test also writes what was recognised.

        With a language model also ``wer_lm`` and ``cer_lm`` on test, and ``wer_beam`` and
        ``cer_beam`` of the same search without it.
        """
        hypotheses = [" ".join(text.split()) for text in self.hypotheses]
        scores = {"loss": self.loss_total / max(self.loss_count, 1)}
        scores |= error_rates(self.references, hypotheses)
        texts = {"ref": self.references, "hyp": hypotheses}
        if stage == sb.Stage.TEST:
            for search, said in self.searched.items():
                texts[search] = said
                rates = error_rates(self.references, said)
                scores |= {f"{name}_{search}": value for name, value in rates.items()}
        if stage == sb.Stage.TEST and if_main_process():
            lines, width = [], max(map(len, texts))
            for name, *said in sorted(zip(self.ids, *texts.values(), strict=True)):
                lines += [name, *(f"  {w:{width}} {t}" for w, t in zip(texts, said, strict=True))]
            text = "\n".join(lines) + "\n"
            write_atomically(Path(self.hparams.output_folder) / f"test-{self.test_set}.txt", text)
        return scores

    def test(self, test_sets: Mapping[str, DataLoader]) -> dict[str, dict[str, float]]:
        """Score the best checkpoint; before, choose a language model's weights on dev."""
        if self.lm is None or not self.hparams.testing:
            return super().test(test_sets)
        self.on_evaluate_start(min_key=self.hparams.select_by)
        self.searches = self.choose_weights(*self._outputs_on_dev())
        found = super().test(test_sets)
        if self.about["lm"]["alpha"] and if_main_process():  # what an export takes along
            write_arpa(self.lm, Path(self.hparams.output_folder) / LM_FILE)
        return found

    def _outputs_on_dev(self) -> tuple[list[torch.Tensor], list[str]]:
        """Log probabilities (frames, units) and references."""
        self.modules.eval()
        found = []
        with torch.no_grad(), self.evaluation_ctx:
            for batch in self.dev_loader:
                log_probs, lengths = self.compute_forward(batch, sb.Stage.VALID)
                outputs = zip(log_probs.cpu(), lengths.tolist(), strict=True)
                rows = [row[:count] for row, count in outputs]
                found += zip(batch.id, rows, batch.wrd, strict=True)
        found.sort(key=lambda one: one[0])
        return [row for _, row, _ in found], [text for _, _, text in found]

    def choose_weights(
        self, outputs: Sequence[torch.Tensor], references: Sequence[str]
    ) -> dict[str, Fused]:
        """The search without the model, and with the weights that make the fewest errors.

        The model has no weight where that is best. What it gains is seen beside the search without
        it: the search alone finds other texts than the best path, mostly better ones.
        """
        kind, name = self.hparams.lm, "wer" if self.hparams.select_by == "wer" else "cer"
        pairs = itertools.product(self.hparams.lm_alpha, self.hparams.lm_beta)
        beam_size = self.hparams.lm_beam

        def search_with(alpha: float, beta: float) -> Fused:  # anew each time: it fills up memory
            return Fused(self.lm, kind, self.units, alpha, beta, beam_size)

        found = []
        for alpha, beta in [(0.0, 0.0), *pairs]:
            search = search_with(alpha, beta)
            texts = [search(row[None], torch.ones(1))[0] for row in outputs]
            rates = error_rates(references, texts)
            logger.info(f"language model on dev, alpha {alpha:g}, beta {beta:g}: {rates}")
            found.append((rates, {"alpha": alpha, "beta": beta}))
        rates, weights = min(found, key=lambda one: one[0][name])  # the first of equal ones
        self.about["lm"] = {
            "kind": kind,
            "order": self.lm.top_order,
            "text": None if self.hparams.lm_text is None else str(self.hparams.lm_text),
            **weights,
            "beam": beam_size,
            "dev_utterances": len(references),
            "dev": rates,
            "dev_beam": found[0][0],
        }
        return {"beam": search_with(0.0, 0.0), "lm": search_with(**weights)}

    def results(self, test: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Everything that ``results.json`` holds."""
        return super().results(test) | self.about


def some_of(dataset: DynamicItemDataset, minutes: float) -> DynamicItemDataset:
    """Every second, third ... utterance in the order of their IDs: no more speech than allowed."""
    if minutes <= 0:
        raise ValueError(f"lm_minutes: expected more than 0, got {minutes}")
    seconds = sum(float(dataset.data[name]["duration"]) for name in dataset.data_ids)
    every = max(1, math.ceil(seconds / (60 * minutes)))
    return FilteredSortedDynamicItemDataset(dataset, sorted(dataset.data_ids)[::every])


def relative_lengths(lengths: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Shares (batch,) of the frames of (batch, frames, units), for SpeechBrain's searches.

    Some of them round and some cut off what they make of a share: a quarter of a frame more gives
    all of them the whole utterance.
    """
    return ((lengths.to(log_probs.device) + 0.25) / log_probs.shape[1]).clamp(max=1.0)


def train_ctc(
    hparams: dict[str, Any],
    run_opts: Any,
    data_root: str | Path,
    train: Iterable[str | Path],
    dev: Iterable[str | Path],
    test: Mapping[str, str | Path],
) -> dict[str, Any]:
    """Train and test a CTC recogniser on manifests; leaves checkpoints and ``results.json``.

    Arguments
    ---------
    hparams : dict[str, Any]
        From :func:`hff_modules.config.load_config`.
    run_opts : speechbrain.utils.run_opts.RunOptions
    data_root : str | Path
        What ``$data_root`` stands for in the manifests.
    train, dev : Iterable[str | Path]
        Manifests.
    test : Mapping[str, str | Path]
        Manifest of each test set, by name.

    Returns
    -------
    dict[str, Any]
        As in ``results.json``.
    """
    if hparams["decoding"] not in ("greedy", "beam"):
        raise ValueError(f"decoding: expected greedy or beam, got {hparams['decoding']!r}")
    if hparams["lm_text"] is not None and hparams["lm"] is None:
        raise ValueError("lm_text is given, but no lm: expected lm: char or lm: word beside it")
    if hparams["lm_text"] is not None and not Path(hparams["lm_text"]).is_file():
        raise FileNotFoundError(f"lm_text={hparams['lm_text']}: there is no such file")
    train_set, dev_set = read_speech(train, data_root), read_speech(dev, data_root)
    test_sets = {name: read_speech([csv], data_root) for name, csv in test.items()}
    units = build_units(hparams["units"], transcripts(train_set), hparams["vocab_size"])
    for name, dataset in {"dev": dev_set, **test_sets}.items():
        unknown = units.describe_unknown(units.count_unknown(transcripts(dataset)))
        if unknown:
            logger.warning(f"{name}: {unknown}; each counts as an error")

    lm = None
    if hparams["lm"] is not None:
        order, text = hparams["lm_order"], hparams["lm_text"]
        lm = model_for(hparams["lm"], order, transcripts(train_set), text, units)
    hparams = choose_layers(hparams, run_opts, CTCTask(units), train_set, dev_set)
    modules = build_modules(hparams, num_units=units.size)
    encoder = modules["encoder"]
    brain = CTCBrain(
        units,
        modules=modules,
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    files, begun_from = {}, begun_with(hparams)
    if begun_from is not None:
        brain.about["start_from"] = begun_from
    elif hparams["start_from"] is not None:
        check_unheard(hparams["start_from"], {"dev": dev_set, **test_sets})
        found = start_from(brain.trained, units, hparams["start_from"])
        brain.about["start_from"], files[STARTED_FROM] = found, json.dumps(found, indent=1) + "\n"
    keep(brain, hparams, {"train": train_set, "dev": dev_set}, **files)
    if if_main_process():
        units.save(Path(hparams["output_folder"]) / "units")
    test_sets = asked_for(test_sets, hparams)
    everything = [train_set, dev_set, *test_sets.values()]
    vary_speed(train_set, hparams)
    read = to_be_read(brain, train_set, dev_set, test_sets.values())
    read += [dev_set] if lm is not None and brain.test_only else []
    cache = brain.head_first.filled_cache(hparams, read, training=not brain.test_only)
    for dataset in everything:
        add_ctc_items(dataset, units, encoder.minimum_samples, cache)
    train_set = drop_unalignable(train_set, units, encoder.count_frames)
    if lm is not None:
        brain.lm = lm
        brain.dev_loader = evaluation_loader(some_of(dev_set, hparams["lm_minutes"]), hparams)
    return train_and_test(brain, hparams, train_set, dev_set, test_sets)
