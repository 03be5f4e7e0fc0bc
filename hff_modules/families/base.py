"""One pretrained encoder, seen in the same way whatever its architecture.

A ``Family`` wraps one Hugging Face model and answers four questions: how waveforms become its
input, how many frames come out, which modules are its layers, and what layer 1 is called with.
Nothing of Hugging Face's ``forward`` is copied: it runs until layer 1 is reached and is stopped
there, which yields both the state that enters layer 1 and the masks and position embeddings that
every layer is called with.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hff_modules.families.attention import HOOKED, KeyValueHook, has_hooks
from hff_modules.frontend import valid_mask

# Entries of config.json that change the states but no tensor: weights alone would not tell two such
# encoders apart, and one would read the states that were stored of the other.
_BESIDE_WEIGHTS = (
    *("model_type", "hidden_act", "activation_function", "layer_norm_eps", "num_attention_heads"),
    *("encoder_attention_heads", "do_stable_layer_norm", "position_embeddings_type"),
    *("left_max_position_embeddings", "right_max_position_embeddings", "rotary_embedding_base"),
    *("max_source_positions", "max_bucket_distance", "scale_embedding"),
    *("feat_extract_norm", "feat_extract_activation", "conv_stride"),
    "num_conv_pos_embedding_groups",
)


@dataclass
class LayerCall:
    """What an encoder hands to each of its layers besides the hidden state."""

    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    valid: torch.Tensor | None = None  # (batch, frames), True where valid; None if all are
    front: int = 0  # learned frames in front of the speech
    order: torch.Tensor | None = None  # (batch, frames) in which the layer reads them; None: as is
    longer: dict = field(
        default_factory=dict
    )  # calls with more frames in front, made from this one

    def float(self) -> "LayerCall":
        """The same in single precision, for layers above those that ran in half of it."""
        args, kwargs = _in_float(self.args), _in_float(self.kwargs)
        longer = {names: call.float() for names, call in self.longer.items()}
        return replace(self, args=args, kwargs=kwargs, longer=longer)


def _in_float(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_float(one) for key, one in value.items()}
    return type(value)(map(_in_float, value)) if type(value) in (list, tuple) else value


@dataclass
class Padding:
    """Which part of the present batch is valid; None where nothing is padded."""

    num_samples: torch.Tensor | None = None  # (batch,)
    frames: torch.Tensor | None = None  # (batch, frames), True where valid
    together: bool = False  # hooks tell utterances apart by their place in the batch


@dataclass
class FeedForward:
    """One feed-forward branch of a layer, by the modules around it."""

    reads: nn.Module  # whose input is the branch's raw input, in front of any norm
    gives: nn.Module  # whose output is the branch's output, before the residual is added
    up: nn.Linear  # width -> inner width
    down: nn.Linear  # inner width -> width


@dataclass
class LayerParts:
    """What adapters attach to inside one layer."""

    attention: nn.Module  # its output, or the first of its outputs, is the branch's output
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    feed_forwards: list[FeedForward]

    def branch(self, name: str) -> nn.Module:
        """What gives the output of the ``attention`` or of the last ``feed_forward``."""
        return {"attention": self.attention, "feed_forward": self.feed_forwards[-1].gives}[name]

    def linear(self, name: str) -> list[nn.Linear]:
        """Linear maps called ``query``, ``key``, ``value``, ``output``, ``up`` or ``down``."""
        if name in ("up", "down"):
            return [getattr(branch, name) for branch in self.feed_forwards]
        return [getattr(self, name)]


class Family:
    """One pretrained encoder, seen in the same way whatever its architecture.

    Arguments
    ---------
    model : nn.Module
        The Hugging Face model (for Whisper its encoder).
    preprocessor : dict
        The model's ``preprocessor_config.json``; empty for the defaults.
    """

    minimum_samples = 400
    maximum_samples: int | None = None  # of an utterance
    hears_padding = False  # whether layers look at what lies behind an utterance

    def __init__(self, model: nn.Module, preprocessor: dict):
        self.model = model
        self.preprocessor = preprocessor
        self.padding = Padding()
        config = model.config
        self.attention_implementation = config._attn_implementation  # while nothing is hooked
        config.apply_spec_augment = False  # masking belongs on the fused features
        config.layerdrop = 0.0
        for name, parameter in list(model.named_parameters(recurse=False)):
            if name == "masked_spec_embed":  # unused from here on, and DDP would wait for it
                delattr(model, name)
                parameter.requires_grad_(False)
        for name in ("adapter", "intermediate_ffn"):  # above the last state, where nothing is read
            if isinstance(getattr(model, name, None), nn.Module):
                setattr(model, name, None)

    @property
    def stack(self) -> nn.Module:
        """The module that holds the layers."""
        return self.model.encoder

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, the first at index 0."""
        return self.stack.layers

    @property
    def final_norm(self) -> nn.Module | None:
        """A norm behind the last layer, where the architecture has one."""
        return self.stack.layer_norm if self.norm_comes_last else None

    @property
    def norm_comes_last(self) -> bool:
        """Whether ``stack.layer_norm`` stands behind the last layer and not before the first."""
        return bool(getattr(self.model.config, "do_stable_layer_norm", False))

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return self.model.config.hidden_size

    @property
    def settings(self) -> dict[str, Any]:
        """What of ``config.json`` changes the states but no tensor."""
        return {key: getattr(self.model.config, key, None) for key in _BESIDE_WEIGHTS}

    @property
    def never_trained(self) -> list[nn.Module]:
        """What full fine-tuning leaves frozen too: the waveform CNN, sinusoidal positions."""
        return []

    def truncate(self, top: int) -> None:
        """Remove the layers above ``top``; layer 1 stays, as states are caught in front of it."""
        if top < len(self.layers):
            self.stack.layers = self.layers[: max(top, 1)]
            if self.norm_comes_last:
                self.stack.layer_norm = nn.Identity()

    def count_frames(self, num_samples: torch.Tensor) -> torch.Tensor:
        """Frames of utterances with ``num_samples`` samples each, (batch,) both ways."""
        raise NotImplementedError

    def inputs(self, wavs: torch.Tensor, num_samples: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's keyword arguments for (batch, samples) waveforms."""
        raise NotImplementedError

    def enter(
        self, wavs: torch.Tensor, num_samples: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, LayerCall]:
        """Run everything in front of layer 1.

        Arguments
        ---------
        wavs : torch.Tensor
            (batch, samples), 16 kHz.
        num_samples : torch.Tensor
            (batch,), valid samples.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor, LayerCall]
            What enters layer 1 (batch, frames, width), valid frames (batch,), and what else each
            layer is called with.
        """
        # Half precision holds no spectrum: its power overflows fp16, and bf16 is off by a fifth.
        with torch.no_grad(), torch.autocast(wavs.device.type, enabled=False):
            inputs = self.inputs(wavs, num_samples)
        lengths = self.count_frames(num_samples)
        padded = len(lengths) > 1 and bool((num_samples != num_samples.max()).any())
        self.padding.num_samples = num_samples if padded else None
        self.padding.frames = self.valid_frames(lengths)
        hidden, call = _until_layer_one(self.layers, functools.partial(self.model, **inputs))
        call.valid = self.padding.frames
        return hidden, lengths, call

    def valid_frames(self, lengths: torch.Tensor) -> torch.Tensor | None:
        """Mask (batch, frames) of what the layers may look at; None if that is everything."""
        padded = len(lengths) > 1 and bool((lengths != lengths.max()).any())
        return valid_mask(lengths, int(lengths.max())) if padded else None

    def call_for(self, hidden: torch.Tensor, lengths: torch.Tensor) -> LayerCall:
        """What the layers are called with when the work starts at a stored state.

        Arguments
        ---------
        hidden : torch.Tensor
            (batch, frames, width), any state.
        lengths : torch.Tensor
            (batch,), valid frames; the longest has all of them.

        Returns
        -------
        LayerCall
            The one that :meth:`enter` gives for the same utterances.
        """
        return self.call_with(hidden, self.valid_frames(lengths))

    def call_with(self, hidden: torch.Tensor, valid: torch.Tensor | None) -> LayerCall:
        """What the layers are called with for frames of which ``valid`` may be looked at.

        Hugging Face's own stack makes it, run on frames of zeros until layer 1 is reached.

        Arguments
        ---------
        hidden : torch.Tensor
            (batch, frames, width); only its shape, type and device matter.
        valid : torch.Tensor, optional
            (batch, frames), True where valid; all are by default.
        """
        zeros = torch.zeros_like(hidden, requires_grad=False)
        run = functools.partial(self.stack, zeros, attention_mask=valid)
        with torch.no_grad(), _without_positions(self.stack):
            _, call = _until_layer_one(self.layers, run)
        call.valid = valid
        return call

    def call_longer(self, hidden: torch.Tensor, in_front: torch.Tensor, call: LayerCall):
        """The call for ``hidden``, which is what ``call`` is for with more frames in front.

        Arguments
        ---------
        hidden : torch.Tensor
            (batch, more + frames, width).
        in_front : torch.Tensor
            (batch, more), True where an utterance has such a frame. Its positions count from the
            first frame that it has.
        call : LayerCall
            For the frames alone.

        Returns
        -------
        LayerCall
            With an ``order`` where an utterance lacks frames between some that it has: the speech
            and all of these are to stand together, as they do when it is alone.
        """
        valid = order = None
        if call.valid is not None or not bool(in_front.all()):
            speech = in_front.new_ones(len(hidden), hidden.shape[1] - in_front.shape[1])
            valid = torch.cat([in_front, speech if call.valid is None else call.valid], dim=1)
            places = torch.arange(hidden.shape[1], device=hidden.device)
            is_empty = ~valid & (places < hidden.shape[1] - speech.shape[1] + call.front)
            closed_up = is_empty.long().argsort(dim=1, descending=True, stable=True)
            if not torch.equal(closed_up, places.expand_as(closed_up)):
                order, valid = closed_up, valid.gather(1, closed_up)
        longer = self.call_with(hidden, valid)
        longer.order = order
        longer.front = call.front + in_front.shape[1]
        if valid is not None and self.is_rotary:  # the only ones that are absolute
            table = longer.kwargs["relative_position_embeddings"]  # (2, frames, 1, 1, width)
            places = (valid.cumsum(1) - 1).clamp(min=0).T
            longer.kwargs["relative_position_embeddings"] = table[:, places, 0]
        return longer

    @property
    def is_rotary(self) -> bool:
        """Whether its layers turn what they read by an angle for each position."""
        return getattr(self.model.config, "position_embeddings_type", None) == "rotary"

    def parts(self, number: int) -> LayerParts:
        """What adapters attach to in layer ``number`` (from 1)."""
        raise NotImplementedError

    @property
    def front_convolutions(self) -> list[nn.Conv1d]:
        """The convolutions between waveform or log-mels and the layers, lowest first."""
        return []

    def hook_keys_and_values(self, number: int, change: Callable) -> KeyValueHook:
        """Pass keys and values of the attention in layer ``number`` through ``change``.

        Arguments
        ---------
        number : int
            Layer, from 1.
        change : Callable
            ``change(key, value, mask, bias)`` gives the four again. Keys and values (batch, heads,
            frames, width of a head), the boolean mask and the additive bias (both or either may be
            None) broadcast to (batch, heads, queries, keys). No closure, so that copies work.

        Returns
        -------
        KeyValueHook
            With ``remove()``.
        """
        return KeyValueHook(self, self.parts(number).attention, change)

    def route_attention(self) -> None:
        """Send attention through the hooks on keys and values while there are any."""
        numbers = range(1, len(self.layers) + 1)
        hooked = any(has_hooks(self.parts(n).attention) for n in numbers)
        implementation = HOOKED if hooked else self.attention_implementation
        if self.model.config._attn_implementation != implementation:
            self.model.config._attn_implementation = implementation

    def run_layer(self, number: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Layer ``number`` (from 1): state ``number - 1`` to state ``number``."""
        self.padding.frames = call.valid
        out = self.layers[number - 1](hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _mask_padding_at(self, module: nn.Module) -> None:
        """Zero the padding in what ``module`` reads, (batch, channels, frames).

        A convolution that is wider than one frame would otherwise carry padding into the speech.
        """
        module.register_forward_pre_hook(functools.partial(_zero_padding, self.padding))

    def _make_positions_anew(self) -> None:
        """Spare a Conformer Hugging Face's habit of keeping tables of positions as they last were.

        These may be of another precision or device, or made in inference mode.
        """
        if self.stack.embed_positions is not None:
            self.stack.embed_positions.register_forward_pre_hook(_forget_positions)


def _forget_positions(module: nn.Module, args: tuple) -> tuple:
    if hasattr(module, "cached_sequence_length"):
        module.cached_sequence_length = None
    elif module.pe.is_inference() and not torch.is_inference_mode_enabled():
        module.pe = module.pe.clone()
    return (args[0].float(),)


def _zero_padding(padding: Padding, module: nn.Module, args: tuple) -> tuple | None:
    mask = padding.frames
    return None if mask is None else (args[0].masked_fill(~mask.unsqueeze(1), 0.0),)


def transformer_parts(attention: nn.Module, branch: FeedForward) -> LayerParts:
    """Parts of a Transformer layer."""
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return LayerParts(attention, *(getattr(attention, name) for name in names), [branch])


def macaron_parts(layer: nn.Module) -> LayerParts:
    """Parts of a Conformer layer, which has a half-step feed-forward at either end."""
    attention = layer.self_attn
    names = ("linear_q", "linear_k", "linear_v", "linear_out")
    branches = [
        FeedForward(norm, ffn, ffn.intermediate_dense, ffn.output_dense)
        for norm, ffn in (
            (layer.ffn1_layer_norm, layer.ffn1),
            (layer.ffn2_layer_norm, layer.ffn2),
        )
    ]
    return LayerParts(attention, *(getattr(attention, name) for name in names), branches)


class _LayerOneReached(Exception):
    def __init__(self, hidden: torch.Tensor, call: LayerCall):
        super().__init__()
        self.hidden, self.call = hidden, call


def _until_layer_one(layers: nn.ModuleList, run: Callable) -> tuple[torch.Tensor, LayerCall]:
    """Call ``run`` and stop it at layer 1; gives what enters there."""
    hook = layers[0].register_forward_pre_hook(_stop_at_layer_one, with_kwargs=True, prepend=True)
    try:
        run()
    except _LayerOneReached as reached:
        return reached.hidden, reached.call
    finally:
        hook.remove()
    raise RuntimeError("the model never called its first layer")


@contextlib.contextmanager
def _without_positions(stack: nn.Module):
    """Spare a convolution whose result is not wanted."""
    convolution = getattr(stack, "pos_conv_embed", None)
    if convolution is None:
        yield
        return
    stack.pos_conv_embed = nn.Identity()
    try:
        yield
    finally:
        stack.pos_conv_embed = convolution


def _stop_at_layer_one(module: nn.Module, args: tuple, kwargs: dict):
    hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
    raise _LayerOneReached(hidden, LayerCall(tuple(rest), kwargs))
