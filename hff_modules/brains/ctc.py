"""CTC speech recognition: loss, decoding, WER and CER; and the whole job from manifests to results.

CTC: Graves et al., ICML 2006.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jiwer
import speechbrain as sb
import torch
from speechbrain.decoders import ctc_greedy_decode
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from hff_modules.auto_layers import choose_layers
from hff_modules.brains.base import SSLBrain
from hff_modules.brains.job import build_modules, keep, train_and_test
from hff_modules.data.loading import (
    add_ctc_items,
    drop_unalignable,
    read_speech,
    transcripts,
)
from hff_modules.data.text import Units, build_units
from hff_modules.files import write_atomically
from hff_modules.probes import CTCTask

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

    def __init__(self, units: Units, *args, **kwargs):
        vocabulary = hashlib.sha256("\n".join(units.vocab_list).encode()).hexdigest()[:16]
        task = {"units": units.kind, "num_units": units.size, "vocabulary": vocabulary}
        super().__init__(*args, task=task, **kwargs)
        self.units = units
        self.searcher = None

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
        return self.mean_loss(losses.sum(), count, stage)

    def decode(self, log_probs, lengths, stage) -> list[str]:
        """Texts: the best path, or SpeechBrain's prefix beam search on test if asked for."""
        relative = lengths.to(log_probs.device) / log_probs.shape[1]
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

    def scores(self, stage) -> dict[str, float]:
        """WER and CER in percent, loss per unit; on test also writes what was recognised."""
        hypotheses = [" ".join(text.split()) for text in self.hypotheses]
        scores = {
            "loss": self.loss_total / max(self.loss_count, 1),
            "wer": 100 * jiwer.wer(self.references, hypotheses),
            "cer": 100 * jiwer.cer(self.references, hypotheses),
        }
        if stage == sb.Stage.TEST and if_main_process():
            lines = zip(self.ids, self.references, hypotheses, strict=True)
            text = "".join(
                f"{name}\n  ref {ref}\n  hyp {hyp}\n" for name, ref, hyp in sorted(lines)
            )
            write_atomically(Path(self.hparams.output_folder) / f"test-{self.test_set}.txt", text)
        return scores


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
    train_set, dev_set = read_speech(train, data_root), read_speech(dev, data_root)
    test_sets = {name: read_speech([csv], data_root) for name, csv in test.items()}
    units = build_units(hparams["units"], transcripts(train_set), hparams["vocab_size"])
    for name, dataset in {"dev": dev_set, **test_sets}.items():
        unknown = units.describe_unknown(units.count_unknown(transcripts(dataset)))
        if unknown:
            logger.warning(f"{name}: {unknown}; each counts as an error")

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
    keep(hparams)
    if if_main_process():
        units.save(Path(hparams["output_folder"]) / "units")
    everything = [train_set, dev_set, *test_sets.values()]
    cache = brain.head_first.filled_cache(hparams, everything)
    for dataset in everything:
        add_ctc_items(dataset, units, encoder.minimum_samples, cache)
    train_set = drop_unalignable(train_set, units, encoder.count_frames)
    return train_and_test(brain, hparams, train_set, dev_set, test_sets)
