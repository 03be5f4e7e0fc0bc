"""Which layers are worth having: probes on every layer, and a set chosen by measured gain on dev.

``layers: auto`` chooses up to four layers; ``auto:3`` chooses three; ``auto:0.5GB`` and
``auto:90s`` as many as the stored states of train and dev, or the time to compute them once, allow;
limits can be joined, ``auto:4,0.5GB``. The search is greedy: to the layers that are chosen, every
other one is added in turn, all these probes go on from the same weights, and the one with the
lowest loss on dev stays; a probe that gets no layer, trained as long, tells what the layer alone
has gained. Probes see the pretrained encoder: adapters come later.
"""

import hashlib
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from hff_modules.cache import AudioDigests, StateCache, bytes_per_frame
from hff_modules.cli import default_device
from hff_modules.config import rebuilt
from hff_modules.data.loading import refuse_too_long
from hff_modules.data.speed import checked_speeds
from hff_modules.encoder import SSLEncoder
from hff_modules.files import read_json, write_atomically
from hff_modules.layers import parse_layers
from hff_modules.measure import versions
from hff_modules.probes import (
    ProbeBank,
    StoredSpeech,
    Task,
    WeightedSumProbe,
    linear_cka,
    score_probes,
    train_probes,
)

logger = get_logger(__name__)

CHOICE = "layers.json"
MOST = 4  # layers, where nothing else is asked for
LEAST_GAIN = 0.005  # share of the loss on dev, where a number is not asked for
CKA_FRAMES = 3000


@dataclass(frozen=True)
class Limits:
    """What ``auto`` may choose: a number of layers, or what fits."""

    number: int | None = None
    gigabytes: float | None = None
    seconds: float | None = None

    @property
    def most(self) -> int:
        """Upper limit of the number of layers."""
        if self.number is not None:
            return self.number
        return MOST if self.gigabytes is None and self.seconds is None else sys.maxsize


def parse_auto(spec: str) -> Limits:
    """Read ``auto``, ``auto:4``, ``auto:0.5GB``, ``auto:90s`` or several joined by commas.

    Raises
    ------
    ValueError
        Anything else.

    Example
    -------
    >>> parse_auto("auto:4,0.5GB")
    Limits(number=4, gigabytes=0.5, seconds=None)
    """
    limits: dict[str, float] = {}
    for part in filter(None, spec.removeprefix("auto").removeprefix(":").split(",")):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|s)?", part.strip())
        kind = {"GB": "gigabytes", "s": "seconds", None: "number"}[match[2]] if match else None
        whole = match and (kind != "number" or match[1].isdigit())
        if not whole or kind in limits or float(match[1]) <= 0:
            raise ValueError(
                f"layers={spec!r}: expected auto, auto:4 (layers), auto:0.5GB (stored states), "
                "auto:90s (to compute them), or several joined by commas"
            )
        limits[kind] = int(match[1]) if kind == "number" else float(match[1])
    return Limits(**limits)


class Analysis:
    """Probes on the states of one encoder, for one task, on a part of train and dev.

    Arguments
    ---------
    encoder : SSLEncoder
        All of it, nothing attached.
    task : CTCTask | LabelTask
    train, dev : Sequence[Mapping]
        Rows of manifests.
    settings : Mapping[str, Any]
        ``epochs``, ``train_minutes``, ``dev_minutes``, as ``probes`` in ``hparams/base``.
    cache : str | Path
        Folder of stored states.
    dtype : str
        Of the stored states.
    batch_seconds : float
        When they are computed.
    max_gigabytes : float, optional
        As for :class:`hff_modules.cache.StateCache`.
    speeds : Sequence[float]
        That the training part will be stored at.
    """

    def __init__(
        self,
        encoder: SSLEncoder,
        task: Task,
        train: Sequence[Mapping],
        dev: Sequence[Mapping],
        settings: Mapping[str, Any],
        cache: str | Path,
        dtype: str = "fp16",
        batch_seconds: float = 60.0,
        max_gigabytes: float | None = None,
        speeds: Sequence[float] = (),
    ):
        self.encoder, self.task, self.epochs = encoder, task, settings["epochs"]
        variants = sum(1 / speed for speed in speeds) or 1.0
        heard = variants * sum(r["duration"] for r in train) + sum(r["duration"] for r in dev)
        self.seconds = {"all of train and dev": heard}
        parts = {
            "train": some(train, settings["train_minutes"]),
            "dev": some(dev, settings["dev_minutes"]),
        }
        self.seconds |= {part: sum(r["duration"] for r in rows) for part, rows in parts.items()}
        store = StateCache(cache, encoder, dtype, max_gigabytes)
        self.layers = store.layers
        rows = [row for part in parts.values() for row in part]
        store.fill([r["wav"] for r in rows], [r["duration"] for r in rows], batch_seconds)
        self.train, self.dev = (
            StoredSpeech(part, store.read, task, device=encoder.device) for part in parts.values()
        )
        self.train.standardise()
        self.dev.standardise_like(self.train)
        self._singles: tuple[ProbeBank, list[dict]] | None = None

    def positions(self, layers: Sequence[int]) -> list[int]:
        """Where layers are among the stored states."""
        return [self.layers.index(layer) for layer in layers]

    def bank(self, sets: Sequence[Sequence[int]]) -> ProbeBank:
        """Probes on sets of layers."""
        places = [self.positions(layers) for layers in sets]
        bank = ProbeBank(places, self.encoder.hidden_size, self.task.outputs)
        return bank.to(self.train.device)

    def scores_of(self, sets: Sequence[Sequence[int]]) -> list[dict[str, float]]:
        """Train probes on sets of layers, from the start and alike; their scores on dev."""
        bank = self.bank(sets)
        train_probes([bank], self.train, self.epochs)
        return score_probes([bank], self.dev)

    def singles(self) -> tuple[ProbeBank, list[dict]]:
        """A probe on every layer, and its scores on dev."""
        if self._singles is None:
            bank = self.bank([[layer] for layer in self.layers])
            total = WeightedSumProbe(len(self.layers), self.encoder.hidden_size, self.task.outputs)
            logger.info(f"probing {len(self.layers)} layers, {self.epochs} epochs")
            train_probes([bank, total], self.train, self.epochs)
            *scores, of_sum = score_probes([bank, total], self.dev)
            self.weighted = {"weights": total.layer_weights(), **of_sum}
            self._singles = bank, scores
        return self._singles

    def report(self) -> dict[str, Any]:
        """Scores of every layer, similarities and learned weights, as JSON."""
        start = time.perf_counter()
        _, scores = self.singles()
        return {
            "task": self.task.name,
            "encoder": self.encoder.source + " (untrained)" * self.encoder.untrained,
            "layers": list(self.layers),
            "minutes": {part: round(s / 60, 2) for part, s in self.seconds.items()},
            "epochs": self.epochs,
            "probes": [{"layer": n, **s} for n, s in zip(self.layers, scores, strict=True)],
            "weighted_sum": self.weighted,
            "cka": linear_cka(self.dev.some_frames(CKA_FRAMES)[:, :CKA_FRAMES]),
            "seconds": round(time.perf_counter() - start, 1),
            "versions": versions(),
        }

    def choose(self, spec: str, dtype: str = "fp16") -> dict[str, Any]:
        """Choose layers; gives what was chosen and why, as JSON.

        Arguments
        ---------
        spec : str
            As for :func:`parse_auto`.
        dtype : str
            Of stored states, for a limit on disk.

        Raises
        ------
        ValueError
            Not even one layer is within the limits, or more are asked for than there are.
        """
        limits, start = parse_auto(spec), time.perf_counter()
        if limits.number is not None and limits.number > len(self.layers):
            raise ValueError(
                f"layers={spec!r}: this encoder has {len(self.layers)} states to choose from"
            )
        costs = self.costs(limits, dtype)
        bank, scores = self.singles()
        losses = {layer: s["loss"] for layer, s in zip(self.layers, scores, strict=True)}
        within = [layer for layer in self.layers if _fits([layer], costs, limits)]
        if not within:
            raise ValueError(f"layers={spec!r}: not even one layer is within that; {costs}")
        chosen = [min(within, key=losses.get)]
        row = self.layers.index(chosen[0])
        steps = [{"added": chosen[0], "loss": losses[chosen[0]], "losses": losses}]
        stopped = "as many as asked for"
        while len(chosen) < limits.most:
            others = [n for n in self.layers if n not in chosen]
            others = [n for n in others if _fits([*chosen, n], costs, limits)]
            if not others:
                stopped = "no other layer is within the limits"
                break
            sets = [chosen, *([*chosen, n] for n in others)]
            longer = self.bank(sets)
            longer.start_from(bank, row)
            logger.info(f"chosen so far: {chosen}; probing each with one of {others}")
            train_probes([longer], self.train, max(self.epochs // 2, 1))
            alone, *more = (s["loss"] for s in score_probes([longer], self.dev))
            losses = dict(zip(others, more, strict=True))
            best = min(others, key=losses.get)
            gain = alone - losses[best]
            step = {"added": best, "loss": losses[best], "without": alone, "gain": gain}
            if limits.number is None and gain < LEAST_GAIN * alone:
                stopped = f"layer {best} would gain {gain:.4f} of a loss of {alone:.4f} on dev"
                break
            steps.append({**step, "losses": losses})
            bank, row, chosen = longer, 1 + others.index(best), [*chosen, best]
        report = {"asked": spec, "chosen": sorted(chosen), "stopped": stopped, "steps": steps}
        report |= self.against_fixed(sorted(chosen))
        seconds = round(time.perf_counter() - start, 1)
        return {**report, "costs": costs, "epochs": self.epochs, "seconds": seconds}

    def against_fixed(self, chosen: list[int]) -> dict[str, Any]:
        """Compare a choice with every third layer, as many spread evenly, and the last ones."""
        count, top = len(chosen), self.layers[-1]
        sets = {"auto": chosen}
        if top >= 3:
            sets["every third layer"] = parse_layers("every:3", top)
        sets["as many, spread evenly"] = sorted(
            {round(top * (n + 1) / count) for n in range(count)}
        )
        sets["as many, the last ones"] = self.layers[-count:]
        scores = self.scores_of(list(sets.values()))
        compared = [
            {"name": name, "layers": layers, **score}
            for (name, layers), score in zip(sets.items(), scores, strict=True)
        ]
        better = [c["name"] for c in compared if c["loss"] > compared[0]["loss"]]
        not_better = [
            c["name"]
            for c in compared[1:]
            if c["loss"] <= compared[0]["loss"] and c["layers"] != chosen
        ]
        said = [f"on dev, probes on {chosen} are better than {', '.join(better) or 'none'}"]
        if not_better:
            said.append(f"not better than {', '.join(not_better)}")
        return {"compared": compared, "verdict": "; ".join(said)}

    def costs(self, limits: Limits, dtype: str) -> dict[str, float]:
        """GB of a stored layer; with a limit in time also seconds below and in each layer."""
        frames = self.seconds["all of train and dev"] * self.encoder.frame_rate
        size = bytes_per_frame(self.encoder.hidden_size, dtype)
        costs = {"gigabytes_per_layer": frames * size / 1e9}
        if limits.seconds is not None:
            every = self._seconds(self.encoder)
            bottom = SSLEncoder(
                self.encoder.source,
                layers=[0],
                precision=self.encoder.precision,
                pretrained=not self.encoder.untrained,
                revision=self.encoder.revision,
            )
            below = min(self._seconds(bottom.to(self.encoder.device)), every)
            costs["seconds_below"] = below
            costs["seconds_per_layer"] = (every - below) / max(self.encoder.num_layers, 1)
        return costs

    def _seconds(self, encoder: SSLEncoder) -> float:
        """How long an encoder takes for all of train and dev, from some seconds of noise."""
        length = 10
        noise = 0.1 * torch.randn(2, 16000 * length, device=self.encoder.device)
        encoder.eval()
        taken = []
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            float(encoder.encode(noise)[0].sum())  # waits for a GPU
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:]) / (2 * length) * self.seconds["all of train and dev"]


def _fits(layers: Sequence[int], costs: Mapping[str, float], limits: Limits) -> bool:
    if limits.gigabytes is not None:
        if len(layers) * costs["gigabytes_per_layer"] > limits.gigabytes:
            return False
    if limits.seconds is not None:
        spent = costs["seconds_below"] + max(layers) * costs["seconds_per_layer"]
        return spent <= limits.seconds
    return True


def some(rows: Sequence[Mapping], minutes: float) -> list[Mapping]:
    """So much of a data set, drawn evenly; always the same."""
    rows = sorted(rows, key=lambda row: row["wav"])
    random.Random(0).shuffle(rows)
    taken, total = [], 0.0
    for row in rows:
        if taken and total + row["duration"] > 60 * minutes:
            continue
        taken.append(row)
        total += row["duration"]
    return taken


def choose_layers(
    hparams: dict[str, Any], run_opts: Any, task: Task, train_set: Any, dev_set: Any = None
) -> dict[str, Any]:
    """Resolve ``layers: auto`` before the modules of a run are built.

    Arguments
    ---------
    hparams : dict[str, Any]
        From :func:`hff_modules.config.load_config`.
    run_opts : speechbrain.utils.run_opts.RunOptions
    task : CTCTask | LabelTask
    train_set, dev_set : DynamicItemDataset
        Without a ``dev_set``, every fifth training utterance serves as such.

    Returns
    -------
    dict[str, Any]
        The same where layers are given; else built anew with those that were chosen. With
        ``analysis``, the process ends here.
    """
    if "auto_layers" not in hparams and hparams["analysis"] is None:
        return hparams
    checked_speeds(hparams)  # before hours of probing
    refuse_too_long(hparams["ssl_encoder"], [s for s in (train_set, dev_set) if s is not None])
    train = [train_set.data[name] for name in train_set.data_ids]
    if dev_set is None:
        train, dev = [r for n, r in enumerate(train) if n % 5], train[::5]
    else:
        dev = [dev_set.data[name] for name in dev_set.data_ids]
    if hparams["analysis"] is not None:
        run_on_main(_write_analysis, args=[hparams, run_opts, task, train, dev])
        raise SystemExit(0)
    parse_auto(hparams["auto_layers"])
    path = Path(hparams["output_folder"]) / CHOICE
    run_on_main(_write_choice, args=[hparams, run_opts, task, train, dev, path])
    chosen = read_json(path)
    logger.info(f"layers: {hparams['auto_layers']}: {chosen['chosen']}; {chosen['verdict']}")
    hparams.pop("ssl_encoder")  # all of it; the caller holds on to these, and so to its memory
    return rebuilt(hparams, layers=chosen["chosen"]) | {"auto_layers": hparams["auto_layers"]}


def _analysis(hparams, run_opts, task, train, dev, cache) -> Analysis:
    device = run_opts.get("device") or default_device()
    settings = ("cache_dtype", "batch_seconds", "cache_gigabytes", "speed")
    encoder = hparams["ssl_encoder"].to(device)
    if len(encoder.layers) < encoder.num_layers + 1:
        raise ValueError(f"layers={encoder.layers}: an analysis looks at all; leave out --layers")
    options = [hparams[key] for key in settings]
    return Analysis(encoder, task, train, dev, hparams["probes"], cache, *options)


def _write_analysis(hparams, run_opts, task, train, dev) -> None:
    from hff_modules.analyze import write_report

    with tempfile.TemporaryDirectory() as temporary:
        cache = hparams["cache"] or temporary
        analysis = _analysis(hparams, run_opts, task, train, dev, cache)
        report = analysis.report()
        if "auto_layers" in hparams:
            report["auto"] = analysis.choose(hparams["auto_layers"], hparams["cache_dtype"])
    write_report(report, hparams["analysis"])


def _write_choice(hparams, run_opts, task, train, dev, path: Path) -> None:
    """Choose, unless this run has done so, or one with the same encoder, data and settings."""
    minutes = [hparams["probes"][f"{part}_minutes"] for part in ("train", "dev")]
    probed = [*some(train, minutes[0]), *some(dev, minutes[1])]
    digests = AudioDigests(Path(hparams["cache"] or os.devnull) / "audio.json")
    about = {
        "asked": hparams["auto_layers"],
        "encoder": hparams["ssl_encoder"].frozen_manifest(),
        "task": [task.name, task.content],
        "probes": dict(hparams["probes"]),
        "dtype": hparams["cache_dtype"],
        "speed": list(hparams["speed"]),
        # Where a recording lies is not what it is: data may be moved.
        "data": [{k: v for k, v in row.items() if k != "wav"} for row in [*train, *dev]],
        "audio": [digests.of(row["wav"]) for row in probed],
    }
    digest = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:16]
    if path.exists():
        then = read_json(path)
        if then.get("digest") != digest:
            raise ValueError(
                f"{path} is the choice ({then.get('asked')}) of a run with other data or settings; "
                "use another --output_folder"
            )
        return
    shared = Path(hparams["cache"]) / f"layers-{digest}.json" if hparams["cache"] else path
    if not shared.exists():
        with tempfile.TemporaryDirectory() as temporary:
            cache = hparams["cache"] or temporary
            analysis = _analysis(hparams, run_opts, task, train, dev, cache)
            choice = analysis.choose(hparams["auto_layers"], hparams["cache_dtype"])
        text = json.dumps({"digest": digest, **choice}, indent=1) + "\n"
        write_atomically(shared, text)
    if shared != path:
        write_atomically(path, shared.read_bytes())


__all__ = ["Analysis", "Limits", "choose_layers", "parse_auto"]
