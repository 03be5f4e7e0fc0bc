"""Classes of utterances, one slot (emotion, keyword) or several (intent): manifests to results.

Every slot has a linear layer and a cross-entropy of its own; the losses add up (as in SUPERB,
arXiv 2105.01051).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.metric_stats import ClassificationStats

from hff_modules.auto_layers import choose_layers
from hff_modules.brains.base import SSLBrain
from hff_modules.brains.job import asked_for, build_modules, keep, to_be_read, train_and_test
from hff_modules.data.loading import (
    add_label_items,
    check_labels,
    find_labels,
    read_speech,
)
from hff_modules.data.speed import vary_speed
from hff_modules.files import write_atomically
from hff_modules.probes import LabelTask


class ClassificationBrain(SSLBrain):
    """Cross-entropy on fused and pooled states.

    Arguments
    ---------
    labels : Mapping[str, Sequence[str]]
        Classes of each slot in the order of their numbers.
    *args, **kwargs
        As for :class:`hff_modules.brains.base.SSLBrain`.
    """

    task = "classification"
    selectable = ("error", "unweighted_error", "loss")

    def __init__(self, labels: Mapping[str, Sequence[str]], *args, **kwargs):
        text = json.dumps(dict(labels), ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        sizes = {slot: len(names) for slot, names in labels.items()}
        super().__init__(*args, task={"slots": sizes, "labels": digest}, **kwargs)
        self.labels = {slot: list(names) for slot, names in labels.items()}

    def compute_forward(self, batch, stage) -> dict[str, torch.Tensor]:
        """Logits (batch, classes) by slot."""
        features, lengths = self.features(batch.to(self.device))
        return self.modules.head(features, lengths)

    def compute_objectives(self, predictions, batch, stage) -> torch.Tensor:
        """Cross-entropy per utterance, summed over the slots."""
        targets = batch.targets.data
        total = sum(
            torch.nn.functional.cross_entropy(logits.float(), targets[:, slot], reduction="sum")
            for slot, logits in enumerate(predictions.values())
        )
        if stage != sb.Stage.TRAIN:
            self.loss_total += float(total)
            self.ids += batch.id
            self.references += targets.tolist()
            best = [logits.argmax(-1) for logits in predictions.values()]
            self.hypotheses += torch.stack(best, dim=1).tolist()
        return self.mean_loss(total, len(targets), stage)

    def on_stage_start(self, stage, epoch=None) -> None:
        """Forget what was classified before."""
        super().on_stage_start(stage, epoch)
        self.loss_total = 0.0
        self.ids, self.references, self.hypotheses = [], [], []

    def scores(self, stage) -> dict[str, float]:
        """Loss; in percent error and accuracy of all slots together, and per slot if several.

        ``unweighted_accuracy`` is the mean recall of the classes, averaged over slots: every class
        counts alike however rare; ``unweighted_error`` is what it lacks. On test also writes what
        was found, ``test-<set>.json``.
        """
        stats = {slot: ClassificationStats() for slot in self.labels}
        for name, truth, found in zip(self.ids, self.references, self.hypotheses, strict=True):
            for (slot, names), t, f in zip(self.labels.items(), truth, found, strict=True):
                stats[slot].append([name], [names[f]], [names[t]])
        summaries = {slot: slot_stats.summarize() for slot, slot_stats in stats.items()}
        right = sum(t == f for t, f in zip(self.references, self.hypotheses, strict=True))
        accuracy = 100 * right / len(self.ids)
        recalls = [_mean_recall(summary["classwise_accuracy"]) for summary in summaries.values()]
        unweighted = 100 * sum(recalls) / len(recalls)
        scores = {
            "loss": self.loss_total / len(self.ids),
            "error": 100 - accuracy,
            "accuracy": accuracy,
            "unweighted_error": 100 - unweighted,
            "unweighted_accuracy": unweighted,
        }
        if len(summaries) > 1:
            for slot, summary in summaries.items():
                scores[f"accuracy {slot}"] = 100 * float(summary["accuracy"])
        if stage == sb.Stage.TEST and if_main_process():
            self._write_found()
        return scores

    def _write_found(self) -> None:
        def named(numbers: Sequence[int]) -> dict[str, str]:
            pairs = zip(self.labels.items(), numbers, strict=True)
            return {slot: names[number] for (slot, names), number in pairs}

        lines = zip(self.ids, self.references, self.hypotheses, strict=True)
        found = {n: {"expected": named(t), "found": named(f)} for n, t, f in sorted(lines)}
        path = Path(self.hparams.output_folder) / f"test-{self.test_set}.json"
        write_atomically(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def _mean_recall(recalls: Mapping[str, float]) -> float:
    return sum(map(float, recalls.values())) / len(recalls)


def train_classification(
    hparams: dict[str, Any],
    run_opts: Any,
    data_root: str | Path,
    manifests: Mapping[str, str | Path],
) -> dict[str, Any]:
    """Train and test a classifier on manifests; leaves checkpoints and ``results.json``.

    Arguments
    ---------
    hparams : dict[str, Any]
        From :func:`hff_modules.config.load_config`; ``slots`` are columns of the manifests.
    run_opts : speechbrain.utils.run_opts.RunOptions
    data_root : str | Path
        What ``$data_root`` stands for in the manifests.
    manifests : Mapping[str, str | Path]
        Of ``train``, ``dev`` and, under any other names, test sets.

    Returns
    -------
    dict[str, Any]
        As in ``results.json``.

    Raises
    ------
    ValueError
        A slot with a single class, or a class in dev or test that the training part lacks.
    """
    slots = hparams["slots"]
    columns = ("ID", "duration", "wav", *slots)
    datasets = {name: read_speech([csv], data_root, columns) for name, csv in manifests.items()}
    labels = find_labels(datasets["train"], slots, manifests["train"])
    for name, dataset in datasets.items():
        check_labels(dataset, labels, manifests[name])

    task = LabelTask(labels)
    hparams = choose_layers(hparams, run_opts, task, datasets["train"], datasets["dev"])
    modules = build_modules(hparams, slots={slot: len(names) for slot, names in labels.items()})
    brain = ClassificationBrain(
        labels,
        modules=modules,
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    text = json.dumps(labels, indent=1, ensure_ascii=False) + "\n"
    chosen_by = {part: datasets[part] for part in ("train", "dev")}
    keep(brain, hparams, chosen_by, **{"labels.json": text})
    train_set, dev_set = datasets.pop("train"), datasets.pop("dev")
    test_sets = asked_for(datasets, hparams)
    everything = [train_set, dev_set, *test_sets.values()]
    vary_speed(train_set, hparams)
    read = to_be_read(brain, train_set, dev_set, test_sets.values())
    cache = brain.head_first.filled_cache(hparams, read, training=not brain.test_only)
    for dataset in everything:
        add_label_items(dataset, labels, modules["encoder"].minimum_samples, cache)
    return train_and_test(brain, hparams, train_set, dev_set, test_sets)
