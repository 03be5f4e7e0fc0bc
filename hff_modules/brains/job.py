"""What the jobs of all tasks share: modules, loaders, and the way from training to results."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import (
    ddp_barrier,
    if_main_process,
    is_distributed_initialized,
    run_on_main,
)
from speechbrain.utils.logger import get_logger
from torch import nn
from torch.utils.data import DataLoader

from hff_modules import adapters
from hff_modules.auto_layers import CHOICE
from hff_modules.brains.base import SSLBrain
from hff_modules.config import MAY_CHANGE, changed_settings
from hff_modules.data.loading import batches_by_length
from hff_modules.files import locked, parse_yaml, read_json, read_text, write_atomically
from hff_modules.masking import FeatureMasking

logger = get_logger(__name__)

_AT_WORK: dict[Path, contextlib.ExitStack] = {}  # locks of the folders that this process is in

# May change, too, with --test_only
IN_TESTING = ("batch_seconds", "num_buckets", "max_batch_size", "precision", "eval_precision")


def enter_folder(hparams: Mapping[str, Any]) -> None:
    """Make the output folder, or go on in it.

    Raises
    ------
    ValueError
        It holds a run with other settings, of which nothing is changed. :func:`keep` compares
        again, with what is known later: the data, and layers that are chosen by it.
    BlockingIOError
        Another process is at work in it: each would delete the other's checkpoints.
    """
    later = ("layers",) if "auto_layers" in hparams else ()
    folder = Path(hparams["output_folder"])
    if later and _begun(folder) and not (folder / CHOICE).exists():
        raise ValueError(
            f"{folder} holds a run that was given its layers (now {hparams['auto_layers']}); "
            "choose another --output_folder, or delete that one to start anew"
        )
    _refuse_other_settings(hparams, (*MAY_CHANGE, *IN_TESTING, *later))
    folder = folder.resolve()
    if if_main_process() and folder not in _AT_WORK:
        _AT_WORK[folder] = contextlib.ExitStack()
        try:
            _AT_WORK[folder].enter_context(locked(folder / ".lock", wait=False))
        except OSError:
            del _AT_WORK[folder]
            raise
    sb.create_experiment_directory(hparams["output_folder"])


def _leave_folder(hparams: Mapping[str, Any]) -> None:
    _AT_WORK.pop(Path(hparams["output_folder"]).resolve(), contextlib.ExitStack()).close()


def prepared(hparams: Mapping[str, Any], prepare: Callable[..., Any], *args, **kwargs) -> Any:
    """Enter the output folder; one process makes the manifests. Gives what ``prepare`` gave to all.

    Arguments
    ---------
    hparams : Mapping[str, Any]
        With ``data_folder`` and ``output_folder``.
    prepare : Callable
        Takes the data's folder, the one for manifests, and what follows.
    *args, **kwargs
        What follows.
    """
    enter_folder(hparams)
    folders = [hparams["data_folder"], manifests_folder(hparams)]
    return run_on_main(prepare, args=[*folders, *args], kwargs=kwargs)


def manifests_folder(hparams: Mapping[str, Any]) -> Path:
    """Where manifests are made: those of a run that has begun say what it was trained on."""
    folder = Path(hparams["output_folder"])
    return folder / ("manifests-now" if _begun(folder) else "manifests")


def build_modules(hparams: Mapping[str, Any], **head_sizes: Any) -> dict[str, nn.Module]:
    """Encoder with its adapters, fusion, masking and head.

    Arguments
    ---------
    hparams : Mapping[str, Any]
        ``ssl_encoder``, ``adapters``, ``fusion``, ``masking`` and ``head``, as in ``hparams/base``.
    **head_sizes
        What only the data can tell the head.

    Returns
    -------
    dict[str, torch.nn.Module]
    """
    encoder = hparams["ssl_encoder"]
    for method, options in hparams["adapters"].items():
        adapters.attach(encoder, method, **options)
    fusion = hparams["fusion"](num_states=len(encoder.layers), input_size=encoder.hidden_size)
    head = hparams["head"](input_size=fusion.output_size, **head_sizes)
    masking = hparams["masking"] or FeatureMasking(time_masks=0, width_masks=0)
    return {"encoder": encoder, "fusion": fusion, "masking": masking, "head": head}


def keep(
    brain: SSLBrain,
    hparams: Mapping[str, Any],
    data: Mapping[str, DynamicItemDataset],
    **files: str,
) -> None:
    """Write the merged settings as ``config.yaml``, and other files, into the output folder.

    Arguments
    ---------
    brain : SSLBrain
    hparams : Mapping[str, Any]
    data : Mapping[str, DynamicItemDataset]
        What it is trained on and chosen by; ``data.json`` has a hash of each.
    **files : str
        Texts by name.

    Raises
    ------
    ValueError
        The folder has a checkpoint of a run with another encoder, other settings or data, which
        would be continued, or tested, as if it had these.
    """
    test_only, folder = brain.test_only, Path(hparams["output_folder"])
    processes = torch.distributed.get_world_size() if is_distributed_initialized() else 1
    found = {part: _described(dataset) for part, dataset in data.items()}
    _refuse_other_settings(hparams, (*MAY_CHANGE, *(IN_TESTING if test_only else ())))
    if _begun(folder) and (folder / "data.json").is_file():
        before = read_json(folder / "data.json")
        then = before.get("processes", processes)
        if then != processes and not test_only:  # the batch of a step is theirs together
            raise ValueError(
                f"{folder} holds a run of {then} processes, now there are {processes}; go on with "
                "as many, choose another --output_folder, or delete that one to start anew"
            )
        for part in found:
            if found[part] != before.get(part, found[part]):
                then, now = (which[part]["utterances"] for which in (before, found))
                raise ValueError(
                    f"{folder} holds a run on other data: {part} had {then} utterances, now it has "
                    f"{now}{', not all the same' if then == now else ''} (manifests-now beside its "
                    "manifests); choose another --output_folder, or delete that one to start anew"
                )
    if _begun(folder):  # now, as storing the states of another encoder takes hours
        brain.trained.check(max(folder.glob("save/CKPT*")))
    if if_main_process():
        files["data.json"] = json.dumps({**found, "processes": processes}, indent=1) + "\n"
        files["config.yaml"] = hparams["config"]
        for name, text in files.items():
            if not (test_only and (folder / name).is_file()):  # they tell how it was trained
                write_atomically(folder / name, text)


def _begun(folder: Path) -> bool:
    return any(folder.glob("save/CKPT*"))


def _refuse_other_settings(hparams: Mapping[str, Any], may_change: Sequence[str]) -> None:
    folder = Path(hparams["output_folder"])
    path = folder / "config.yaml"
    if not (_begun(folder) and path.is_file()):
        return
    old = read_text(path)
    parse_yaml(old, path)  # which names the file if it is damaged
    changed = [
        "{} {} (now {})".format(key, *_where_they_differ(str(then), str(now)))
        for key, (then, now) in changed_settings(old, hparams["config"]).items()
        if key not in may_change
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run with {', '.join(changed)}; choose another --output_folder, "
            "or delete that one to start anew"
        )


def _where_they_differ(one: str, other: str) -> tuple[str, str]:
    """Sixty characters of each, among them the first that differ."""
    same = len(os.path.commonprefix([one, other]))
    start = 0 if same < 40 else same - 20
    return tuple("…" * (start > 0) + text[start : start + 60] for text in (one, other))


def _described(dataset: DynamicItemDataset) -> dict[str, Any]:
    # Where a recording lies is not what it is: data may be moved.
    rows = ({k: v for k, v in dataset.data[n].items() if k != "wav"} for n in dataset.data_ids)
    pairs = sorted(zip(dataset.data_ids, map(repr, rows), strict=True))
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
    return {"utterances": len(pairs), "content": digest}


def asked_for(test_sets: Mapping[str, Any], hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The test sets; none with ``testing: false``, or their states would be stored for nothing."""
    return dict(test_sets) if hparams["testing"] else {}


def to_be_read(brain: SSLBrain, train_set, dev_set, others: Iterable) -> list:
    """The sets whose states are to be stored; with ``--test_only`` training's are not."""
    return [*others] if brain.test_only else [train_set, dev_set, *others]


def train_and_test(
    brain: SSLBrain, hparams: Mapping[str, Any], train_set, dev_set, test_sets: Mapping[str, Any]
) -> dict[str, Any]:
    """Train on one set, choose by another, test on the rest; gives what ``results.json`` holds."""
    brain.fit(
        hparams["epoch_counter"],
        training_loader(brain, train_set, hparams),
        evaluation_loader(dev_set, hparams),
    )
    sets = {"train": train_set, "dev": dev_set, **{f"test {n}": s for n, s in test_sets.items()}}
    brain.data = {name: _described(dataset)["content"] for name, dataset in sets.items()}
    loaders = {name: evaluation_loader(dataset, hparams) for name, dataset in test_sets.items()}
    results = brain.report(brain.test(loaders))
    ddp_barrier()  # with --debug the main process's checkpoints go with it
    _leave_folder(hparams)
    return results


def training_loader(brain: SSLBrain, dataset, hparams: Mapping[str, Any]) -> DataLoader:
    """Shuffled batches by length, shared out over the processes; its position is checkpointed."""
    sampler = batches_by_length(
        dataset,
        hparams["batch_seconds"],
        hparams["num_buckets"],
        hparams["max_batch_size"],
        seed=hparams["seed"],
    )
    if brain.distributed_launch and len(sampler) <= torch.distributed.get_world_size():
        raise ValueError(
            f"{len(sampler)} training batches are too few for "
            f"{torch.distributed.get_world_size()} processes; lower --batch_seconds"
        )
    spoken = sum(float(dataset.data[n]["duration"]) for n in dataset.data_ids) / len(sampler)
    few, wanted = 2 * hparams["num_buckets"], hparams["batch_seconds"]
    if spoken < 0.4 * wanted and len(sampler) > few and hparams["max_batch_size"] is None:
        logger.warning(  # SpeechBrain's buckets suit batches of some ten utterances
            f"batches have {spoken:.0f} s of speech on average, batch_seconds={wanted:g} allows "
            f"more: raise --num_buckets, now {hparams['num_buckets']}"
        )
    brain.train_sampler = sampler  # so that each epoch is told to it; replaced when distributed
    return brain.make_dataloader(
        dataset,
        stage=sb.Stage.TRAIN,
        batch_sampler=sampler,
        collate_fn=PaddedBatch,
        num_workers=hparams["num_workers"],
        generator=_own_generator(),
    )


def evaluation_loader(dataset, hparams: Mapping[str, Any]) -> DataLoader:
    """Batches by length, longest first."""
    sampler = batches_by_length(
        dataset,
        hparams["batch_seconds"],
        hparams["num_buckets"],
        hparams["max_batch_size"],
        shuffle=False,
    )
    return sb.dataio.dataloader.make_dataloader(
        dataset,
        batch_sampler=sampler,
        collate_fn=PaddedBatch,
        num_workers=hparams["num_workers"],
        generator=_own_generator(),
    )


def _own_generator() -> torch.Generator:
    # A loader draws a number whenever it starts. From the global generator, a resumed run would
    # draw once more than an undisturbed one, and differ from then on.
    return torch.Generator().manual_seed(0)
