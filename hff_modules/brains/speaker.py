"""Speaker verification: embeddings, cosine scores of trials, s-norm; from manifests to results.

Additive angular margin: Deng et al. (ArcFace), arXiv 1801.07698, as SpeechBrain has it. Adaptive
s-norm: Matejka et al., Interspeech 2017.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset, FilteredSortedDynamicItemDataset
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger
from torch import nn
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
from hff_modules.data.loading import add_label_items, add_signal, read_speech
from hff_modules.data.speed import vary_speed
from hff_modules.data.trials import Trial, read_trials
from hff_modules.files import write_atomically
from hff_modules.probes import LabelTask

logger = get_logger(__name__)

LOSSES = ("aam", "softmax")
PROBED = (40, 10)  # speakers that choose layers, utterances: of more, few would be heard twice
P_TARGET = 0.01  # share of trials of the same speaker that minDCF reckons with


class SpeakerBrain(SSLBrain):
    """Embeddings of fused states, trained to tell the training speakers apart.

    Arguments
    ---------
    speakers : Sequence[str]
        Training speakers in the order of their numbers.
    trials : Mapping[str, Sequence[Trial]]
        Of ``dev`` and of each test set, by name.
    *args, **kwargs
        As for :class:`hff_modules.brains.base.SSLBrain`; ``modules`` also has ``classifier``.
    """

    task = "speaker"
    selectable = ("eer", "min_dcf")

    def __init__(
        self, speakers: Sequence[str], trials: Mapping[str, Sequence[Trial]], *args, **kwargs
    ):
        digest = hashlib.sha256("\n".join(speakers).encode()).hexdigest()[:16]
        super().__init__(*args, task={"num_speakers": len(speakers), "speakers": digest}, **kwargs)
        self.trials = {name: list(of_set) for name, of_set in trials.items()}
        self.loss = speaker_loss(self.hparams.loss, self.hparams.margin, self.hparams.scale)
        self.cohort_loader: DataLoader | None = None
        self.cohort_speakers: Mapping[str, str] = {}
        self.cohort: torch.Tensor | None = None

    def compute_forward(self, batch, stage) -> torch.Tensor:
        """Embeddings (batch, embedding_size)."""
        features, lengths = self.features(batch.to(self.device))
        return self.modules.head(features, lengths).float()

    def compute_objectives(self, embeddings, batch, stage) -> torch.Tensor:
        """Loss over the training speakers; outside training embeddings are kept, the loss is 0."""
        if stage != sb.Stage.TRAIN:
            self.embeddings.update(zip(batch.id, embeddings.detach().cpu(), strict=True))
            return torch.zeros(())
        logits = self.modules.classifier(embeddings.unsqueeze(1))
        count = len(embeddings)
        return self.mean_loss(count * self.loss(logits, batch.targets.data), count, stage)

    def on_stage_start(self, stage, epoch=None) -> None:
        """Forget the embeddings of before."""
        super().on_stage_start(stage, epoch)
        self.embeddings: dict[str, torch.Tensor] = {}

    def on_evaluate_start(self, max_key=None, min_key=None) -> None:
        """Load the best checkpoint; the first time, find the embeddings of the cohort with it."""
        super().on_evaluate_start(max_key=max_key, min_key=min_key)
        if self.cohort is None and self.cohort_loader is not None:
            self.cohort = self._find_cohort()

    @torch.no_grad()
    def _find_cohort(self) -> torch.Tensor:
        self.modules.eval()
        of_speaker: dict[str, list[torch.Tensor]] = {}
        for batch in self.cohort_loader:
            with self.evaluation_ctx:  # eval_precision, as for the trials
                embeddings = self.compute_forward(batch, sb.Stage.TEST).cpu()
            for name, embedding in zip(batch.id, embeddings, strict=True):
                unit = nn.functional.normalize(embedding, dim=0)
                of_speaker.setdefault(self.cohort_speakers[name], []).append(unit)
        return torch.stack([torch.stack(found).mean(0) for _, found in sorted(of_speaker.items())])

    def scores(self, stage) -> dict[str, float]:
        """EER in percent and minDCF, normalised; on test also after s-norm, and all trials."""
        testing = stage == sb.Stage.TEST
        name = self.test_set if testing else "dev"
        trials = self.trials[name]
        names = sorted({n for trial in trials for n in trial[1:]})
        if self.debug:  # which hears a few batches, to see whether a run gets to its end
            nothing = torch.zeros_like(next(iter(self.embeddings.values())))
            self.embeddings = {name: self.embeddings.get(name, nothing) for name in names}
        rows = {n: row for row, n in enumerate(names)}
        embeddings = nn.functional.normalize(torch.stack([self.embeddings[n] for n in names]))
        first = torch.tensor([rows[trial.first] for trial in trials])
        second = torch.tensor([rows[trial.second] for trial in trials])
        cosines = (embeddings[first] * embeddings[second]).sum(-1)
        columns = {"": cosines}
        if testing and self.cohort is not None:
            to_cohort = embeddings @ nn.functional.normalize(self.cohort).T
            nearest = self.hparams.cohort_nearest
            columns["_s_norm"] = s_norm(cosines, to_cohort[first], to_cohort[second], nearest)
        same = torch.tensor([trial.same for trial in trials])
        scores = {}
        for suffix, values in columns.items():
            if not values.isfinite().all():  # which SpeechBrain's EER takes for a perfect answer
                if testing:
                    raise ValueError(
                        f"{name}: the best checkpoint gives scores that are no numbers"
                    )
                scores |= {f"eer{suffix}": math.nan, f"min_dcf{suffix}": math.nan}
                continue
            eer, cost = verification_errors(values[same], values[~same])
            scores |= {f"eer{suffix}": 100 * eer, f"min_dcf{suffix}": cost}
        if testing and if_main_process():
            table = zip(trials, *(values.tolist() for values in columns.values()), strict=True)
            lines = [
                " ".join([str(int(t.same)), t.first, t.second, *(f"{v:.5f}" for v in values)])
                for t, *values in table
            ]
            path = Path(self.hparams.output_folder) / f"test-{name}.txt"
            write_atomically(path, "\n".join(lines) + "\n")
        return scores


def verification_errors(same: torch.Tensor, others: torch.Tensor) -> tuple[float, float]:
    """EER, and minDCF as a share of what refusing everybody costs.

    The numbers of SpeechBrain's ``EER`` and ``minDCF``, whose time or memory grows with the square
    of the trials: 18 GB for VoxCeleb1's list.

    Arguments
    ---------
    same, others : torch.Tensor
        Scores of trials of one speaker, and of two.

    Example
    -------
    >>> verification_errors(torch.tensor([0.5, 0.7, 0.9]), torch.tensor([0.1, 0.2, 0.6]))
    (0.3333333432674408, 0.3333333432674408)
    """
    thresholds = torch.cat([same, others]).unique()  # sorted; what is above is accepted
    miss = torch.searchsorted(same.sort().values, thresholds, right=True) / len(same)
    false = 1 - torch.searchsorted(others.sort().values, thresholds, right=True) / len(others)
    at = (false - miss).abs().argmin()
    costs = P_TARGET * miss + (1 - P_TARGET) * false
    return float((false[at] + miss[at]) / 2), float(costs.min() / P_TARGET)


def speaker_loss(kind: str, margin: float, scale: float) -> LogSoftmaxWrapper:
    """SpeechBrain's loss over scores (batch, 1, speakers) and numbers (batch, 1): its mean.

    Arguments
    ---------
    kind : str
        "aam" (additive angular margin, scores are cosines) or "softmax".
    margin, scale : float
        Of the former.
    """
    if kind not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {kind!r}")
    if kind == "softmax":
        return LogSoftmaxWrapper(nn.Identity())
    return LogSoftmaxWrapper(AdditiveAngularMargin(margin=margin, scale=scale))


def speaker_classifier(kind: str, embedding_size: int, num_speakers: int) -> nn.Module:
    """SpeechBrain's layer behind the embeddings: cosines for "aam", a linear map for "softmax"."""
    if kind == "aam":
        return Classifier(embedding_size, out_neurons=num_speakers)
    return Linear(input_size=embedding_size, n_neurons=num_speakers)


def s_norm(
    scores: torch.Tensor, first: torch.Tensor, second: torch.Tensor, nearest: int
) -> torch.Tensor:
    """Adaptive symmetric normalisation: how far a score stands out from those with a cohort.

    Arguments
    ---------
    scores : torch.Tensor
        (trials,).
    first, second : torch.Tensor
        (trials, cohort), scores of both sides with the cohort.
    nearest : int
        How many of the highest of them count.

    Returns
    -------
    torch.Tensor
        (trials,).
    """
    normed = torch.zeros_like(scores)
    for side in (first, second):
        top = side.topk(min(nearest, side.shape[1]), dim=1).values
        normed += 0.5 * (scores - top.mean(1)) / top.std(1, correction=0).clamp(min=1e-6)
    return normed


def train_speaker(
    hparams: dict[str, Any],
    run_opts: Any,
    data_root: str | Path,
    manifests: Mapping[str, str | Path],
    trials: Mapping[str, str | Path],
) -> dict[str, Any]:
    """Train embeddings on manifests, score trials; leaves checkpoints and ``results.json``.

    Arguments
    ---------
    hparams : dict[str, Any]
        From :func:`hff_modules.config.load_config`.
    run_opts : speechbrain.utils.run_opts.RunOptions
    data_root : str | Path
        What ``$data_root`` stands for in the manifests.
    manifests : Mapping[str, str | Path]
        Of ``train``, ``dev`` and, under any other names, test sets.
    trials : Mapping[str, str | Path]
        List of trials (:mod:`hff_modules.data.trials`) of ``dev`` and of each test set.

    Returns
    -------
    dict[str, Any]
        As in ``results.json``.

    Raises
    ------
    ValueError
        Fewer than two speakers to train on, a speaker to train on in dev or test, or trials that
        name absent utterances.
    """
    if hparams["cohort_speakers"] and hparams["cohort_nearest"] < 1:
        raise ValueError(f"cohort_nearest: expected 1 at least, got {hparams['cohort_nearest']}")
    columns = ("ID", "duration", "wav", "spk_id")
    source = manifests["train"]
    everybody = read_speech([source], data_root, columns)
    train_set = drop_rare_speakers(everybody, hparams["min_utterances"], source)
    of_train = {name: train_set.data[name]["spk_id"] for name in train_set.data_ids}
    evaluated, lists = {}, {}
    for part in [name for name in manifests if name != "train"]:
        csv = manifests[part]
        dataset = read_speech([csv], data_root, columns)
        known = {dataset.data[name]["spk_id"] for name in dataset.data_ids} & {*of_train.values()}
        if known:
            raise ValueError(f"{csv}: {min(known)} is a speaker of {source}, too; expected others")
        lists[part] = read_trials(trials[part], set(dataset.data_ids), csv)
        evaluated[part] = dataset

    speakers = sorted(set(of_train.values()))
    loss = hparams["loss"]
    speaker_loss(loss, hparams["margin"], hparams["scale"])  # refuses an unknown one
    # Those of dev are other speakers; a layer is probed by how well it tells the known ones apart.
    probed = FilteredSortedDynamicItemDataset(train_set, choose_cohort(of_train, *PROBED))
    heard = sorted({of_train[name] for name in probed.data_ids})
    hparams = choose_layers(hparams, run_opts, LabelTask({"spk_id": heard}), probed)
    modules = build_modules(hparams)
    classifier = speaker_classifier(loss, modules["head"].embedding_size, len(speakers))
    brain = SpeakerBrain(
        speakers,
        lists,
        modules={**modules, "classifier": classifier},
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    keep(brain, hparams, {"train": train_set, "dev": evaluated["dev"]})
    encoder = modules["encoder"]
    vary_speed(train_set, hparams)
    dev_set = evaluated.pop("dev")
    test_sets = asked_for(evaluated, hparams)
    as_they_are = [dev_set, *test_sets.values()]
    if hparams["cohort_speakers"] > 1:
        chosen = choose_cohort(of_train, hparams["cohort_speakers"], hparams["cohort_utterances"])
        once_more = read_speech([source], data_root, columns)  # these keep their speed
        as_they_are.append(FilteredSortedDynamicItemDataset(once_more, chosen))
    read = to_be_read(brain, train_set, dev_set, as_they_are[1:])
    cache = brain.head_first.filled_cache(hparams, read, training=not brain.test_only)
    add_label_items(train_set, {"spk_id": speakers}, encoder.minimum_samples, cache)
    for dataset in as_they_are:
        add_signal(dataset, encoder.minimum_samples, cache)
    if hparams["cohort_speakers"] > 1:
        brain.cohort_loader = evaluation_loader(as_they_are[-1], hparams)
        brain.cohort_speakers = of_train
    return train_and_test(brain, hparams, train_set, dev_set, test_sets)


def drop_rare_speakers(
    dataset: DynamicItemDataset, minimum: int, source: str
) -> FilteredSortedDynamicItemDataset:
    """Leave out speakers of whom there are fewer utterances; says how many in a warning."""
    counts = Counter(dataset.data[name]["spk_id"] for name in dataset.data_ids)
    rare = sorted(speaker for speaker, count in counts.items() if count < minimum)
    if len(counts) - len(rare) < 2:
        raise ValueError(
            f"{source}: {len(counts) - len(rare)} speakers with {minimum} utterances or more; "
            "expected two or more to train on"
        )
    if rare:
        logger.warning(
            f"{source}: expected {minimum} utterances or more of each speaker; {len(rare)} of "
            f"{len(counts)} speakers have fewer and are left out: {', '.join(rare[:3])}"
            f"{', ...' if len(rare) > 3 else ''}"
        )
    kept = [n for n in dataset.data_ids if counts[dataset.data[n]["spk_id"]] >= minimum]
    return FilteredSortedDynamicItemDataset(dataset, kept)


def choose_cohort(speakers: Mapping[str, str], count: int, utterances: int) -> list[str]:
    """IDs of the first ``utterances`` of ``count`` speakers, spread evenly over all of them."""
    names = sorted(set(speakers.values()))
    kept = {names[n * len(names) // count] for n in range(count)} if count < len(names) else names
    taken, chosen = Counter(), []
    for name in sorted(speakers):
        speaker = speakers[name]
        if speaker in kept and taken[speaker] < utterances:
            taken[speaker] += 1
            chosen.append(name)
    return chosen
