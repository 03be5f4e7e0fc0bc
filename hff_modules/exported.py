"""Exported models: encoder, fusion and head, ready to use.

Nothing of their folders (:mod:`hff_modules.export_format`) is executed: classes are chosen by name
from this package's fusions, heads and adapters, tensors are safetensors.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.logger import get_logger
from torch import nn

from hff_modules import adapters, fusion, heads
from hff_modules.alignment import best_path, words, written
from hff_modules.cache import as_stored
from hff_modules.checkpoint import CheckpointError, read_tensors
from hff_modules.data.text import Units, load_units
from hff_modules.encoder import SSLEncoder
from hff_modules.export_format import (
    LABELS,
    MANIFEST,
    PACKED,
    TENSORS,
    TOKENIZER,
    ExportError,
    describe_encoder,
    find_folder,
    named_tensors,
    read_json,
    read_manifest,
)
from hff_modules.ngram import LM_FILE, Fused, load_arpa

logger = get_logger(__name__)


def load_exported(
    source: str | Path,
    device: str = "cpu",
    encoder: SSLEncoder | None = None,
    name: str | None = None,
    base: str | None = None,
    revision: str | None = None,
) -> "Exported":
    """Load an exported model.

    Arguments
    ---------
    source : str | Path
        Folder, or name on the Hugging Face hub.
    device : str
        Where it is to run; with ``encoder``, that one's.
    encoder : SSLEncoder, optional
        An encoder to share with other models. Its weights must be those that the model was made on,
        and it must select the model's layers. The model's adapters are attached to it.
    name : str, optional
        For the model's adapters on the encoder; the names they were trained under by default.
    base : str, optional
        Another place of the base encoder than the model names: hub name or folder.
    revision : str, optional
        Of ``source`` on the hub.

    Returns
    -------
    Exported

    Raises
    ------
    ExportError
        Not an exported model, a damaged one, or one made on another encoder.

    Example
    -------
    >>> model = load_exported("my_model")                          # doctest: +SKIP
    >>> model(wavs, wav_lens)[0]["text"]                           # doctest: +SKIP
    'HELLO WORLD'
    """
    folder = find_folder(source, revision)
    manifest = read_manifest(folder)
    if encoder is not None:
        return Exported(folder, manifest, encoder, name, shared=True)
    return Exported(folder, manifest, base_encoder(folder, manifest, base, device), name).to(device)


class Exported(nn.Module):
    """An encoder with its adapters, a fusion and a head, as they were trained; evaluation only.

    Arguments
    ---------
    folder : Path
        Of the exported model.
    manifest : Mapping[str, Any]
        From its ``hff.json``.
    encoder : SSLEncoder
        With the weights that the model was made on.
    name : str, optional
        For the adapters.
    shared : bool
        Whether others use the encoder as well.

    Attributes
    ----------
    manifest : dict
    task : str
        "asr", "classification" or "speaker".
    layers : list[int]
        The states that the fusion reads.
    horizon : int
        The highest state that this model shares with the plain encoder.
    adapters : list[str]
        Names of its adapters on the encoder.
    encoder, fusion, head : nn.Module
    units : CharUnits | SentencePieceUnits
        Of a recogniser.
    labels : dict[str, list[str]]
        Of a classifier, for each slot.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        encoder: SSLEncoder,
        name: str | None = None,
        shared: bool = False,
    ):
        super().__init__()
        self.folder, self.manifest = folder, dict(manifest)
        self.task, self.layers = manifest["task"], list(manifest["layers"])
        self.horizon, self.stored_as = manifest["horizon"], manifest.get("stored_as")
        self._check(encoder)
        self.encoder = encoder
        before = set(encoder.adapters)
        try:
            self._build(name, shared)
        except BaseException:  # others may use the encoder
            with only(encoder, []):
                for own in set(encoder.adapters) - before:
                    adapters.remove(encoder, own)
            raise
        self.fusion.requires_grad_(False)
        self.head.requires_grad_(False)
        self.eval()

    def _build(self, name: str | None, shared: bool) -> None:
        encoder = self.encoder
        with only(encoder, []), torch.random.fork_rng(devices=[]):  # drawn here, read from the file
            try:
                self.fusion = build(fusion, fusion.Fusion, self.manifest["fusion"])
                self.head = build(heads, nn.Module, self.manifest["head"])
                self.adapters = self._attach(name)
            except (TypeError, ValueError, KeyError) as error:
                reason = f"{self.folder / MANIFEST} does not describe a model: {error}"
                raise ExportError(reason) from None
            self._load()
            for own in self.adapters if shared else []:
                # What changes the encoder's own weights is on only while this model is called.
                if not encoder.adapters[own].switched_by_row:
                    encoder.adapters[own].set_enabled(False)
        self.fusion.to(self.device)
        self.head.to(self.device)
        if self.task == "asr":
            self.units = self._units()
            self._written = written(self.units)
        elif self.task == "classification":
            self.labels = read_json(self.folder / LABELS)
            if not isinstance(self.labels, dict):
                raise ExportError(f"{self.folder / LABELS}: expected classes by slot")
            here = {slot: len(names) for slot, names in self.labels.items()}
            self._check_outputs("slots", here, self.folder / LABELS)

    def _units(self) -> Units:
        folder = self.folder / TOKENIZER
        try:
            units = load_units(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ExportError(f"{folder} holds no units that can be read: {error}") from None
        self._check_outputs("num_units", units.size, folder)
        return units

    def _check_outputs(self, key: str, here: Any, path: Path) -> None:
        expected = self.manifest["head"]["arguments"].get(key, here)
        if here != expected:
            raise ExportError(f"{path} has {key} {here}, the head {expected}: of another model?")

    def _check(self, encoder: SSLEncoder) -> None:
        made_on, top = self.manifest["encoder"], max(self.layers)
        here = {**encoder.manifest(), "fingerprint": encoder.fingerprint_up_to(top)}
        if here["fingerprint"] != made_on["fingerprint"]:
            raise ExportError(
                f"{self.folder} was made on the encoder {describe_encoder(made_on)}; "
                f"this is {describe_encoder(here)}"
            )
        if not set(self.layers) <= set(encoder.layers):
            raise ExportError(
                f"{self.folder} reads the layers {self.layers}; the encoder to share gives "
                f"{encoder.layers}"
            )

    def _attach(self, name: str | None) -> list[str]:
        described, self._saved_as = self.manifest["adapters"], {}
        for adapter in described:
            own = name or adapter["name"]
            own = f"{own}-{adapter['method']}" if name and len(described) > 1 else own
            kind = adapters.METHODS[adapter["method"]][0]
            chosen = {"layers": adapter["layers"]} if kind.in_layers else {}
            adapters.attach(self.encoder, adapter["method"], own, **adapter["options"], **chosen)
            self._saved_as[own] = adapter["name"]
        return list(self._saved_as)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.encoder.device

    def tensors(self) -> dict[str, torch.Tensor]:
        """Give the live tensors of adapters, fusion and head, by their names in the file."""
        attached = {self._saved_as[name]: self.encoder.adapters[name] for name in self.adapters}
        return named_tensors(attached, fusion=self.fusion, head=self.head)

    def _load(self) -> None:
        path = self.folder / TENSORS
        if not path.is_file():
            raise ExportError(f"{self.folder} has no {TENSORS}: not a whole exported model")
        try:
            given, _ = read_tensors(path)
        except CheckpointError as error:
            raise ExportError(str(error)) from None
        expected = {key: tuple(tensor.shape) for key, tensor in self.tensors().items()}
        there = {key: tuple(tensor.shape) for key, tensor in given.items()}
        if expected != there:
            keys = expected.keys() | there.keys()
            key = min(k for k in keys if expected.get(k) != there.get(k))
            raise ExportError(
                f"{path}: {key} is {there.get(key)}, expected {expected.get(key)} by {MANIFEST}"
            )
        with torch.no_grad():
            for name in self.adapters:
                prefix = f"adapters.{self._saved_as[name]}."
                own = {k.removeprefix(prefix): t for k, t in given.items() if k.startswith(prefix)}
                self.encoder.adapters[name].load_tensors(own)
            for part in ("fusion", "head"):
                own = {k.removeprefix(f"{part}."): t for k, t in given.items()}
                module = getattr(self, part)
                module.load_state_dict({key: own[key] for key in module.state_dict()})

    def search_with_lm(self, beam_size: int | None = None) -> Fused:
        """Give the beam search with the language model of a recogniser's training.

        Arguments
        ---------
        beam_size : int, optional
            By default the one that the model's weights were chosen with.

        Raises
        ------
        ExportError
            It was trained without one, or with one that made dev worse; or the file is damaged.
        """
        chosen, path = self.manifest.get("lm"), self.folder / LM_FILE
        if chosen is None:
            raise ExportError(
                f"{self.folder} has no language model: it was trained without one (--lm char), or "
                "dev was recognised better without it"
            )
        try:
            lm = load_arpa(path)
        except FileNotFoundError:
            raise ExportError(
                f"{self.folder} has no {LM_FILE}: not a whole exported model"
            ) from None
        except ValueError as error:
            raise ExportError(str(error)) from None
        weights = {key: chosen[key] for key in ("alpha", "beta")}
        size = beam_size or chosen["beam"]
        return Fused(lm, chosen["kind"], self.units, beam_size=size, **weights)

    # From waveforms to results

    @torch.no_grad()
    def states(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give this model's own states: by its own adapters, rounded as they were in training.

        Arguments
        ---------
        wavs : torch.Tensor
            (batch, samples), 16 kHz, -1 to 1.
        wav_lens : torch.Tensor, optional
            (batch,), valid share of each row; all valid by default.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            States (num_states, batch, frames, width) and valid frames (batch,).
        """
        encoder = self.encoder
        with only(encoder, self.adapters):
            for name in self.adapters:  # frozen by others, they would move the horizon to the top
                for parameter in encoder.adapters[name].trained():
                    parameter.requires_grad_(True)
            if self.stored_as is None:
                states, lengths = encoder(wavs, wav_lens)
            else:
                stored, lengths = encoder.encode(wavs, wav_lens)
                stored = as_stored(stored, self.stored_as)
                states, lengths = encoder(stored, lengths / stored.shape[1])
        return self.select(states), lengths

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """Give this model's states out of all that its encoder selects (num_states, ...)."""
        if self.encoder.layers == self.layers:
            return states
        return states[[self.encoder.layers.index(number) for number in self.layers]]

    @torch.no_grad()
    def features(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Fuse this model's own states (num_states, batch, frames, width) to (batch, frames, d)."""
        if self.stored_as is not None:
            below = [i for i, number in enumerate(self.layers) if number <= self.horizon]
            states = states.clone()
            states[below] = as_stored(states[below], self.stored_as)
        return self.fusion(states, lengths)

    @torch.no_grad()
    def outputs(
        self, states: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Give what the head says.

        Arguments
        ---------
        states : torch.Tensor
            This model's own, (num_states, batch, frames, width).
        lengths : torch.Tensor
            (batch,), valid frames.

        Returns
        -------
        torch.Tensor | dict[str, torch.Tensor]
            asr: log probabilities (batch, frames, units). classification: logits (batch, classes)
            by slot. speaker: embeddings (batch, embedding_size).
        """
        given = self.head(self.features(states, lengths), lengths)
        return given.float().log_softmax(-1) if self.task == "asr" else given

    def finish(
        self, outputs: torch.Tensor | Mapping[str, torch.Tensor], lengths: torch.Tensor
    ) -> list[Any]:
        """Turn what the head says into results, one for each utterance.

        Arguments
        ---------
        outputs : torch.Tensor | Mapping[str, torch.Tensor]
            From :meth:`outputs`.
        lengths : torch.Tensor
            (batch,), valid frames.

        Returns
        -------
        list
            asr: ``{"text": str, "words": [{"word", "start", "end"}]}``, in seconds, by the best
            path. classification: ``{slot: {"label", "probability"}}``. speaker: a list of floats.
        """
        if self.task == "asr":
            best = outputs.argmax(-1).tolist()
            return [
                self._recognised(row[:n]) for row, n in zip(best, lengths.tolist(), strict=True)
            ]
        if self.task == "speaker":
            return outputs.tolist()
        chosen = {slot: logits.softmax(-1).max(-1) for slot, logits in outputs.items()}
        return [
            {
                slot: {"label": self.labels[slot][int(best)], "probability": float(probability)}
                for slot, (probability, best) in (
                    (slot, (found.values[row], found.indices[row]))
                    for slot, found in chosen.items()
                )
            }
            for row in range(len(lengths))
        ]

    def _recognised(self, labels: list[int]) -> dict[str, Any]:
        seconds = 1 / self.encoder.frame_rate
        found = words(best_path(labels, self.units.blank_index), self._written)
        return {
            "text": " ".join(word.text for word in found),
            "words": [
                {
                    "word": word.text,
                    "start": round(word.start * seconds, 3),
                    "end": round(word.end * seconds, 3),
                }
                for word in found
            ],
        }

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None) -> list[Any]:
        """From waveforms (batch, samples) to :meth:`finish`'s results."""
        states, lengths = self.states(wavs, wav_lens)
        return self.finish(self.outputs(states, lengths), lengths)


def build(module: Any, kind: type, described: Mapping[str, Any]) -> nn.Module:
    """Make one of this package's fusions or heads.

    Arguments
    ---------
    module : module
        Whose classes may be chosen; no others.
    kind : type
        What the class must be.
    described : Mapping[str, Any]
        ``class`` and ``arguments``.
    """
    found = getattr(module, str(described["class"]), None)
    allowed = isinstance(found, type) and issubclass(found, kind)
    if not allowed or found.__module__ != module.__name__:
        raise ExportError(f"{described['class']!r} is no class of {module.__name__}")
    return found(**described["arguments"])


@contextlib.contextmanager
def only(encoder: SSLEncoder, names: Iterable[str]) -> Iterator[None]:
    """Within, the adapters of these names are switched on and all others are off."""
    before = {name: adapter.enabled for name, adapter in encoder.adapters.items()}
    names = set(names)
    _switch(encoder, {name: name in names for name in before})
    try:
        yield
    finally:
        _switch(encoder, {name: on for name, on in before.items() if name in encoder.adapters})


def _switch(encoder: SSLEncoder, wanted: Mapping[str, bool]) -> None:
    # Off first: two that change the same weights must not both be on.
    for name, on in sorted(wanted.items(), key=lambda item: item[1]):
        if encoder.adapters[name].enabled != on:
            encoder.adapters[name].set_enabled(on)


def base_encoder(
    folder: Path, manifest: Mapping[str, Any], base: str | None, device: str | torch.device = "cpu"
) -> SSLEncoder:
    """Load the encoder that an export was made on, without its adapters, with its layers.

    Arguments
    ---------
    folder : Path
        The export's, for a packed encoder and for messages.
    manifest : Mapping[str, Any]
        Its ``hff.json``; the encoder selects the manifest's ``layers``.
    base : str, optional
        Where the encoder lies now; by default where the manifest says.
    device : str | torch.device
        Where it is to run: on a CPU, an encoder of fp16 runs in fp32, which is many times faster.

    Raises
    ------
    ExportError
        It cannot be loaded from there.
    """
    made_on, precision = manifest["encoder"], manifest["encoder"]["precision"]
    if precision == "fp16" and torch.device(device).type == "cpu":
        logger.info(f"{folder}: the encoder runs in fp32, as a CPU hardly computes in fp16")
        precision = "fp32"
    revision = made_on["revision"] if base is None else None
    if base is None and made_on.get("packed"):
        base, revision = str(folder / PACKED), None
    try:
        return SSLEncoder(
            base or made_on["source"],
            layers=manifest["layers"],
            precision=precision,
            pretrained=made_on["pretrained"],
            revision=revision,
            seed=made_on.get("seed", 0),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"{folder} was made on the encoder {describe_encoder(made_on)}, which cannot be loaded "
            f"({reason}); give its place with --encoder (in Python: base=), or export again with "
            "--pack"
        ) from None
