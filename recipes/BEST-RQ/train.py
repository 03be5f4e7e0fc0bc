#!/usr/bin/env python3
"""Pretrains a small Conformer (shape of w2v-BERT 2.0) on unlabelled speech: masked prediction.

> python train.py hparams/best_rq.yaml --sources "[/data/speech, /data/cv/train.tsv]"
> torchrun --nproc_per_node=2 train.py hparams/clusters.yaml --sources … --distributed_backend=gloo

The objective is BEST-RQ's (Chiu et al., arXiv 2202.01855), or HuBERT's clusters (arXiv 2106.07447).
"""

import json
import logging
import math
import os
import random
from contextlib import nullcontext
from pathlib import Path

import speechbrain as sb
import torch
from masked_speech import (
    Pretrainer,
    Progress,
    SpeechSegments,
    make_codes,
    sampler,
    views_and_layers,
)
from speech_prepare import as_list, prepare_speech
from speechbrain.utils.distributed import (
    if_main_process,
    infer_device,
    main_process_only,
    run_on_main,
)

from hff_modules.cli import run
from hff_modules.config import load_config
from hff_modules.files import locked, write_atomically

RECIPE = Path(__file__).resolve().parent
logger = logging.getLogger("pretrain")


class Pretraining(sb.Brain):
    """Masked prediction within a budget of time; learning rates follow the share that is spent."""

    def compute_forward(self, batch, stage):
        """(batch, frames, codebooks, codes) scores of the codes."""
        features, valid, mask, _ = (part.to(self.device) for part in batch)
        return self.modules.pretrainer(features, valid, mask)

    def compute_objectives(self, scores, batch, stage):
        """Cross-entropy at masked frames, and at the others times `unmasked_weight`."""
        _, valid, mask, codes = (part.to(self.device) for part in batch)
        seen = valid & ~mask

        def loss_at(frames):
            return torch.nn.functional.cross_entropy(
                scores[frames].float().flatten(0, 1), codes[frames].flatten()
            )

        masked = loss_at(mask)
        guess = scores[mask].argmax(-1)
        hits = (guess == codes[mask]).float().mean()
        self.sums += torch.tensor([masked.item(), hits.item(), 1.0]) * mask.sum().item()
        if stage != sb.Stage.TRAIN:
            for book, found in enumerate(guess.T):
                self.guessed[book].update(found.unique().tolist())
        self.frames += int(valid.sum()) * (stage == sb.Stage.TRAIN)
        return masked + self.hparams.unmasked_weight * loss_at(seen) if seen.any() else masked

    def fit_batch(self, batch):
        """One step at the learning rates that the spent share of the budget asks for."""
        share = self.progress.tick(self.hparams.budget_seconds, self.device)
        factor = min(1.0, (self.optimizer_step + 1) / self.hparams.warmup_steps)
        factor *= min(1.0, max(0.0, (1 - share) / self.hparams.decay_share))
        for name, optimizer in self.optimizers_dict.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * getattr(self.hparams, f"lr_{name}")
        if share >= 1 or self.optimizer_step + 1 >= (self.hparams.max_steps or math.inf):
            self.optimizer_step_limit = self.optimizer_step + 1
        log = if_main_process() and self.optimizer_step % self.hparams.log_steps == 0
        if log and self.sums[2] > 0:
            loss, accuracy = (self.sums[:2] / self.sums[2]).tolist()
            logger.info(
                "step %d, %.0f s, %.1f %% of the budget: masked loss %.3f, accuracy %.3f",
                *(self.optimizer_step, self.progress.seconds, 100 * share, loss, accuracy),
            )
        return super().fit_batch(batch)

    def on_fit_start(self):
        """Goes on from the last checkpoint; a run whose budget is spent is not trained further."""
        super().on_fit_start()
        if not self.distributed_launch:  # else SpeechBrain has its own, and tells it the epoch
            self.train_sampler = self.batches
        counter, steps = self.hparams.epoch_counter, self.hparams.max_steps
        spent = self.progress.seconds >= self.hparams.budget_seconds
        if spent or (steps is not None and self.optimizer_step >= steps):
            logger.info("the budget of this run is spent: %s", self.hparams.encoder_folder)
            counter.limit = counter.current
            self.export()  # it may have been killed between its last checkpoint and this

    def init_optimizers(self):
        """One optimizer for the encoder and one, with its own rate, for the head."""
        pretrainer = getattr(self.modules.pretrainer, "module", self.modules.pretrainer)
        self.optimizers_dict = self.opt_class(pretrainer)
        if self.checkpointer is not None:
            for name, optimizer in self.optimizers_dict.items():
                self.checkpointer.add_recoverable(f"optimizer_{name}", optimizer)

    def on_stage_start(self, stage, epoch=None):
        """Sums of loss, hits and frames start again."""
        self.sums = torch.zeros(3)
        self.guessed = [set() for _ in range(self.hparams.codebooks)]
        if stage == sb.Stage.TRAIN:
            self.frames = 0
            # Checkpoints lie at the ends of epochs: a run that goes on draws the same masks.
            seed = self.hparams.seed + 1000 * epoch + int(os.environ.get("RANK", 0))
            random.seed(seed)
            torch.manual_seed(seed)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Logs, keeps a checkpoint and exports the encoder after every validation."""
        loss, accuracy = (self.sums[:2] / self.sums[2].clamp(min=1)).tolist()
        if stage == sb.Stage.TRAIN:
            self.train_stats = {"masked_loss": loss, "masked_accuracy": accuracy}
            world = int(os.environ.get("WORLD_SIZE", 1))
            self.progress.hours += self.frames * world * self.hparams.stride / 360000
            return
        used = sum(map(len, self.guessed)) / (self.hparams.codebooks * self.hparams.codes)
        valid = {"masked_loss": loss, "masked_accuracy": accuracy, "codes_guessed": used}
        row = {"steps": self.optimizer_step, "hours": self.progress.hours}
        row |= {"seconds": self.progress.seconds, "train": self.train_stats, "valid": valid}
        self.progress.history.append(row)
        self.hparams.train_logger.log_stats(
            {key: row[key] for key in ("steps", "hours", "seconds")},
            train_stats=self.train_stats,
            valid_stats=valid,
        )
        self.checkpointer.save_and_keep_only(meta={"masked_loss": loss}, num_to_keep=1)
        self.export()

    @main_process_only
    def export(self):
        """Writes the encoder as a Hugging Face folder, with `training.json`, unless it is there."""
        path = Path(self.hparams.encoder_folder) / "training.json"
        written = json.loads(path.read_text())["history"] if path.exists() else []
        if written == self.progress.history:
            return
        pretrainer = getattr(self.modules.pretrainer, "module", self.modules.pretrainer)
        report = {"config": self.hparams.settings, "data": self.hparams.prepared}
        report |= {"targets": self.hparams.targets, "history": self.progress.history}
        pretrainer.export(self.hparams.encoder_folder, self.hparams.stride, report)


def check_settings(path, settings, may_change):
    """A run that is continued has the settings it began with, apart from those that may change."""
    done = path.with_name("targets.json").exists() or any(path.parent.glob("save/CKPT*"))
    if path.exists() and done:  # else there is nothing to lose
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it if all settings are those that the run "
                "began with, or give another --output_folder"
            ) from None
        # What `prepare` holds are values of other keys, some of which may change. Keys that a run
        # of an earlier version does not have are not compared.
        for key in sorted(before.keys() - {"prepare", *may_change}):
            if before.get(key) != settings.get(key):
                raise ValueError(
                    f"{path.parent} holds a run with {key}={before.get(key)!r}, now it is "
                    f"{settings.get(key)!r}: give it back, or another --output_folder"
                )
    write_atomically(path, json.dumps(settings, indent=1))


def main(argv):
    """Refuse what cannot work before hours of preparation; then the run."""
    hparams, run_opts = load_config(argv, RECIPE / "hparams" / "best_rq.yaml")
    torch.set_flush_denormal(True)
    hparams["sources"] = as_list(hparams["sources"])
    folder = Path(hparams["output_folder"])
    if not 0 <= hparams["warp"] < 1:
        raise ValueError(f"warp={hparams['warp']}: expected 0 to below 1, such as 0.1")
    if not 0 <= hparams["dropout"] < 1:
        raise ValueError(f"dropout={hparams['dropout']}: expected 0 to below 1, such as 0.1")
    bands = dict(hparams["bands"])
    if set(bands) != {"count", "width"} or not (bands["count"] >= 0 and 0 <= bands["width"] <= 80):
        raise ValueError(f"bands={bands}: expected a count, and a width of 0 to 80 mels")
    if not (folder / "targets.json").exists():  # else the teacher is no longer needed
        views_and_layers(hparams)
    if hparams["max_frames"] < hparams["mask"]["frames"]:
        raise ValueError(
            f"max_frames={hparams['max_frames']}: expected no less than those of mask="
            f"{dict(hparams['mask'])}"
        )
    first = int(os.environ.get("RANK", 0)) == 0
    with locked(folder / ".lock", wait=False) if first else nullcontext():
        pretrain(hparams, run_opts, folder)


def pretrain(hparams, run_opts, folder):
    """Prepare, quantize, pretrain, export."""
    plain = (str, int, float, bool, list, dict, type(None))
    settings = {k: v for k, v in hparams.items() if isinstance(v, plain) and k != "config"}
    settings = json.loads(json.dumps(settings))
    run_on_main(check_settings, [folder / "settings.json", settings, hparams["may_change"]])
    torch.manual_seed(hparams["seed"])
    # Before the preparation, too: an `init` that does not fit is refused here.
    pretrainer = Pretrainer(
        hparams["encoder"],
        hparams["codebooks"],
        hparams["codes"],
        hparams["init"],
        hparams["local_attention"],
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run_on_main(prepare_speech, kwargs=hparams["prepare"])
    run_on_main(make_codes, [hparams, run_opts.device or infer_device()])
    torch.manual_seed(hparams["seed"])  # preparation draws numbers, too, if it is not done yet

    prepared = Path(hparams["prepared_folder"])
    hparams["prepared"] = json.loads((prepared / "prepared.json").read_text())
    hparams["targets"] = json.loads((folder / "targets.json").read_text())
    hparams["settings"] = settings
    segments = {
        part: SpeechSegments(
            *(prepared, part, folder / "codes.npy"),
            *(hparams[key] for key in ("max_frames", "mask", "warp", "bands")),
        )
        for part in ("train", "valid")
    }
    loaders = {
        "train": {
            "batch_sampler": sampler(segments["train"], hparams["batch_frames"], hparams),
            "num_workers": hparams["num_workers"],
        },
        "valid": {"batch_sampler": sampler(segments["valid"], hparams["batch_frames"])},
    }
    progress = Progress()
    brain = Pretraining(
        {"pretrainer": pretrainer},
        hparams["optimizers"],
        hparams,
        run_opts,
        hparams["checkpointer"],
    )
    brain.progress, brain.batches = progress, loaders["train"]["batch_sampler"]
    hparams["checkpointer"].add_recoverables(
        {"pretrainer": pretrainer, "progress": progress, "counter": hparams["epoch_counter"]}
    )
    brain.fit(
        hparams["epoch_counter"],
        segments["train"],
        segments["valid"],
        progressbar=False,
        train_loader_kwargs=loaders["train"] | {"collate_fn": segments["train"].collate},
        valid_loader_kwargs=loaders["valid"] | {"collate_fn": segments["valid"].collate},
    )


if __name__ == "__main__":
    run(main)
