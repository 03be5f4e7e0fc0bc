"""A pretrained speech encoder, cut to what is needed, that gives the states of selected layers.

The horizon is the idea that everything hangs on: the highest layer at and below which nothing is
trained. It follows from ``requires_grad``; nobody sets it. Below it there is no graph, no dropout
and no LayerDrop, in training as in evaluation.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hff_modules.adapters.base import join_frames, select_rows
from hff_modules.families import KeyValueHook, LayerParts
from hff_modules.layers import LayerSpec, parse_layers
from hff_modules.source import commit_of, fingerprints, hash_tensors, load_family

_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class SSLEncoder(nn.Module):
    """Selected hidden states of a frozen self-supervised encoder.

    State ``k`` is the output of layer ``k``; state 0 is what enters layer 1; the last one is
    Hugging Face's ``last_hidden_state``. Layers above the highest selected one are neither run nor
    kept. An utterance gives the same states alone as in any padded batch.

    Families: wav2vec 2.0 / XLS-R / MMS, HuBERT, WavLM, data2vec-audio, UniSpeech-SAT,
    wav2vec2-conformer, w2v-BERT 2.0, Whisper (encoder).

    Arguments
    ---------
    source : str
        Hub name, local folder (``config.json``, ``model.safetensors`` and, if there is one,
        ``preprocessor_config.json``), ``"builtin"`` for the encoder shipped with this package, or
        ``"logmel"`` for no encoder at all: state 0 is a stack of log-mels, the baseline to beat.
    layers : str | int | Sequence[int]
        Which states to give, see :func:`hff_modules.layers.parse_layers`. 0 may be among them.
    precision : str
        "fp32", "bf16" or "fp16": arithmetic below the horizon. States come out as fp32.
    pretrained : bool
        False draws the weights at random (from ``seed``) for the same architecture.
    revision : str, optional
        Hub revision; the newest one by default.
    seed : int
        For random weights.

    Example
    -------
    >>> encoder = SSLEncoder("builtin", layers=[3, 6, 9])
    >>> states, lengths = encoder(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> len(states), lengths.tolist(), encoder.horizon
    (3, [24, 12], 9)
    """

    def __init__(
        self,
        source: str = "builtin",
        layers: LayerSpec = "all",
        precision: str = "fp32",
        pretrained: bool = True,
        revision: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if precision not in _PRECISIONS:
            raise ValueError(f"precision={precision!r}: expected one of {', '.join(_PRECISIONS)}")
        self.source, self.precision = source, precision
        self.untrained = not pretrained
        self.revision = commit_of(source, revision)
        family = load_family(source, pretrained, self.revision or revision, seed)
        self.num_layers = len(family.layers)
        self.layers = parse_layers(layers, self.num_layers)
        self.top = self.layers[-1]
        self.hidden_size = family.hidden_size
        family.truncate(self.top)
        family.model.requires_grad_(False)
        self.model = family.model
        self.adapters = nn.ModuleDict()  # by name; see hff_modules.adapters
        self._family = family
        self._fingerprints = fingerprints(family)
        self.train(self.training)

    @property
    def frame_rate(self) -> float:
        """Frames per second of speech."""
        seconds = torch.tensor([10, 20]) * 16000
        first, second = self.count_frames(seconds).tolist()
        return (second - first) / 10

    @property
    def minimum_samples(self) -> int:
        """The shortest utterance (samples) that gives a frame."""
        return self._family.minimum_samples

    @property
    def maximum_samples(self) -> int | None:
        """The longest utterance (samples) that the encoder takes at once; None if any."""
        return self._family.maximum_samples

    @property
    def device(self) -> torch.device:
        """Where it is; log-mels alone have no parameters, but buffers."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @property
    def horizon(self) -> int:
        """The highest state that training cannot change; -1 if there is none, not even state 0."""
        lowest = self.top
        for adapter in self.adapters.values():
            # Frames that stay in front are in no stored state: all layers are run anew, always.
            trained = adapter.frames_stay or any(p.requires_grad for p in adapter.parameters())
            if adapter.enabled and trained:
                lowest = min(lowest, adapter.lowest_changed() - 1)
        return min([lowest, *(below for p, below in self._states_below if p.requires_grad)])

    @property
    def fingerprint(self) -> str:
        """Hash of the pretrained weights that are kept, and of what settings add to them."""
        return self.fingerprint_up_to(self.top)

    def fingerprint_up_to(self, number: int) -> str:
        """Hash of what makes state ``number``: the same whatever is kept above it."""
        if number > self.top:
            return "truncated"
        text = " ".join(self._fingerprints[: number + 1])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def parts(self, number: int) -> LayerParts:
        """What adapters attach to in layer ``number`` (from 1)."""
        return self._family.parts(number)

    @property
    def front_convolutions(self) -> list[nn.Conv1d]:
        """The convolutions between waveform or log-mels and the layers, lowest first."""
        return self._family.front_convolutions

    def hook_keys_and_values(self, number: int, change: Callable) -> KeyValueHook:
        """Pass keys and values of an attention through ``change``, see :class:`Family`."""
        return self._family.hook_keys_and_values(number, change)

    def layer_buffers(self, number: int) -> dict[str, tuple[nn.Module, str]]:
        """The buffers in layer ``number`` that training changes: modules and their names there."""
        return _statistics(self._family.layers[number - 1])

    def outside_buffers(self) -> dict[str, tuple[nn.Module, str]]:
        """As :meth:`layer_buffers`, of what :meth:`outside_parameters` are in."""
        family = self._family
        others = [family.layers, *family.never_trained]
        excluded = {id(module) for other in others for module in other.modules()}
        found = _statistics(self.model)
        return {name: place for name, place in found.items() if id(place[0]) not in excluded}

    def layer_parameters(self, number: int) -> dict[str, nn.Parameter]:
        """The encoder's own parameters in layer ``number`` (from 1), by name."""
        return dict(self._family.layers[number - 1].named_parameters())

    def outside_parameters(self) -> dict[str, nn.Parameter]:
        """The encoder's own parameters outside its layers, the waveform CNN left out, by name."""
        family = self._family
        others = [family.layers, *family.never_trained]
        excluded = {id(p) for module in others for p in module.parameters()}
        return {n: p for n, p in self.model.named_parameters() if id(p) not in excluded}

    def train(self, mode: bool = True) -> "SSLEncoder":
        """Set the mode of what is trained; what is frozen always stays in evaluation mode.

        A layer has its dropout only if weights of its own are trained: noise in a frozen layer
        regularises nothing, and costs attention its fast kernels and the graph its masks (with
        parallel adapters in all layers half the memory). Frozen batch norms stay in evaluation mode
        everywhere, so their statistics do not drift.
        """
        if mode and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            # Frozen layers stay in evaluation mode, where Hugging Face does without it; and what it
            # computes again would see the frames of the last batch.
            raise ValueError("gradient checkpointing saves nothing here; switch it off")
        super().train(mode)
        self._states_below = _states_below(self._family)
        self._mode = horizon, *_ = self._learning()
        for adapter in self.adapters.values():  # a frozen one has no dropout either
            adapter.train(mode and any(p.requires_grad for p in adapter.parameters()))
        if mode:
            outside = self.outside_parameters().values()
            self.model.train(horizon < 0 and any(p.requires_grad for p in outside))
            for number, layer in enumerate(self._family.layers):
                of_its_own = any(p.requires_grad for p in layer.parameters())
                layer.train(number >= horizon and of_its_own)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if not any(p.requires_grad for p in module.parameters()):
                    module.eval()
        return self

    def _learning(self) -> tuple[int, list[bool], list[bool]]:
        """The horizon, and what of the model and of the adapters is trained."""
        own = [p.requires_grad for p, _ in self._states_below]
        return self.horizon, own, [p.requires_grad for p in self.adapters.parameters()]

    def count_frames(self, num_samples: torch.Tensor) -> torch.Tensor:
        """Frames that utterances of ``num_samples`` samples give; (batch,) whole numbers."""
        return self._family.count_frames(num_samples)

    def forward(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor | None = None,
        adapters: str | Sequence[str | Sequence[str] | None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the selected states.

        Arguments
        ---------
        wavs : torch.Tensor
            (batch, samples), 16 kHz, -1 to 1; or what :meth:`encode` gave for them, (batch, frames,
            num_stored, width), and the work starts at the horizon.
        wav_lens : torch.Tensor, optional
            (batch,), valid share of each row as SpeechBrain has it; all valid by default.
        adapters : str | Sequence[str | Sequence[str] | None], optional
            Name of the adapter to use, for the whole batch, or one or several for each utterance
            (None: the plain encoder); by default every adapter that is enabled.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            States (num_states, batch, frames, width) and valid frames (batch,).

        Raises
        ------
        ValueError
            When an utterance is too short to give a frame, shares are none, or utterances of
            stored states are to have other adapters than the states were stored with.
        """
        if wav_lens is None:
            wav_lens = torch.ones(len(wavs), device=wavs.device)
        select_rows(self.adapters, adapters, len(wavs))
        horizon = self.horizon
        if wavs.dim() == 4 and adapters is not None:
            self._refuse_rows_below(horizon)
        if self.training and self._learning() != self._mode:  # frozen or trained since then
            self.train()
        if wavs.dim() == 4 and horizon == self.top:
            return self._all_restored(wavs, wav_lens)
        if wavs.dim() == 4:
            states, hidden, lengths, call = self._restore(wavs, wav_lens)
        else:
            states, hidden, lengths, call = self._run_frozen(wavs, wav_lens)
        for number in range(max(horizon, 0) + 1, self.top + 1):
            hidden, call = self._step(number, hidden, call, states, self.layers)
        frames = int(lengths.max())
        return torch.stack([states[k][:, :frames] for k in self.layers]), lengths

    def _refuse_rows_below(self, horizon: int) -> None:
        for name, adapter in self.adapters.items():
            if adapter.enabled and adapter.rows is not None:
                if adapter.lowest_changed() <= horizon:
                    raise ValueError(
                        f"the stored states were computed with the adapter {name!r} for all "
                        "utterances; give waveforms to choose among adapters"
                    )

    @property
    def stored_layers(self) -> list[int]:
        """The states that training cannot change and that the rest follows from.

        None if training reaches the front end, or if it reaches into Whisper: its layers also read
        the silence behind the speech, which is not kept.
        """
        horizon = self.horizon
        if horizon < 0 or (horizon < self.top and self._family.hears_padding):
            return []
        return sorted({*(number for number in self.layers if number <= horizon), horizon})

    @torch.no_grad()
    def encode(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the states of ``stored_layers``, to be kept and handed to :meth:`forward` later.

        Arguments
        ---------
        wavs : torch.Tensor
            (batch, samples), 16 kHz, -1 to 1.
        wav_lens : torch.Tensor, optional
            (batch,), valid share of each row; all valid by default.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            (batch, frames, num_stored, width) and valid frames (batch,).
        """
        if wav_lens is None:
            wav_lens = torch.ones(len(wavs), device=wavs.device)
        select_rows(self.adapters, None, len(wavs))
        states, hidden, lengths, _ = self._run_frozen(wavs, wav_lens)
        if self.horizon < self.top:
            states[self.horizon] = hidden
        kept = [states[number][:, : int(lengths.max())] for number in self.stored_layers]
        return torch.stack(kept, dim=2), lengths

    @torch.no_grad()
    def base_states(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None, layers: Sequence[int]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Give states of the encoder without any adapter, selected or not, to :meth:`go_on` from.

        Arguments
        ---------
        wavs : torch.Tensor
            (batch, samples), 16 kHz, -1 to 1.
        wav_lens : torch.Tensor, optional
            (batch,), valid share of each row; all valid by default.
        layers : Sequence[int]
            Which states; nothing above the highest is run.

        Returns
        -------
        tuple[dict[int, torch.Tensor], torch.Tensor]
            States by layer (batch, frames, width) and valid frames (batch,). Whisper's have all
            the frames of its window, as its layers look at them.

        Raises
        ------
        ValueError
            When an utterance is too short, or a method that changes the encoder's own weights is
            not disabled.
        """
        if wav_lens is None:
            wav_lens = torch.ones(len(wavs), device=wavs.device)
        select_rows(self.adapters, [None] * len(wavs), len(wavs))
        states, _, lengths, _ = self._run_frozen(wavs, wav_lens, layers)
        return states, lengths

    @torch.no_grad()
    def go_on(
        self,
        state: torch.Tensor,
        lengths: torch.Tensor,
        start: int,
        layers: Sequence[int],
        adapters: str | Sequence[str | Sequence[str] | None] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Give higher states, with adapters, from one that :meth:`base_states` gave.

        Arguments
        ---------
        state : torch.Tensor
            (batch, frames, width), state ``start``.
        lengths : torch.Tensor
            (batch,), valid frames.
        start : int
            At or below the horizon of the adapters.
        layers : Sequence[int]
            Which states, all above ``start``.
        adapters : str | Sequence[str | Sequence[str] | None], optional
            As in :meth:`forward`.

        Returns
        -------
        dict[int, torch.Tensor]
            States by layer, (batch, frames, width).
        """
        select_rows(self.adapters, adapters, len(state))
        if not self._family.hears_padding:
            state = state[:, : int(lengths.max())]
        states, hidden, call = {}, state, self._family.call_for(state, lengths)
        for number in range(start + 1, max(layers) + 1):
            hidden, call = self._step(number, hidden, call, states, layers)
        return states

    def _run_frozen(self, wavs, wav_lens, layers=None):
        """From waveforms to the horizon, or to what enters layer 1 if there is none.

        With ``layers``, to the highest of them, and their states are given.
        """
        if not bool(((wav_lens >= 0) & (wav_lens <= 1 + 1e-4)).all()):  # nor NaN
            raise ValueError(
                "wav_lens: expected each utterance's share of the longest one, from 0 to 1, got "
                f"{wav_lens.tolist()}"
            )
        num_samples = (wav_lens * wavs.shape[1]).round().long().clamp(max=wavs.shape[1])
        if int(num_samples.min()) < self.minimum_samples:
            raise ValueError(
                f"utterance {int(num_samples.argmin())} of the batch has {int(num_samples.min())} "
                f"samples; {self.source} needs at least {self.minimum_samples} to give a frame"
            )
        wanted, horizon = (self.layers, self.horizon) if layers is None else (layers, max(layers))
        states = {}
        together = any(adapter.rows is not None for adapter in self.adapters.values())
        self._family.padding.together = together
        with self._frozen(wavs.device) if horizon >= 0 else contextlib.nullcontext():
            hidden, lengths, call = self._family.enter(wavs, num_samples)
            if 0 in wanted:
                states[0] = hidden.float()
            for number in range(1, horizon + 1):
                hidden, call = self._step(number, hidden, call, states, wanted)
        if horizon >= 0 and self.precision != "fp32":
            call = call.float()
        return states, hidden.float(), lengths, call

    def _restore(self, stored, lens):
        """From stored states to the horizon, above which there is more to run."""
        stored, lengths = self._unpacked(stored, lens)
        by_layer = dict(zip(self.stored_layers, stored, strict=True))
        states = {number: by_layer[number] for number in self.layers if number in by_layer}
        hidden = by_layer[self.horizon]
        return states, hidden, lengths, self._family.call_for(hidden, lengths)

    def _all_restored(self, stored, lens):
        """The selected states, which are the stored ones: nothing is left to run."""
        states, lengths = self._unpacked(stored, lens)
        return states[:, :, : int(lengths.max())], lengths

    def _unpacked(self, stored, lens):
        """States (num_stored, batch, frames, width), each in one piece, copied once."""
        if stored.shape[2] != len(self.stored_layers):
            raise ValueError(
                f"{stored.shape[2]} stored states were given; those at and below the horizon are "
                f"{self.stored_layers}"
            )
        lengths = (lens * stored.shape[1]).round().long()
        by_layer = stored.permute(2, 0, 1, 3)
        return by_layer.to(torch.float32, memory_format=torch.contiguous_format), lengths

    def manifest(self) -> dict:
        """What identifies this encoder in checkpoints and results; JSON-able."""
        return {
            "source": self.source,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "family": self.model.config.model_type,
            "pretrained": not self.untrained,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "layers": self.layers,
        }

    def frozen_manifest(self) -> dict:
        """Everything that decides about ``stored_layers`` besides the audio; JSON-able."""
        below = [
            (name, adapter)
            for name, adapter in self.adapters.items()
            if adapter.enabled and adapter.lowest_changed() <= self.horizon
        ]
        frozen = {  # numbered: one may read what the other gives
            name: [number, adapter.method, adapter.options, hash_tensors(adapter.tensors())]
            for number, (name, adapter) in enumerate(below)
        }
        return {
            "weights": {str(k): self.fingerprint_up_to(k) for k in self.stored_layers},
            "precision": self.precision + " above the front end" * (self.precision != "fp32"),
            "adapters": frozen,
        }

    def _step(self, number, hidden, call, states, wanted):
        """Layer ``number``: its output, and what the layer above is called with."""
        hidden, call = self._put_in_front(number, hidden, call, stay=True)
        longer, longer_call = self._put_in_front(number, hidden, call, stay=False)
        order = longer_call.order
        out = self._family.run_layer(number, _ordered(longer, order), longer_call)
        out = _ordered(out, None if order is None else order.argsort(dim=1))
        hidden = out[:, longer_call.front - call.front :]
        if number in wanted:
            norm = self._family.final_norm if number == self.num_layers else None
            speech = hidden[:, call.front :]
            states[number] = (norm(speech) if norm is not None else speech).float()
        return hidden, call

    def _put_in_front(self, number, hidden, call, stay):
        joined = join_frames(self.adapters, number, len(hidden), stay)
        if joined is None:
            return hidden, call
        frames, there, names = joined
        hidden = torch.cat([frames.to(hidden.dtype), hidden], dim=1)
        if names not in call.longer:
            call.longer[names] = self._family.call_longer(hidden, there, call)
        return hidden, call.longer[names]

    @contextlib.contextmanager
    def _frozen(self, device: torch.device):
        """No graph, and the chosen precision."""
        dtype = _PRECISIONS[self.precision]
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            yield


def _ordered(hidden: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return hidden if order is None else hidden.gather(1, order.unsqueeze(2).expand_as(hidden))


def _statistics(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Batch norms' buffers: where they are, by name."""
    return {
        f"{prefix}.{name}": (norm, name)
        for prefix, norm in module.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        for name, _ in norm.named_buffers(recurse=False)
    }


def _states_below(family) -> list[tuple[nn.Parameter, int]]:
    """Each parameter with the highest state that training it leaves alone; -1 if there is none.

    Gathered whenever the mode is set, not in every step: a step asks for the horizon several times,
    and a walk through all modules takes some of the few milliseconds of a step on stored states.
    """
    below: dict[int, int] = {}
    if family.final_norm is not None:  # it makes the last state out of the last layer's output
        below |= {id(p): len(family.layers) - 1 for p in family.final_norm.parameters()}
    for number, layer in enumerate(family.layers, start=1):
        for parameter in layer.parameters():
            below.setdefault(id(parameter), number - 1)
    return [(parameter, below.get(id(parameter), -1)) for parameter in family.model.parameters()]
