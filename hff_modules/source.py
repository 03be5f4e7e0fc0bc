"""From a hub name or a folder to an encoder; only safetensors and JSON are loaded."""

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as hf_logging
from transformers.utils.hub import extract_commit_hash

from hff_modules.families import FAMILIES, Family, LogMelFamily

BUILTIN = Path(__file__).parent / "pretrained" / "conformer-small"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


def commit_of(source: str, revision: str | None) -> str | None:
    """The commit that a hub name and a revision mean now; None for what is in a folder."""
    if source in ("builtin", "logmel") or Path(source).is_dir() or not _on_hub(source):
        return None
    return extract_commit_hash(cached_file(source, "config.json", revision=revision), None)


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def load_family(source: str, pretrained: bool, revision: str | None, seed: int) -> Family:
    """Load an encoder; arguments as in :class:`hff_modules.SSLEncoder`.

    Raises
    ------
    FileNotFoundError
        No such folder, or no ``config.json`` or ``*.safetensors`` in it.
    ValueError
        An unknown family, or weights that lack tensors.
    """
    if source == "logmel":
        return LogMelFamily()
    name = str(BUILTIN) if source == "builtin" else str(source)
    if Path(name).is_dir():
        config = _read_json(Path(name) / "config.json")
        model_type = config.get("model_type")
    elif not _on_hub(name):
        raise FileNotFoundError(f"encoder {name!r}: there is no such folder")
    else:
        model_type = AutoConfig.from_pretrained(name, revision=revision).model_type
    if model_type not in FAMILIES:
        raise ValueError(
            f"encoder {name!r} is of the family {model_type!r}; "
            f"known families: {', '.join(sorted(FAMILIES))}"
        )
    model = pretrained_model(name, revision) if pretrained else _random(name, revision, seed)
    model = model.encoder if model_type == "whisper" else model
    return FAMILIES[model_type](model, _preprocessor(name, revision))


def pretrained_model(name: str, revision: str | None) -> nn.Module:
    """Hugging Face's model of a folder or hub name, in single precision.

    Raises
    ------
    OSError
        No such model, or none as safetensors.
    ValueError
        Its weights lack tensors.
    """
    if Path(name).is_dir() and not list(Path(name).glob("*.safetensors")):
        raise FileNotFoundError(
            f"encoder folder {name!r} has no *.safetensors file; weights in other formats are not "
            "read, as opening them can execute code"
        )
    safe = Path(name).is_dir() or any(
        _cached(name, file, revision) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    try:
        with _quiet():
            model, loading = AutoModel.from_pretrained(
                name,
                # Of other weights, Hugging Face's converter has a branch with safetensors, which
                # transformers looks for beside "main" alone.
                revision=revision if safe else "main",
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except OSError as error:
        if safe:
            raise
        raise FileNotFoundError(
            f"encoder {name!r} has no safetensors, nor could Hugging Face's converter make them "
            f"({str(error).splitlines()[0]}). If you trust its authors: AutoModel.from_pretrained("
            f"{name!r}).save_pretrained('folder'), its preprocessor_config.json beside it, "
            "--encoder folder"
        ) from None
    missing = [key for key in loading["missing_keys"] if not key.endswith("masked_spec_embed")]
    if missing:
        raise ValueError(
            f"encoder {name!r}: its weights lack {len(missing)} tensors that its config.json asks "
            f"for, such as {sorted(missing)[0]!r}"
        )
    return model


@contextlib.contextmanager
def _quiet():
    """No progress bar and no report on unused heads; what matters is checked right after."""
    bars, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _random(name: str, revision: str | None, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModel.from_config(AutoConfig.from_pretrained(name, revision=revision)).float()


def _preprocessor(name: str, revision: str | None) -> dict:
    # A processor that transformers 5 saved has the settings of its feature extractor inside.
    plain, nested = PREPROCESSORS
    found = _optional(name, plain, revision)
    if found is None:
        found = (_optional(name, nested, revision) or {}).get("feature_extractor", {})
    return found


def _optional(name: str, file: str, revision: str | None) -> dict | None:
    path = Path(name) / file
    if not Path(name).is_dir():
        found = _cached(name, file, revision)
        if found is None and try_to_load_from_cache(name, file, revision=revision) is None:
            # Without it audio would be normalised by defaults, and states would be others.
            raise OSError(f"{name}: {file} is not in the cache, and the hub cannot be asked for it")
        path = Path(found) if found else path
    return _read_json(path) if path.is_file() else None


def _cached(name: str, file: str, revision: str | None) -> str | None:
    """A file of a hub repository; None where that has no such file."""
    return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: this is no encoder folder") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def fingerprints(family: Family) -> list[str]:
    """Hash of everything outside the layers, then one of each layer."""
    in_layers = {id(tensor) for tensor in family.layers.state_dict(keep_vars=True).values()}
    outside = {
        name: tensor
        for name, tensor in family.model.state_dict(keep_vars=True).items()
        if id(tensor) not in in_layers and tensor is not None
    }
    # Above the layers, so the last layer's business; nothing is left of it where that is cut off.
    norm = family.final_norm.state_dict(keep_vars=True) if family.final_norm is not None else {}
    outside = {n: t for n, t in outside.items() if not any(t is own for own in norm.values())}
    settings = json.dumps([family.preprocessor, family.settings], sort_keys=True)
    hashes = [hash_tensors(outside, settings)]
    hashes += [hash_tensors(layer.state_dict()) for layer in family.layers]
    if norm:
        hashes[-1] = hash_tensors(norm, hashes[-1])
    return hashes


def hash_tensors(tensors: dict[str, torch.Tensor], text: str = "") -> str:
    """SHA-256 of names, shapes, types and values, after ``text``."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
