"""From a run's folder to a model to share: card, settings, tokenizer and the trained tensors alone.

    python -m hff_modules.export results/spoken/fusion/1986 my_model/
    python -m hff_modules.export results/... my_model/ --license cc-by-4.0 --push me/my_model

:mod:`hff_modules.export_format` describes the folder. The base encoder is named by hub name and
revision; ``--pack`` puts it beside, ``--merge`` folds LoRA, or parameters of the encoder's own that
were trained, into it: ``my_model/encoder`` is then a plain Hugging Face folder.
"""

import argparse
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import ruamel.yaml
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from hyperpyyaml import load_hyperpyyaml, resolve_references
from torch import nn
from transformers.utils import cached_file

from hff_modules import adapters, fusion, heads
from hff_modules.adapters.tuning import Tuning
from hff_modules.checkpoint import MANIFEST as CHECKPOINT
from hff_modules.checkpoint import (
    Trained,
    TrainedCheckpointer,
    differences,
    read_tensors,
    write_tensors,
)
from hff_modules.cli import run
from hff_modules.data.text import load_units
from hff_modules.encoder import SSLEncoder
from hff_modules.export_format import (
    FORMAT,
    LABELS,
    MANIFEST,
    PACKED,
    TENSORS,
    TOKENIZER,
    ExportError,
    describe_encoder,
    described_adapters,
    named_tensors,
    read_json,
)
from hff_modules.export_texts import COUNTS, card, hyperparams
from hff_modules.exported import build
from hff_modules.files import parse_yaml, read_text, write_atomically
from hff_modules.ngram import LM_FILE
from hff_modules.source import BUILTIN, PREPROCESSORS, pretrained_model

CARD = "README.md"
RUN = "a finished run"
RESULTS = ("test", "dev", "epochs", "seed")


def export(
    run_folder: str | Path,
    folder: str | Path,
    pack: bool = False,
    merge: bool = False,
    force: bool = False,
    base: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an exported model.

    Arguments
    ---------
    run_folder : str | Path
        What a finished run left: ``results.json``, ``config.yaml``, ``save/CKPT+...``, and
        ``units`` or ``labels.json``.
    folder : str | Path
        To write; must not be there, or be empty.
    pack : bool
        Put the base encoder into the folder.
    merge : bool
        Fold the adapters into the base encoder and put that into the folder.
    force : bool
        Replace an exported model that is there.
    base : str, optional
        Another place of the base encoder than the run had: hub name or folder.
    about : Mapping[str, Any], optional
        For the card: ``license``, ``language``, ``dataset``, ``data_license``.

    Returns
    -------
    dict[str, Any]
        As in ``hff.json``.

    Raises
    ------
    ExportError
        The run is not whole, or is of a kind that cannot be written so.
    """
    run_folder, folder = Path(run_folder), Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()) and not (force and (folder / MANIFEST).is_file()):
        hint = "--force replaces it" if (folder / MANIFEST).is_file() else "give another folder"
        raise ExportError(f"{folder} is there already and is not empty; {hint}")
    trained = TrainedRun(run_folder, base)
    manifest = trained.manifest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    before = partial.with_name(f"{partial.name}.before")
    try:
        partial.chmod(0o755)
        tensors = trained.tensors()
        if merge:
            tensors = {k: t for k, t in tensors.items() if not k.startswith("adapters.")}
            manifest |= trained.merge(partial / PACKED)
        elif pack:
            pack_encoder(trained.encoder, partial / PACKED)
            manifest["encoder"]["packed"] = True
        write_tensors(partial / TENSORS, tensors)
        if manifest["task"] == "asr":
            trained.units.save(partial / TOKENIZER)
            if "lm" in manifest:
                trained.copy_language_model(partial / LM_FILE)
        elif manifest["task"] == "classification":
            write_atomically(partial / LABELS, _json(trained.labels))
        for name, text in {**hyperparams(manifest), CARD: card(manifest, about or {})}.items():
            write_atomically(partial / name, text)
        if manifest["encoder"]["packed"] and Path(manifest["encoder"]["source"]).is_absolute():
            # Nobody looks for it there any more, and a path tells names.
            manifest["encoder"]["source"] = Path(manifest["encoder"]["source"]).name
        write_atomically(partial / MANIFEST, _json(manifest))
        if folder.exists():
            os.replace(folder, before)
        os.replace(partial, folder)
    except BaseException:
        if before.exists() and not folder.exists():
            os.replace(before, folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)
    return manifest


class TrainedRun:
    """What a finished run left, put together again: encoder with adapters, fusion and head.

    Arguments
    ---------
    folder : Path
        The run's.
    base : str, optional
        Another place of the base encoder.
    """

    def __init__(self, folder: Path, base: str | None = None):
        self.folder = folder
        self.results = read_json(folder / "results.json", RUN)
        self.task = self.results.get("task", "asr")
        self.config = read_config(folder / "config.yaml")
        checkpoint = self._best()
        saved = read_json(checkpoint / CHECKPOINT, RUN)
        self.encoder = self._encoder(saved["encoder"], base)
        for method, options in (self.config["adapters"] or {}).items():
            adapters.attach(self.encoder, method, **options)
        if self.task == "asr":
            self.units = load_units(folder / "units")
        elif self.task == "classification":
            self.labels = read_json(folder / LABELS, RUN)
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten below
            states = {"num_states": len(self.encoder.layers)}
            self.fusion_described, self.fusion = _made(
                fusion,
                fusion.Fusion,
                self.config["fusion"],
                {**states, "input_size": self.encoder.hidden_size},
            )
            self.head_described, self.head = _made(
                heads,
                nn.Module,
                self.config["head"],
                {"input_size": self.fusion.output_size, **self._outputs()},
            )
        self._load(checkpoint, saved)

    def _best(self) -> Path:
        save, chosen_by = self.folder / "save", self.config["select_by"]
        if not save.is_dir():
            raise ExportError(f"{save} is missing: the run has no checkpoint")
        found = TrainedCheckpointer(save).find_checkpoint(min_key=chosen_by)
        if found is None:
            raise ExportError(f"{save} has no checkpoint with a score {chosen_by!r}")
        return found.path

    def _encoder(self, made_on: Mapping[str, Any], base: str | None) -> SSLEncoder:
        encoder = SSLEncoder(
            base or made_on["source"],
            layers=made_on["layers"],
            precision=self.config["encoder_precision"],
            pretrained=made_on["pretrained"],
            revision=made_on["revision"] if base is None else None,
            seed=self.config["seed"],
        )
        here = encoder.manifest()
        if here["fingerprint"] != made_on["fingerprint"]:
            raise ExportError(
                f"{self.folder} was trained on the encoder {describe_encoder(made_on)}; "
                f"this is {describe_encoder(here)}"
            )
        return encoder

    def _outputs(self) -> dict[str, Any]:
        if self.task == "asr":
            return {"num_units": self.units.size}
        if self.task == "classification":
            return {"slots": {slot: len(names) for slot, names in self.labels.items()}}
        return {}

    def _load(self, checkpoint: Path, saved: Mapping[str, Any]) -> None:
        parts = {"encoder": self.encoder, "fusion": self.fusion, "head": self.head}
        trained = Trained(parts, {"horizon": self.encoder.horizon})
        # A speaker's classifier, say, is of use in training only.
        shapes = {k: s for k, s in saved["tensors"].items() if k.split(".")[0] in parts}
        found = differences({"horizon": saved["horizon"], "tensors": shapes}, trained.manifest)
        if found:
            raise ExportError(f"{checkpoint} does not fit {self.folder}'s settings: {found[0]}")
        tensors, _ = read_tensors(checkpoint / TENSORS)
        in_adapters = sum(len(a.tensors()) for a in self.encoder.adapters.values())
        in_encoder = [name for name in shapes if name.startswith("encoder.")]
        if in_adapters != len(in_encoder):
            raise ExportError(
                f"{checkpoint}: {len(in_encoder)} tensors of the encoder were trained, and its "
                f"adapters have {in_adapters}"
            )
        with torch.no_grad():
            for name, tensor in trained.tensors().items():
                tensor.copy_(tensors[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Give everything that was trained and is of use, by its name in an exported model."""
        return named_tensors(self.encoder.adapters, fusion=self.fusion, head=self.head)

    def manifest(self) -> dict[str, Any]:
        """Give what ``hff.json`` holds."""
        encoder, config = self.encoder, self.config
        source = str(Path(encoder.source).resolve()) if _is_local(encoder) else encoder.source
        cached = config["cache"] is not None and encoder.stored_layers
        manifest = {
            "format": FORMAT,
            "task": self.task,
            "method": self.results["method"],
            "encoder": {
                **encoder.manifest(),
                "source": source,
                "precision": encoder.precision,
                "seed": config["seed"],
                "packed": False,
            },
            "layers": encoder.layers,
            "horizon": encoder.horizon,
            "stored_as": config["cache_dtype"] if cached else None,
            "adapters": described_adapters(encoder.adapters),
            "fusion": self.fusion_described,
            "head": self.head_described,
            "dataset": config["dataset"],
            "results": {k: self.results[k] for k in (*COUNTS, *RESULTS) if k in self.results},
            "versions": self.results.get("versions", {}),
        }
        if self.task == "asr":
            manifest["units"] = self.units.kind
            lm = self.results.get("lm")
            if lm and lm["alpha"]:  # else the search was better without it
                manifest["lm"] = {
                    key: lm[key] for key in ("kind", "order", "alpha", "beta", "beam")
                }
        del manifest["encoder"]["layers"]
        return manifest

    def copy_language_model(self, path: Path) -> None:
        """Copy the language model whose weights the run chose."""
        if not (self.folder / LM_FILE).is_file():
            raise ExportError(
                f"{self.folder} has no {LM_FILE}, though its results.json names a language model; "
                "the same training command with --test_only writes it"
            )
        shutil.copyfile(self.folder / LM_FILE, path)

    def merge(self, folder: Path) -> dict[str, Any]:
        """Fold the adapters into the base encoder, write that; gives what changes in ``hff.json``.

        Raises
        ------
        ExportError
            A method that cannot be folded in, or nothing to fold.
        """
        encoder = self.encoder
        # What was trained ran in single precision; what is merged would not.
        precision = encoder.precision if encoder.horizon >= encoder.top else "fp32"
        if not encoder.adapters:
            raise ExportError("--merge: this run has no adapters to fold into the encoder")
        for name, adapter in encoder.adapters.items():
            if isinstance(adapter, Tuning):  # its values are the encoder's own already
                continue
            if not adapter.merges:
                raise ExportError(f"--merge: {name} ({adapter.method}) cannot be folded in")
            adapter.merge()
        whole = pretrained_model(_place(encoder), encoder.revision)
        inside = whole.encoder if encoder.model.config.model_type == "whisper" else whole
        state = inside.state_dict()
        with torch.no_grad():
            for name, tensor in encoder.model.state_dict().items():
                state[name].copy_(tensor)
        whole.save_pretrained(folder)
        for path in _files(encoder, *PREPROCESSORS):
            shutil.copyfile(path, folder / path.name)
        plain = SSLEncoder(str(folder), layers=encoder.layers, precision=precision)
        before = self.manifest()["encoder"]
        made_on = {**plain.manifest(), "source": before["source"], "revision": before["revision"]}
        del made_on["layers"]
        more = {"precision": precision, "packed": True, "merged": list(encoder.adapters)}
        return {
            "encoder": made_on | more,
            "horizon": encoder.top,
            "adapters": [],
            "stored_as": None,
        }


def read_config(path: Path) -> dict[str, Any]:
    """Read from a run's ``config.yaml`` what an export needs; loggers and the like are not made."""
    if not path.is_file():
        raise ExportError(f"{path} is missing: the run is of an older version or did not start")
    text = read_text(path)
    parse_yaml(text, path)  # which names the file if it is damaged
    tree = parse_yaml(resolve_references(text), path)
    keys = ("dataset", "encoder_precision", "seed", "adapters", "fusion", "head", "select_by")
    keys += ("cache", "cache_dtype")
    absent = {"encoder_precision", "adapters", "fusion", "head", "select_by"} - tree.keys()
    if absent:
        raise ExportError(f"{path} has no {', '.join(sorted(absent))}; is it whole?")
    wanted = ruamel.yaml.CommentedMap({key: tree[key] for key in keys if key in tree})
    stream = io.StringIO()
    ruamel.yaml.YAML().dump(wanted, stream)
    return load_hyperpyyaml(stream.getvalue())


def _made(module: Any, kind: type, chosen: Any, sizes: Mapping[str, Any]):
    """From what the settings name (a class, perhaps with arguments) to a description and it."""
    found, arguments = getattr(chosen, "func", chosen), getattr(chosen, "keywords", {})
    if getattr(found, "__module__", None) != module.__name__:
        raise ExportError(
            f"{found!r} is not of {module.__name__}: only this package's own classes are exported"
        )
    described = {"class": found.__name__, "arguments": {**sizes, **arguments}}
    try:
        described = json.loads(json.dumps(described))
    except TypeError as error:
        raise ExportError(
            f"{found.__name__} has arguments that JSON cannot hold: {error}"
        ) from None
    return described, build(module, kind, described)


def _is_local(encoder: SSLEncoder) -> bool:
    return Path(encoder.source).is_dir() and encoder.source not in ("builtin", "logmel")


def _place(encoder: SSLEncoder) -> str:
    return str(BUILTIN) if encoder.source == "builtin" else encoder.source


def _files(encoder: SSLEncoder, *names: str) -> list[Path]:
    """Those of these files that the encoder has, patterns for a folder included."""
    place = Path(_place(encoder))
    if place.is_dir():
        return sorted(path for name in names for path in place.glob(name))
    found = [
        cached_file(
            str(place),
            name,
            revision=encoder.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        for name in names
    ]
    return [Path(path) for path in found if path]


def pack_encoder(encoder: SSLEncoder, folder: Path) -> None:
    """Copy the files of a base encoder into a folder."""
    if encoder.source == "logmel" or encoder.untrained:
        raise ExportError(f"--pack: the encoder {encoder.source!r} has no trained weights to pack")
    files = _files(encoder, "config.json", *PREPROCESSORS)
    weights = _files(encoder, "*.safetensors", "*.safetensors.index.json")
    if not weights:  # on the hub, where there are no patterns
        weights = _files(encoder, "model.safetensors")
    if not weights:
        shards = _files(encoder, "model.safetensors.index.json")
        names = {n for path in shards for n in read_json(path)["weight_map"].values()}
        weights = [*shards, *_files(encoder, *sorted(names))]
    folder.mkdir(parents=True)
    if not weights:  # safetensors of Hugging Face's converter, which lie elsewhere
        pretrained_model(_place(encoder), encoder.revision).save_pretrained(folder)
    for path in [*files, *weights]:
        shutil.copyfile(path, folder / path.name)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def push(folder: str | Path, name: str, private: bool = False) -> str:
    """Upload an exported model to the Hugging Face hub.

    Arguments
    ---------
    folder : str | Path
        Exported model.
    name : str
        ``user/name``; made if it is not there.
    private : bool
        Where it is made.

    Returns
    -------
    str
        Its address.
    """
    encoder = read_json(Path(folder) / MANIFEST)["encoder"]
    if Path(encoder["source"]).is_absolute() and not encoder["packed"]:
        raise ExportError(
            f"{folder} was made on the encoder in {encoder['source']}, which others do not have; "
            "export it with --pack"
        )
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(name, private=private, exist_ok=True)
        return str(hub.upload_folder(folder_path=str(folder), repo_id=name))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"{name}: the hub did not take {folder} ({reason})") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m hff_modules.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("folder", help="to write")
    parser.add_argument("--pack", action="store_true", help="put the base encoder beside")
    parser.add_argument("--merge", action="store_true", help="fold the adapters into the encoder")
    parser.add_argument("--force", action="store_true", help="replace an exported model")
    parser.add_argument("--encoder", help="another place of the base encoder")
    parser.add_argument("--push", metavar="USER/NAME", help="upload to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="where --push makes the model")
    for field, meaning in (
        ("license", "of this model, such as cc-by-4.0"),
        ("language", "such as en"),
        ("dataset", "what it was trained on; the run's name for it by default"),
        ("data-license", "of the training data"),
    ):
        parser.add_argument(f"--{field}", help=f"for the card: {meaning}")
    options = parser.parse_args(argv)
    about = {k: getattr(options, k) for k in ("license", "language", "dataset", "data_license")}
    export(
        options.run,
        options.folder,
        pack=options.pack,
        merge=options.merge,
        force=options.force,
        base=options.encoder,
        about=about,
    )
    size = sum(path.stat().st_size for path in Path(options.folder).rglob("*") if path.is_file())
    print(f"{options.folder}: {size / 1e6:.2f} MB")
    if options.push:
        print(push(options.folder, options.push, options.private))


if __name__ == "__main__":
    run(main)
