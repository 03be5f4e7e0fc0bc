"""The files of an exported model, and how they are found and read; nothing of them is executed.

    my_model/
        hff.json                what the model is: task, base encoder, layers, adapters, classes
        trained.safetensors     the trained tensors, nothing else
        tokenizer/              units of a recogniser; or labels.json: {slot: [names]}
        lm.arpa                 n-grams of a recogniser that was trained with a language model
        encoder/                the base encoder, where it was packed or merged
        hyperparams.yaml        for SpeechBrain's interfaces (hff_modules.interfaces); not read here
        README.md               model card

:mod:`hff_modules.export` writes them, :mod:`hff_modules.exported` makes a model of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn

from hff_modules.ngram import LM_FILE

FORMAT = 1
MANIFEST, TENSORS = "hff.json", "trained.safetensors"
TOKENIZER, LABELS, PACKED = "tokenizer", "labels.json", "encoder"
FILES = [
    MANIFEST,
    TENSORS,
    LABELS,
    LM_FILE,
    f"{TOKENIZER}/*",
    f"{PACKED}/*.json",
    f"{PACKED}/*.safetensors",
]
TASKS = ("asr", "classification", "speaker")


class ExportError(ValueError):
    """An exported model that cannot be written, or used as asked; says what differs."""


def named_tensors(attached: Mapping[str, Any], **parts: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of adapters and other parts, by their names in ``trained.safetensors``.

    Arguments
    ---------
    attached : Mapping[str, Adapter]
        By the names that the manifest has.
    **parts : torch.nn.Module
        ``fusion`` and ``head``.
    """
    found = {
        f"adapters.{name}.{key}": tensor
        for name, adapter in attached.items()
        for key, tensor in adapter.tensors().items()
    }
    for part, module in parts.items():
        found.update({f"{part}.{key}": tensor for key, tensor in module.state_dict().items()})
    return found


def described_adapters(attached: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the manifest says of adapters: enough to attach them again."""
    return [
        {"name": name, "method": a.method, "layers": a.layers, "options": a.options}
        for name, a in attached.items()
    ]


def find_folder(source: str | Path, revision: str | None = None, **options) -> Path:
    """Give the folder of an exported model; from the hub only the files of the format are fetched.

    Arguments
    ---------
    source : str | Path
        Folder, or name on the Hugging Face hub.
    revision : str, optional
        On the hub.
    **options
        For ``huggingface_hub.snapshot_download``.
    """
    if Path(source).is_dir():
        return Path(source)
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ExportError(f"{source}: there is no such folder")
    try:
        found = huggingface_hub.snapshot_download(
            str(source), revision=revision, allow_patterns=FILES, **options
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"{source}: there is no such folder, and the hub does not give it ({reason})"
        ) from None
    return Path(found)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read ``hff.json``."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExportError(f"{path}: expected an exported model of format {FORMAT}")
    if manifest.get("task") not in TASKS:
        raise ExportError(
            f"{path}: task is {manifest.get('task')!r}, expected one of {', '.join(TASKS)}"
        )
    absent = {"encoder", "layers", "horizon", "adapters", "fusion", "head"} - manifest.keys()
    if absent:
        raise ExportError(f"{path} has no {', '.join(sorted(absent))}")
    return manifest


def read_json(path: Path, of: str = "a whole exported model") -> Any:
    """Read one of a folder's JSON files; without it, the folder is none ``of`` those."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path.parent} has no {path.name}: not {of}") from None
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}") from None


def describe_encoder(manifest: Mapping[str, Any]) -> str:
    """Say which encoder it is, for messages."""
    revision = f" revision {manifest['revision']}" if manifest["revision"] else ""
    return f"{manifest['source']}{revision} (weights {manifest['fingerprint']})"
