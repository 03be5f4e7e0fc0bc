"""Checkpoints of what was trained and a manifest, nothing else; no pickle, never half-written.

A checkpoint is a folder that SpeechBrain's ``Checkpointer`` manages::

    CKPT+<time>/
        CKPT.yaml               scores on dev, end of epoch or not (SpeechBrain's)
        trained.safetensors     trained tensors of encoder, fusion and head, by name
        manifest.json           what they belong to: encoder, layers, method, shapes, versions
        optimizers.safetensors, schedules.safetensors, rng.safetensors, meter.safetensors
        brain.ckpt, counter.ckpt, dataloader-TRAIN.ckpt       positions, as text (SpeechBrain's)
"""

import errno
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from speechbrain.utils.checkpoints import METAFNAME, Checkpoint, Checkpointer
from speechbrain.utils.distributed import (
    ddp_barrier,
    if_main_process,
    is_distributed_initialized,
)
from speechbrain.utils.logger import get_logger
from torch import nn

from hff_modules.files import parse_yaml, read_text, sync, write_atomically

logger = get_logger(__name__)

TENSORS = ".safetensors"
MANIFEST = "manifest.json"
UNFINISHED = "unfinished-"  # does not start with CKPT, so SpeechBrain takes it for no checkpoint
# Where an encoder lies and who wrote the checkpoint may differ: the fingerprint tells what it is.
LATER = {"adapters", "fusion_options"}  # of the manifest, unknown to the first versions
NOT_COMPARED = {"versions", "encoder.source", "encoder.revision"}


class CheckpointError(ValueError):
    """A checkpoint made for something else; says every difference."""


class TrainedCheckpointer(Checkpointer):
    """SpeechBrain's ``Checkpointer``, but a folder gets its name only when all of it is written.

    A run that is killed while saving, or a disk that is full, leaves the last good checkpoint.
    Arguments are those of ``Checkpointer``.
    """

    def save_checkpoint(self, meta={}, end_of_epoch=True, name=None, verbosity=logging.INFO):  # noqa: B006
        """Save; arguments and result as in ``Checkpointer``.

        Raises
        ------
        OSError
            Nothing could be written (no space left, say); names the folder and what remains.
        """
        if if_main_process():
            self._remove_unfinished()
        saved = None
        try:
            saved = super().save_checkpoint(meta, end_of_epoch, name, logging.DEBUG)
            if saved is not None:
                saved = self._finish(saved)
                logger.log(verbosity, f"saved {saved.path}")
        except OSError as error:
            if if_main_process():
                self._remove_unfinished()
            last = self.find_checkpoint()
            remains = f"the last good one stays: {last.path}" if last else "there is none before it"
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(
                error.errno,
                f"checkpoint not saved in {self.checkpoints_dir.resolve()} ({reason}); {remains}",
            ) from error
        # Others list the folder next, to delete old ones: they must see the same as this process.
        ddp_barrier()
        return saved

    def _finish(self, saved: Checkpoint) -> Checkpoint:
        final = saved.path.with_name(saved.path.name.removeprefix(UNFINISHED))
        if if_main_process():
            sync(saved.path)
        if final.exists():  # saved under a name of its own once more
            shutil.rmtree(final)
        os.replace(saved.path, final)
        return self._construct_checkpoint_objects([final])[0]

    def _remove_unfinished(self) -> None:
        for folder in self.checkpoints_dir.glob(UNFINISHED + "*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _new_checkpoint_dirpath(self) -> Path:
        path = super()._new_checkpoint_dirpath()
        return path.with_name(UNFINISHED + path.name)

    def _custom_checkpoint_dirpath(self, name: str) -> Path:
        path = super()._custom_checkpoint_dirpath(name)
        return path.with_name(UNFINISHED + path.name)

    @staticmethod
    def _construct_checkpoint_objects(checkpoint_dirs):
        for folder in checkpoint_dirs:
            file = Path(folder) / METAFNAME
            known = parse_yaml(read_text(file), file)
            if not {"unixtime", "end-of-epoch"} <= known.keys():
                raise CheckpointError(f"{file} is cut off; without {folder} the run goes on")
        found = Checkpointer._construct_checkpoint_objects(checkpoint_dirs)
        for checkpoint in found:
            files = checkpoint.path.glob("*" + TENSORS)
            checkpoint.paramfiles.update({file.stem: file for file in files})
        return found


class Trained:
    """What is trained in some modules, to be saved and loaded under its manifest.

    Arguments
    ---------
    modules : Mapping[str, torch.nn.Module]
        As they are, not wrapped for distribution.
    manifest : Mapping[str, Any]
        What the tensors belong to, JSON-able; names and shapes of the tensors are added.

    Example
    -------
    >>> trained = Trained({"head": nn.Linear(3, 2)}, {"method": "fusion"})
    >>> sorted(trained.tensors())
    ['head.bias', 'head.weight']
    """

    def __init__(self, modules: Mapping[str, nn.Module], manifest: Mapping[str, Any]):
        self.modules = dict(modules)
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors().items()}
        self.manifest = {**manifest, "tensors": shapes}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Give the live tensors that training changes: parameters, and buffers beside them."""
        return {
            f"{part}.{name}": tensor
            for part, module in self.modules.items()
            for name, tensor in _trained_tensors(module)
        }

    def save(self, path: str | Path) -> None:
        """Write ``path`` (as .safetensors) and ``manifest.json`` beside it."""
        path = Path(path)
        write_tensors(path, self.tensors())
        manifest = json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n"
        write_atomically(path.parent / MANIFEST, manifest)

    def check(self, checkpoint: Path) -> None:
        """Refuse a checkpoint that does not fit.

        Arguments
        ---------
        checkpoint : Path
            Its folder.

        Raises
        ------
        CheckpointError
            It was made for another encoder, other layers, another method or other shapes.
        """
        file = checkpoint / MANIFEST
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}): not a checkpoint of ours"
            ) from None
        found = differences(saved, self.manifest)
        if found:
            lines = "\n  ".join(found)
            raise CheckpointError(
                f"the checkpoint {checkpoint} was made for something else:\n  {lines}\n"
                "Use the settings it was made with, or another --output_folder."
            )

    def load(self, path: str | Path) -> None:
        """Load what :meth:`save` wrote.

        Raises
        ------
        CheckpointError
            As :meth:`check`.
        """
        path = Path(path)
        self.check(path.parent)
        tensors, _ = read_tensors(path)
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])


def _trained_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    # Buffers change (running statistics) only beside parameters that are trained.
    for prefix, part in module.named_modules():
        if any(p.requires_grad for p in part.parameters(recurse=False)):
            for name, buffer in part.named_buffers(prefix=prefix, recurse=False):
                if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                    yield name, buffer


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Spell out in which entries two manifests differ; empty if one fits the other."""
    old, new = _flat(saved), _flat(now)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key.split(".")[0] in LATER and key.split(".")[0] not in saved:
            continue
        if key.split(".")[0] in NOT_COMPARED or key in NOT_COMPARED:
            continue
        if key not in old:
            lines.append(f"{key}: not in the checkpoint, {new[key]} now")
        elif key not in new:
            lines.append(f"{key}: {old[key]} in the checkpoint, not there now")
        elif old[key] != new[key]:
            whose = ("", "")
            if key == "encoder.fingerprint":
                whose = tuple(f" (of {flat.get('encoder.source')})" for flat in (old, new))
            lines.append(f"{key}: {old[key]}{whose[0]} in the checkpoint, {new[key]}{whose[1]} now")
    return lines


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class RandomState:
    """Random generators of torch, NumPy and Python, of every process of the run."""

    def state_dict(self) -> dict[str, Any]:
        """Collect the states; all processes must call this together."""
        _, keys, position, has_gauss, gauss = np.random.get_state()
        version, internal, next_gauss = random.getstate()
        own = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "python": [version, torch.tensor(internal), next_gauss],
        }
        states = [own]
        if is_distributed_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, own)
        return {"processes": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this process's states."""
        rank = torch.distributed.get_rank() if is_distributed_initialized() else 0
        states = state["processes"]
        if rank >= len(states):
            logger.warning("the checkpoint is from fewer processes: random numbers start afresh")
            return
        own = states[rank]
        torch.set_rng_state(own["torch"])
        if own["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
        keys, position, has_gauss, gauss = own["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
        version, internal, next_gauss = own["python"]
        random.setstate((version, tuple(internal.tolist()), next_gauss))


class Several:
    """Several things with a state, as one: optimizers, or SpeechBrain's schedules (numbers)."""

    def __init__(self, things: Mapping[str, Any]):
        self.things = dict(things)

    def state_dict(self) -> dict[str, Any]:
        """States by name."""
        return {
            name: thing.state_dict() if hasattr(thing, "state_dict") else dict(vars(thing))
            for name, thing in self.things.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the names must be the same."""
        if state.keys() != self.things.keys():
            raise CheckpointError(
                f"the checkpoint has states for {sorted(state)}, this run for {sorted(self.things)}"
            )
        for name, thing in self.things.items():
            if hasattr(thing, "load_state_dict"):
                thing.load_state_dict(state[name])
            else:
                vars(thing).update(state[name])


def save_trained(trained: Trained, path: Path) -> None:
    """SpeechBrain save hook for :class:`Trained`."""
    if if_main_process():
        trained.save(path.with_suffix(TENSORS))


def load_trained(trained: Trained, path: Path, end_of_epoch: bool) -> None:
    """SpeechBrain load hook for :class:`Trained`."""
    del end_of_epoch
    trained.load(path)


def save_state(thing: Any, path: Path) -> None:
    """SpeechBrain save hook for anything with a ``state_dict``: tensors, and the rest as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    rest = _pack(thing.state_dict(), tensors, "")
    if if_main_process():
        write_tensors(path.with_suffix(TENSORS), tensors, {"state": json.dumps(rest)})


def load_state(thing: Any, path: Path, end_of_epoch: bool) -> None:
    """SpeechBrain load hook for what :func:`save_state` wrote."""
    del end_of_epoch
    tensors, metadata = read_tensors(path)
    thing.load_state_dict(_unpack(json.loads(metadata["state"]), tensors))


def _pack(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    # JSON knows neither tensors nor tuples nor numbers as keys, and optimizers have all of them.
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[k, _pack(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        packed = [_pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]
        return {"tuple": packed} if isinstance(value, tuple) else packed
    return value


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_unpack(v, tensors) for v in value["tuple"])
    return {k: _unpack(v, tensors) for k, v in value["items"]}


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises
    ------
    OSError
        With the system's error number, which safetensors gives in its message only.
    """
    # Copies: safetensors refuses tensors that share memory, as views of one buffer do.
    copies = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    try:
        safetensors.torch.save_file(copies, str(path), metadata=metadata)
        os.chmod(path, 0o644)  # safetensors makes it readable for its owner alone
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file: tensors by name, and its metadata."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
