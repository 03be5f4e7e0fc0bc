"""What every task shares: optimizers per part, distribution, checkpoints, measuring, results."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.utils.distributed import (
    ddp_broadcast,
    if_main_process,
    is_distributed_initialized,
)
from speechbrain.utils.logger import get_logger
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from hff_modules.brains.head_first import HeadFirst, checked_epochs
from hff_modules.checkpoint import (
    RandomState,
    Several,
    Trained,
    load_state,
    load_trained,
    save_state,
    save_trained,
)
from hff_modules.config import digest_of_settings
from hff_modules.files import read_text
from hff_modules.measure import Meter, count_parameters, table, versions, write_results

logger = get_logger(__name__)

IN_ENCODER = ("adapters", "encoder", "norms")  # the parts that are trained there
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def trainable_parts(modules: Mapping[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """Sort what is trained into parts, each to get an optimizer with its own learning rate.

    Arguments
    ---------
    modules : Mapping[str, torch.nn.Module]
        Modules by name; the one called ``encoder`` is split into ``adapters`` (what was attached to
        it), ``norms`` and ``encoder`` (the rest).

    Returns
    -------
    dict[str, list[torch.nn.Parameter]]
        Only parts with something to train.

    Example
    -------
    >>> encoder = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).requires_grad_(False)
    >>> _ = encoder[1].requires_grad_(True)
    >>> list(trainable_parts({"encoder": encoder, "head": nn.Linear(2, 2)}))
    ['norms', 'head']
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for name, module in modules.items():
        norms = [m for m in module.modules() if isinstance(m, NORMS)] if name == "encoder" else []
        in_norms = {id(p) for norm in norms for p in norm.parameters()}
        for path, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            part = name
            if name == "encoder" and path.startswith("adapters."):
                part = "adapters"
            elif id(parameter) in in_norms:
                part = "norms"
            parts.setdefault(part, []).append(parameter)
    return parts


class SSLBrain(sb.Brain):
    """A Brain for a (mostly) frozen encoder, a fusion and a head.

    A task adds its name, which scores may choose, ``compute_forward``, ``compute_objectives`` and
    ``scores``.

    Arguments
    ---------
    modules : Mapping[str, torch.nn.Module]
        ``encoder``, ``fusion``, ``head`` and whatever else the task needs.
    hparams : dict[str, Any]
        As in ``hparams/base``.
    run_opts : speechbrain.utils.run_opts.RunOptions | dict, optional
    checkpointer : hff_modules.checkpoint.TrainedCheckpointer, optional
    task : Mapping[str, Any], optional
        What a checkpoint depends on besides encoder, method and shapes, for its manifest.
    """

    task: str  # its name in results.json
    selectable: tuple[str, ...]  # scores on dev of which the smallest is the best

    def __init__(self, modules, hparams, run_opts=None, checkpointer=None, task=None):
        hparams = dict(hparams)
        if hparams["select_by"] not in self.selectable:
            raise ValueError(
                f"select_by: expected a score of which the smallest is the best, "
                f"{' or '.join(self.selectable)}; got {hparams['select_by']!r}"
            )
        if run_opts is not None and run_opts.get("ckpt_interval_steps"):
            hparams["ckpt_interval_minutes"] = 0  # SpeechBrain refuses to have both
        self.parts = dict(modules)  # as they are; self.modules may be wrapped for distribution
        self.encoder, self.horizon = modules["encoder"], modules["encoder"].horizon
        self.head_first = HeadFirst(self.encoder, checked_epochs(hparams))
        super().__init__(
            modules=modules, hparams=hparams, run_opts=run_opts, checkpointer=checkpointer
        )
        if is_distributed_initialized():
            self._be_one_run_of_several_processes()
        # Else SpeechBrain counts such batches, and steps; a scaler does it by itself.
        self.skip_nonfinite_grads = not self.scaler.is_enabled()
        self.meter = Meter(self.device)
        self.total_steps, self.waiting_steps = None, 0
        self.test_set = "test"  # the one that is being scored
        self.data: dict[str, str] = {}  # digests of what it is trained on, chosen by and tested on
        self.trained = Trained(self.parts, self._manifest(task or {}))
        if checkpointer is not None:
            checkpointer.add_recoverable("trained", self.trained, load_trained, self._save_trained)
            checkpointer.add_recoverable("meter", self.meter, load_state, save_state)
            checkpointer.add_recoverable("counter", self.hparams.epoch_counter)
            if "scaler" in checkpointer.recoverables:  # else a pickle
                checkpointer.custom_save_hooks["scaler"] = save_state
                checkpointer.custom_load_hooks["scaler"] = load_state

    def _be_one_run_of_several_processes(self) -> None:
        norms = [
            m for m in self.modules.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        learning = any(p.requires_grad for norm in norms for p in norm.parameters())
        if torch.device(self.device).type == "cpu" and learning:
            raise ValueError(
                "batch norms are trained, which several processes cannot do together on a CPU: "
                "use one process, GPUs, or a method that leaves them as they are"
            )
        if self.debug and self.checkpointer is not None:  # SpeechBrain's, one for each process
            folder = ddp_broadcast(self.checkpointer.checkpoints_dir)
            self.checkpointer.checkpoints_dir = folder

    def _manifest(self, task: Mapping[str, Any]) -> dict[str, Any]:
        manifest = {
            "format": 1,
            "method": self.hparams.method,
            "encoder": self.encoder.manifest(),
            "horizon": self.horizon,
            "adapters": {
                name: [adapter.method, adapter.layers, adapter.options]
                for name, adapter in self.encoder.adapters.items()
            },
            "fusion": type(self.parts["fusion"]).__name__,
            "fusion_options": dict(getattr(self.hparams.fusion, "keywords", {})),
            "head": type(self.parts["head"]).__name__,
            "task": dict(task),
            "versions": versions(),
        }
        return json.loads(json.dumps(manifest, default=str))  # as it is read back

    def _save_trained(self, trained: Trained, path: Path) -> None:
        with self.head_first.waits(False):
            save_trained(trained, path)

    # What a task is made of

    def states(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Selected states (num_states, batch, frames, width) and valid frames (batch,)."""
        signal, lens = batch.signal  # waveforms, or stored states
        # While the encoder waits it has no gradients; DistributedDataParallel would miss them.
        modules = self.parts if self.head_first.waiting else self.modules
        return modules["encoder"](signal, lens)

    def features(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused features (batch, frames, width), masked in training, and valid frames (batch,)."""
        states, lengths = self.states(batch)
        features = self.modules.fusion(states, lengths)
        return self.modules.masking(features, lengths), lengths

    def scores(self, stage: sb.Stage) -> dict[str, float]:
        """Scores of the stage that just ended, by name. To be given by the task."""
        raise NotImplementedError

    def mean_loss(self, total: torch.Tensor, count: int, stage: sb.Stage) -> torch.Tensor:
        """Divide a sum by how many things it is about, in the batches of all processes together.

        DDP averages gradients over processes; dividing each process's sum by its own count would
        weigh a short batch like a long one. So two processes train as one with both batches.
        """
        if stage != sb.Stage.TRAIN or not is_distributed_initialized():
            return total / max(count, 1)
        everywhere = torch.tensor(float(count), device=total.device)
        torch.distributed.all_reduce(everywhere)
        return total * torch.distributed.get_world_size() / everywhere.clamp(min=1)

    # Training

    def fit(self, epoch_counter, train_set, valid_set=None, **kwargs) -> None:
        """Train; see ``speechbrain.Brain.fit``. ``train_set`` is a DataLoader here."""
        if not isinstance(train_set, DataLoader):
            raise TypeError(
                f"fit: expected a DataLoader as train_set, got {type(train_set).__name__}"
            )
        if self.grad_accumulation_factor < 1:
            raise ValueError(
                f"grad_accumulation_factor={self.grad_accumulation_factor}: expected 1 or more"
            )
        per_epoch = len(train_set) // self.grad_accumulation_factor
        if per_epoch == 0:  # SpeechBrain counts batches anew in every epoch
            raise ValueError(
                f"grad_accumulation_factor={self.grad_accumulation_factor}, but an epoch has "
                f"{len(train_set)} batches: nothing would be trained; lower it, or --batch_seconds"
            )
        self.total_steps = per_epoch * epoch_counter.limit
        self.waiting_steps = per_epoch * self.head_first.epochs
        super().fit(epoch_counter, train_set, valid_set, **kwargs)

    def _wrap_distributed(self) -> None:
        # SpeechBrain wraps a module if anything in it is trained. The frozen trunk stays outside.
        for module in self.modules.values():
            if self.distributed_launch and any(p.requires_grad for p in module.parameters()):
                learning = set(Trained({"m": module}, {}).tensors())
                names = [n for n, _ in module.named_parameters()]
                names += [n for n, _ in module.named_buffers()]
                frozen = [n for n in names if f"m.{n}" not in learning]
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        super()._wrap_distributed()

    def init_optimizers(self) -> None:
        """Make one optimizer and one schedule per part.

        One optimizer each, because SpeechBrain clips the gradients of the first group only.
        """
        if not 0 <= self.hparams.warmup < 1:
            raise ValueError(f"warmup: expected a share below 1, got {self.hparams.warmup}")
        self.optimizers_dict, self.schedules = {}, {}
        for part, parameters in trainable_parts(self.parts).items():
            lr = self.hparams.learning_rates.get(part)
            if lr is None:
                known = ", ".join(self.hparams.learning_rates)
                raise ValueError(
                    f"learning_rates has no {part!r}, which is trained; it has {known}"
                )
            self.optimizers_dict[part] = self.hparams.optimizer(parameters, lr=lr)
            steps = self.total_steps - (self.waiting_steps if part in IN_ENCODER else 0)
            schedule = self.hparams.schedule(
                lr=lr, n_warmup_steps=int(self.hparams.warmup * steps), total_steps=steps
            )
            schedule.current_step = 1  # at 0 the rate is 0: the first step would be lost
            self.schedules[part] = schedule
        if self.checkpointer is not None:
            for name, thing in (
                ("optimizers", Several(self.optimizers_dict)),
                ("schedules", Several(self.schedules)),
                ("rng", RandomState()),
            ):
                self.checkpointer.add_recoverable(name, thing, load_state, save_state)

    def freeze_optimizers(self, optimizers: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out those of parts that wait."""
        waiting = IN_ENCODER if self.head_first.waiting else ()
        return {part: optimizer for part, optimizer in optimizers.items() if part not in waiting}

    def check_gradients(self) -> None:
        """Drop all gradients if one is no number; by their norm, one pass over them."""
        groups = (g for one in self.optimizers_dict.values() for g in one.param_groups)
        trained = [p for group in groups for p in group["params"] if p.grad is not None]
        if not torch.nn.utils.get_total_norm([p.grad for p in trained]).isfinite():
            logger.warning("a batch's gradients are no numbers: it changes nothing")
            for parameter in trained:
                parameter.grad = None

    def on_stage_start(self, stage, epoch=None) -> None:
        """Start the clock; in training, see who waits in this epoch."""
        if stage == sb.Stage.TRAIN:
            self.head_first.set(epoch <= self.head_first.epochs)
            if 0 < self.head_first.epochs == epoch - 1:
                self.meter.join()  # steps of the head alone are no steps of the method
            self.meter.reset_peak()
            self._clock = time.perf_counter()

    def on_fit_batch_start(self, batch, should_step) -> None:
        """Set the learning rates of this step."""
        if should_step:
            for part, optimizer in self.freeze_optimizers(self.optimizers_dict).items():
                self.schedules[part](optimizer)

    def fit_batch(self, batch) -> torch.Tensor:
        """Train on one batch; gives the loss over the batches of all processes."""
        self.meter.synchronize()
        start = time.perf_counter()
        loss = super().fit_batch(batch)
        self.meter.synchronize()
        now = time.perf_counter()
        seconds = float(sum(batch.duration))
        both = torch.tensor([float(loss), seconds], dtype=torch.float64)
        if is_distributed_initialized():
            both = both.to(self.device)
            torch.distributed.all_reduce(both)
            both[0] /= torch.distributed.get_world_size()
        loss, seconds = both[0].cpu(), float(both[1])
        self.meter.add_step(now - start, seconds)
        self.meter.train_seconds += now - self._clock
        self._clock = now
        self._log_step(float(loss))
        return loss

    def _log_step(self, loss: float) -> None:
        if self.hparams.tensorboard is not None and if_main_process():
            writer = self.hparams.tensorboard.writer
            writer.add_scalar("loss/train step", loss, self.optimizer_step)
            for part, optimizer in self.optimizers_dict.items():
                lr = optimizer.param_groups[0]["lr"]
                writer.add_scalar(f"learning rate/{part}", lr, self.optimizer_step)

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt) -> bool:
        # Between two updates there are accumulated gradients, which a checkpoint does not hold.
        complete = self.step % self.grad_accumulation_factor == 0
        return complete and super()._should_save_intra_epoch_ckpt(last_ckpt_time, steps_since_ckpt)

    def on_stage_end(self, stage, stage_loss, epoch=None) -> None:
        """Log; after dev also decide about stopping and save."""
        if stage == sb.Stage.TRAIN:
            self.meter.read_peak()
            self.meter.train_seconds += time.perf_counter() - self._clock
            self.meter.epochs = epoch
            self.train_loss = stage_loss
            return
        # All stop together, even if processes that compute apart differ in the last digit.
        scores = ddp_broadcast(self.scores(stage))
        if stage == sb.Stage.TEST:
            self.test_scores = scores
            return
        self._log_epoch(epoch, scores)
        self._remember(epoch, scores)
        chosen_by = self.hparams.select_by
        meta, score = {"epoch": epoch, **scores}, scores[chosen_by]
        if self.head_first.waiting:  # not the method yet: to go on from, never to be the best
            meta = {"epoch": epoch}
        elif not is_finite(scores, chosen_by):
            name = chosen_by if not math.isfinite(score) else "loss"
            logger.warning(f"epoch {epoch}: {name} on dev is {scores[name]}, it cannot be chosen")
            meta, counter = {"epoch": epoch}, self.hparams.epoch_counter
            counter.best_limit = max(  # patience does not count epochs that could not be the best
                counter.best_limit, counter.limit_warmup, self.head_first.epochs
            )
            counter.update_metric(math.inf)
        else:
            self.hparams.epoch_counter.update_metric(score)
        if self.checkpointer is not None:
            self.checkpointer.save_and_keep_only(
                meta=meta, min_keys=[chosen_by], importance_keys=[]
            )

    def _remember(self, epoch: int, scores: dict[str, float]) -> None:
        seconds, loss = round(self.meter.train_seconds, 2), float(self.train_loss)
        past = {"epoch": epoch, "train_seconds": seconds, "train_loss": loss, **scores}
        self.meter.history.append(past)

    def _log_epoch(self, epoch: int, scores: dict[str, float]) -> None:
        rates = {f"lr {k}": o.param_groups[0]["lr"] for k, o in self.optimizers_dict.items()}
        self.hparams.train_logger.log_stats(
            {"epoch": epoch, **rates}, train_stats={"loss": self.train_loss}, valid_stats=scores
        )
        if self.hparams.tensorboard is not None and if_main_process():
            writer = self.hparams.tensorboard.writer
            writer.add_scalar("loss/train", self.train_loss, epoch)
            for name, value in scores.items():
                writer.add_scalar(f"{name}/dev", value, epoch)
            writer.flush()

    # Testing and results

    def on_evaluate_start(self, max_key=None, min_key=None) -> None:
        """Load what was trained from the best checkpoint; nothing else of the run is rewound."""
        self.head_first.set(False)
        if self.checkpointer is None:
            return
        best = self.checkpointer.find_checkpoint(max_key=max_key, min_key=min_key)
        if best is None:
            if self.test_only:
                raise FileNotFoundError(
                    f"--test_only: there is no checkpoint in {self.checkpointer.checkpoints_dir}"
                )
            if self.meter.history:
                raise ValueError(
                    "there is no checkpoint to test: no epoch of the method itself ended with a "
                    f"finite {min_key or max_key} on dev"
                )
            return
        self.trained.load(best.paramfiles["trained"])
        if self.test_only:
            latest = self.checkpointer.find_checkpoint()
            load_state(self.meter, latest.paramfiles["meter"], True)

    def test(self, test_sets: Mapping[str, DataLoader]) -> dict[str, dict[str, float]]:
        """Score the best checkpoint on each test set, by name."""
        results, chosen_by = {}, self.hparams.select_by
        for name, loader in test_sets.items():
            self.test_set = name
            self.evaluate(loader, min_key=chosen_by)
            results[name] = self.test_scores
            logger.info(f"test {name}: {self.test_scores}")
        saved = self.checkpointer
        if not test_sets and saved is not None and saved.find_checkpoint(min_key=chosen_by):
            self.on_evaluate_start(min_key=chosen_by)  # for what is told of the best weights
        return results

    def results(self, test: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Everything that ``results.json`` holds; ``dev`` is of the checkpoint that is tested."""
        history, waited = self.meter.history, self.head_first.epochs
        joined = [past for past in history if past["epoch"] > waited]
        joined = [past for past in joined if is_finite(past, self.hparams.select_by)]
        # Of equals the latest, which is the checkpoint that SpeechBrain keeps.
        best = min(reversed(joined), key=lambda past: past[self.hparams.select_by], default={})
        about = ("epoch", "train_seconds", "train_loss")
        fold = getattr(self.hparams, "fold", None)
        return {
            "task": self.task,
            "dataset": self.hparams.dataset,
            "method": self.hparams.method,
            "encoder": self.encoder.source + " (untrained)" * self.encoder.untrained,
            **({} if self.encoder.untrained else {"weights": self.encoder.fingerprint}),
            "layers": list(self.encoder.layers),
            "horizon": self.horizon,
            **count_parameters(self.parts),
            **self.meter.summary(),
            "epochs": self.meter.epochs,
            **({"frozen_epochs": waited} if waited else {}),
            "seed": self.hparams.seed,
            **({} if fold is None else {"fold": fold}),
            **self._settings(),
            **({"data": self.data} if self.data else {}),
            **self.layer_weights(),
            "dev": {name: value for name, value in best.items() if name not in about},
            "test": {name: dict(scores) for name, scores in test.items()},
            "history": history,
            "versions": versions(),
        }

    def _settings(self) -> dict[str, str]:
        """``settings``: a digest of what runs of one row share; how layers were to be chosen."""
        without = ["seed", "fold", "start_from"]  # a path, which is another on another machine
        asked = getattr(self.hparams, "auto_layers", None)
        trained_with = Path(self.hparams.output_folder) / "config.yaml"
        if self.test_only and trained_with.is_file():  # batches and precision of testing may differ
            config = read_text(trained_with)
        else:
            config = self.hparams.config
        if asked is None:
            return {"settings": digest_of_settings(config, *without)}
        digest = digest_of_settings(config, *without, "layers")
        return {"settings": digest, "auto_layers": asked}

    def layer_weights(self) -> dict[str, dict[int, float]]:
        """``layer_weights``: {layer: learned weight} where the fusion has them, else nothing."""
        fusion = self.parts["fusion"]
        found = fusion.layer_weights() if hasattr(fusion, "layer_weights") else None
        if found is None:
            return {}
        pairs = zip(self.encoder.layers, found, strict=True)
        return {"layer_weights": {layer: round(weight, 6) for layer, weight in pairs}}

    def report(self, test: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Write ``results.json``, print the short table; gives the results."""
        results = self.results(test)
        if if_main_process():
            path = Path(self.hparams.output_folder) / "results.json"
            write_results(path, results)
            print(f"\n{table(results)}\n  results in {path}\n")
        return results


def is_finite(scores: Mapping[str, float], chosen_by: str) -> bool:
    """Whether an epoch can be chosen: SpeechBrain would take NaN for the best score.

    The loss counts, too: outputs that are NaN say nothing, which is a finite CER of 100 %.
    """
    return math.isfinite(scores[chosen_by] + scores.get("loss", 0.0))
