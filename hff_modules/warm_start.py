"""Start from what another run learned: adapters, fusion and head; output units matched by name.

Intermediate adaptation for a new language: arXiv 2411.18217.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.logger import get_logger

from hff_modules.checkpoint import (
    MANIFEST,
    TENSORS,
    CheckpointError,
    Trained,
    TrainedCheckpointer,
    differences,
    read_tensors,
)
from hff_modules.data.manifest import read_rows
from hff_modules.data.text import Units, load_units
from hff_modules.files import parse_yaml, read_json, read_text

logger = get_logger(__name__)

STARTED_FROM = "start_from.json"
ROWS = ("head.output.weight", "head.output.bias")  # one row for each unit


def best_checkpoint(folder: str | Path) -> Path:
    """The folder of the checkpoint that a run would be tested with.

    Arguments
    ---------
    folder : str | Path
        The output folder of the run.

    Raises
    ------
    CheckpointError
        It is no such folder, or holds no checkpoint yet.
    """
    folder = Path(folder)
    config, save = folder / "config.yaml", folder / "save"
    if not config.is_file() or not save.is_dir():
        raise CheckpointError(
            f"start_from {folder}: expected the output folder of a run, with config.yaml and save/"
        )
    chosen_by = parse_yaml(read_text(config), config).get("select_by")
    if chosen_by is None:
        raise CheckpointError(f"start_from: {config} has no select_by; is it whole?")
    found = TrainedCheckpointer(save).find_checkpoint(min_key=chosen_by)
    if found is None:
        raise CheckpointError(f"start_from {folder}: there is no checkpoint in {save}")
    return found.path


def begun_with(hparams: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the run in the output folder was started from, as :func:`start_from` gave it.

    It goes on from checkpoints of its own: the other run's folder may be gone by then, or moved.
    None if it has not begun, or was not started from anything.

    Raises
    ------
    CheckpointError
        ``start_from`` is now a folder with something else.
    """
    folder, now = Path(hparams["output_folder"]), hparams["start_from"]
    if not any(folder.glob("save/CKPT*")):
        return None
    begun = read_json(folder / STARTED_FROM) if (folder / STARTED_FROM).is_file() else None
    if now is not None and begun is None and (folder / "config.yaml").is_file():
        then = parse_yaml(read_text(folder / "config.yaml"), folder / "config.yaml")
        if then.get("start_from") is None:
            raise CheckpointError(f"{folder} holds a run that was not started from {now}")
    if now is not None and begun is not None and Path(now).is_dir():
        if _digest(best_checkpoint(now)) != begun["checkpoint"]:
            raise CheckpointError(
                f"{folder} holds a run that was started from {begun['folder']}; {now} is another"
            )
    return begun


def _digest(checkpoint: Path) -> str:
    with open(checkpoint / f"trained{TENSORS}", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def start_from(trained: Trained, units: Units, folder: str | Path) -> dict[str, Any]:
    """Copy what a run learned into the modules of another one.

    Arguments
    ---------
    trained : Trained
        The modules that start; a head's rows of units that the other run does not have stay.
    units : CharUnits | SentencePieceUnits
        Their units.
    folder : str | Path
        The output folder of the run to start from.

    Returns
    -------
    dict[str, Any]
        ``folder``, ``known_units`` and ``new_units`` (numbers), ``checkpoint`` (a digest), for
        ``results.json`` and ``start_from.json``.

    Raises
    ------
    CheckpointError
        The run had another encoder, other layers, another method, kind of units, or widths; says
        every difference.
    """
    checkpoint = best_checkpoint(folder)
    try:
        saved = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        old = {unit: row for row, unit in enumerate(load_units(Path(folder) / "units").vocab_list)}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"start_from {folder}: cannot be read ({error})") from None
    found = differences(_apart_from_units(saved), _apart_from_units(trained.manifest))
    if found:
        lines = "\n  ".join(found)
        raise CheckpointError(f"start_from {folder}: that run was something else:\n  {lines}")
    tensors, _ = read_tensors(checkpoint / f"trained{TENSORS}")
    pairs = [(row, old[unit]) for row, unit in enumerate(units.vocab_list) if unit in old]
    with torch.no_grad():
        for name, tensor in trained.tensors().items():
            if name not in ROWS:
                tensor.copy_(tensors[name])
                continue
            for row, there in pairs:
                tensor[row].copy_(tensors[name][there])
    new = [unit for unit in units.vocab_list if unit not in old]
    named = f"; new: {' '.join(new)}" if new else ""
    logger.info(f"started from {checkpoint}: {len(pairs)} of {units.size} units known{named}")
    units_of = {"known_units": len(pairs), "new_units": len(new)}
    return {"folder": str(folder), **units_of, "checkpoint": _digest(checkpoint)}


def check_unheard(folder: str | Path, parts: Mapping[str, DynamicItemDataset]) -> None:
    """Refuse to test on recordings that the run which is started from was trained on.

    Parts that are chosen anew when rows are added are what leads there. Recordings are known by
    file name, duration and text, and by speaker, or folder where one of them has none. Sentences
    said before are counted.

    Arguments
    ---------
    folder : str | Path
        The output folder of the run to start from; its manifests of training, if it has some.
    parts : Mapping[str, DynamicItemDataset]
        Dev and test, by name.

    Raises
    ------
    ValueError
        They share recordings with it.
    """
    manifests = sorted(Path(folder).glob("manifests/**/train*.csv"))
    rows = [row for path in manifests for row in read_rows(path, "").values()]
    heard, said = defaultdict(set), {row.get("wrd") for row in rows}
    for row in rows:
        heard[_recording(row)].add(_place(row))
    for name, dataset in parts.items():
        both = [
            ID
            for ID, row in dataset.data.items()
            if any(_may_be_one(_place(row), there) for there in heard.get(_recording(row), ()))
        ]
        if both:
            raise ValueError(
                f"start_from {folder}: it was trained on {len(both)} of the {len(dataset.data)} "
                f"recordings of {name} ({', '.join(both[:3])}{', ...' * (len(both) > 3)}); let "
                "those of its manifests stay in the same parts"
            )
        known = sum(row["wrd"] in said for row in dataset.data.values())
        if known:
            logger.warning(
                f"{name}: {known} of {len(dataset.data)} sentences were said in the training of "
                f"{folder}: scores on them are of new voices, not of new sentences"
            )


def _recording(row: Mapping[str, Any]) -> tuple:
    return Path(row["wav"]).name, round(float(row["duration"]), 2), row.get("wrd")


def _place(row: Mapping[str, Any]) -> tuple[str, str]:
    return row.get("spk_id") or "", Path(row["wav"]).parent.name


def _may_be_one(one: tuple[str, str], other: tuple[str, str]) -> bool:
    by_speaker = one[0] and other[0]  # speakers may have been named only later
    return one[0] == other[0] if by_speaker else one[1] == other[1]


def _apart_from_units(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same: all but which units there are, and so how many rows."""
    tensors = {
        name: shape[1:] if name in ROWS else shape for name, shape in manifest["tensors"].items()
    }
    kind = {"units": manifest["task"].get("units")}
    return {**manifest, "task": kind, "tensors": tensors}
