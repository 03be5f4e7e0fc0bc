"""The only place that knows the names inside other people's encoders.

A ``Family`` wraps one Hugging Face model and answers four questions: how waveforms become its
input, how many frames come out, which modules are its layers, and what layer 1 is called with.
Nothing of Hugging Face's ``forward`` is copied: it runs until layer 1 is reached and is stopped
there, which yields both the state that enters layer 1 and the masks and position embeddings that
every layer is called with.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hff_modules.frontend import KaldiLogMel, WhisperLogMel, normalise, valid_mask


@dataclass
class LayerCall:
    """What an encoder hands to each of its layers besides the hidden state."""

    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    valid: torch.Tensor | None = None  # (batch, frames), True where valid; None if all are
    front: int = 0  # learned frames in front of the speech
    longer: dict = field(
        default_factory=dict
    )  # calls with more frames in front, made from this one


@dataclass
class Padding:
    """Which part of the present batch is valid; None where nothing is padded."""

    num_samples: torch.Tensor | None = None  # (batch,)
    frames: torch.Tensor | None = None  # (batch, frames), True where valid


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


def _macaron(layer: nn.Module) -> LayerParts:
    """Parts of a Conformer layer, which has a half-step feed-forward at either end."""
    attention = layer.self_attn
    branches = [
        FeedForward(norm, ffn, ffn.intermediate_dense, ffn.output_dense)
        for norm, ffn in (
            (layer.ffn1_layer_norm, layer.ffn1),
            (layer.ffn2_layer_norm, layer.ffn2),
        )
    ]
    return LayerParts(
        attention,
        attention.linear_q,
        attention.linear_k,
        attention.linear_v,
        attention.linear_out,
        branches,
    )


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


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm whose statistics leave out padding.

    Without it wav2vec2-base and HuBERT-base give an utterance other states in a padded batch than
    alone. Shares its parameters with the norm that it stands in for.
    """

    def __init__(self, norm: nn.GroupNorm, conv: nn.Conv1d, padding: Padding):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, norm.affine)
        self.weight, self.bias = norm.weight, norm.bias
        self.kernel, self.stride, self.padding = conv.kernel_size[0], conv.stride[0], padding

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise each utterance over its own length; (batch, channels, time) both ways."""
        if self.padding.num_samples is None:
            return super().forward(hidden)
        lengths = (self.padding.num_samples - self.kernel) // self.stride + 1
        rows = []
        for row, length in zip(hidden.split(1), lengths.tolist(), strict=True):
            row = super().forward(row[..., :length])
            rows.append(nn.functional.pad(row, (0, hidden.shape[-1] - length)))
        return torch.cat(rows)


class Family:
    """One pretrained encoder, seen in the same way whatever its architecture.

    Arguments
    ---------
    model : nn.Module
        The Hugging Face model (for Whisper its encoder).
    preprocessor : dict
        The model's ``preprocessor_config.json``; empty for the defaults.
    """

    input_name = "input_values"
    minimum_samples = 400

    def __init__(self, model: nn.Module, preprocessor: dict):
        self.model = model
        self.preprocessor = preprocessor
        self.padding = Padding()
        config = model.config
        self.attention_implementation = config._attn_implementation
        config.apply_spec_augment = False  # masking belongs on the fused features
        config.layerdrop = 0.0
        for name, parameter in list(model.named_parameters(recurse=False)):
            if name == "masked_spec_embed":  # unused from here on, and DDP would wait for it
                delattr(model, name)
                parameter.requires_grad_(False)

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
        with torch.no_grad():
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
            (batch, more), True where an utterance has such a frame.
        call : LayerCall
            For the frames alone.
        """
        valid = None
        if call.valid is not None or not bool(in_front.all()):
            speech = in_front.new_ones(len(hidden), hidden.shape[1] - in_front.shape[1])
            valid = torch.cat([in_front, speech if call.valid is None else call.valid], dim=1)
        longer = self.call_with(hidden, valid)
        longer.front = call.front + in_front.shape[1]
        return longer

    def parts(self, number: int) -> LayerParts:
        """What adapters attach to in layer ``number`` (from 1)."""
        raise NotImplementedError

    @property
    def front_convolutions(self) -> list[nn.Conv1d]:
        """The convolutions between waveform or log-mels and the layers, lowest first."""
        return []

    def hook_keys_and_values(self, number: int, change: Callable) -> "KeyValueHook":
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
        hooked = any(getattr(self.parts(n).attention, _HOOKS, None) for n in numbers)
        implementation = _HOOKED if hooked else self.attention_implementation
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


def _zero_padding(padding: Padding, module: nn.Module, args: tuple) -> tuple | None:
    mask = padding.frames
    return None if mask is None else (args[0].masked_fill(~mask.unsqueeze(1), 0.0),)


class WaveformFamily(Family):
    """wav2vec 2.0, XLS-R, MMS, HuBERT, UniSpeech-SAT: a CNN over samples, then a Transformer."""

    def __init__(self, model: nn.Module, preprocessor: dict):
        super().__init__(model, preprocessor)
        convolution = model.feature_extractor
        first = convolution.conv_layers[0]
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            first.layer_norm = MaskedGroupNorm(first.layer_norm, first.conv, self.padding)
        # Otherwise Hugging Face makes the waveform itself require a gradient in train mode.
        convolution._freeze_parameters()

    @property
    def never_trained(self) -> list[nn.Module]:  # noqa: D102
        return [self.model.feature_extractor]

    @property
    def front_convolutions(self) -> list[nn.Conv1d]:  # noqa: D102
        return [layer.conv for layer in self.model.feature_extractor.conv_layers]

    def parts(self, number: int) -> LayerParts:  # noqa: D102
        layer = self.layers[number - 1]
        attention, ffn = layer.attention, layer.feed_forward
        reads = layer.final_layer_norm if self.norm_comes_last else ffn
        branch = FeedForward(reads, ffn, ffn.intermediate_dense, ffn.output_dense)
        return LayerParts(
            attention,
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.out_proj,
            [branch],
        )

    def count_frames(self, num_samples: torch.Tensor) -> torch.Tensor:  # noqa: D102
        config = self.model.config
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            num_samples = torch.div(num_samples - kernel, stride, rounding_mode="floor") + 1
        return num_samples.clamp(min=0)

    def inputs(self, wavs: torch.Tensor, num_samples: torch.Tensor) -> dict:  # noqa: D102
        wavs = wavs[:, : int(num_samples.max())]
        mask = valid_mask(num_samples, wavs.shape[1])
        wavs = normalise(wavs, mask) if self.preprocessor.get("do_normalize", True) else wavs * mask
        padded = len(wavs) > 1 and not bool(mask.all())
        return {"input_values": wavs, "attention_mask": mask.long() if padded else None}


def _wavlm_attention(
    attention: nn.Module,
    hidden: torch.Tensor,
    frame_mask: torch.Tensor | None,
    position_bias: torch.Tensor,
) -> tuple[torch.Tensor, None]:
    """WavLM's attention with its projections called as modules, which makes them adaptable.

    Hugging Face hands the raw weights to one fused call, past any LoRA, and has it return the
    weights of all heads, which nothing here needs.
    """
    batch, frames, _ = hidden.shape
    heads = (batch, frames, attention.num_heads, attention.head_dim)
    query = attention.q_proj(hidden).view(heads).transpose(1, 2)
    key = attention.k_proj(hidden).view(heads).transpose(1, 2)
    value = attention.v_proj(hidden).view(heads).transpose(1, 2)
    bias = position_bias.view(batch, attention.num_heads, frames, frames).to(query.dtype)
    mask = None if frame_mask is None else frame_mask.bool()[:, None, None, :]
    for hook in getattr(attention, _HOOKS, ()):
        key, value, mask, bias = hook.change(key, value, mask, bias)
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    dropout = attention.dropout if attention.training else 0.0
    attended = nn.functional.scaled_dot_product_attention(query, key, value, bias, dropout)
    return attention.out_proj(attended.transpose(1, 2).reshape(hidden.shape)), None


_HOOKS, _HOOKED = "key_value_hooks", "hooked_sdpa"


class KeyValueHook:
    """A change of the keys and values of one attention, until it is removed."""

    def __init__(self, family: "Family", attention: nn.Module, change: Callable):
        self.family, self.attention, self.change = family, attention, change
        setattr(attention, _HOOKS, [*getattr(attention, _HOOKS, []), self])
        family.route_attention()

    def remove(self) -> None:
        """Take the change off."""
        hooks = getattr(self.attention, _HOOKS)
        hooks.remove(self)
        if not hooks:
            delattr(self.attention, _HOOKS)
        self.family.route_attention()


def _hooked_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Hugging Face's "sdpa" attention behind the hooks on the module's keys and values."""
    for hook in getattr(module, _HOOKS, ()):
        key, value, attention_mask, position_bias = hook.change(
            key, value, attention_mask, position_bias
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, position_bias=position_bias, **kwargs
    )


AttentionInterface.register(_HOOKED, _hooked_attention)
AttentionMaskInterface.register(_HOOKED, sdpa_mask)


class WavLMFamily(WaveformFamily):
    """WavLM: layer 1 makes a position bias that every later layer is given."""

    def __init__(self, model: nn.Module, preprocessor: dict):
        super().__init__(model, preprocessor)
        for layer in self.layers:
            if not hasattr(layer.attention, "torch_multi_head_self_attention"):
                raise RuntimeError(
                    "WavLM's attention has changed in this release of transformers; "
                    "hff_modules knows it up to 5.23"
                )
            layer.attention.torch_multi_head_self_attention = functools.partial(
                _wavlm_attention, layer.attention
            )

    def run_layer(self, number: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:  # noqa: D102
        if call.kwargs.get("position_bias") is None:  # also when layer 1 was skipped
            attention, (batch, frames, _) = self.layers[0].attention, hidden.shape
            bias = attention.compute_bias(frames, frames).expand(batch, -1, -1, -1)
            call.kwargs["position_bias"] = bias.reshape(-1, frames, frames)
        return super().run_layer(number, hidden, call)

    def route_attention(self) -> None:  # noqa: D102
        pass  # its attention is ours and looks for hooks itself


class Data2VecFamily(WaveformFamily):
    """data2vec-audio: positions come from a stack of convolutions, each of which sees padding."""

    norm_comes_last = False

    def __init__(self, model: nn.Module, preprocessor: dict):
        super().__init__(model, preprocessor)
        for layer in model.encoder.pos_conv_embed.layers:
            self._mask_padding_at(layer.conv)


class ConformerFamily(WaveformFamily):
    """wav2vec2-conformer: convolutions inside the layers, which Hugging Face does not mask."""

    norm_comes_last = True

    def __init__(self, model: nn.Module, preprocessor: dict):
        super().__init__(model, preprocessor)
        model.encoder.pos_conv_embed = nn.Identity()  # built by Hugging Face, never used
        for layer in self.layers:
            self._mask_padding_at(layer.conv_module.depthwise_conv)

    def parts(self, number: int) -> LayerParts:  # noqa: D102
        return _macaron(self.layers[number - 1])


class W2vBertFamily(Family):
    """w2v-BERT 2.0 and the built-in encoder: stacked Kaldi log-mels, then Conformer layers."""

    def __init__(self, model: nn.Module, preprocessor: dict):
        super().__init__(model, preprocessor)
        num_mels = preprocessor.get("num_mel_bins", 80)
        width = model.config.feature_projection_input_dim
        stride = preprocessor.get("stride", width // num_mels)
        if num_mels * stride != width:
            raise ValueError(
                f"preprocessor_config.json has num_mel_bins={num_mels} and stride={stride}, but "
                f"config.json has feature_projection_input_dim={width}, not their product"
            )
        self.log_mel = KaldiLogMel(num_mels, stride)
        self.minimum_samples = 400 + 160 * (stride - 1)

    def parts(self, number: int) -> LayerParts:  # noqa: D102
        return _macaron(self.layers[number - 1])

    def count_frames(self, num_samples: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.log_mel.count_frames(num_samples)

    def inputs(self, wavs: torch.Tensor, num_samples: torch.Tensor) -> dict:  # noqa: D102
        features, lengths = self.log_mel.to(wavs.device)(wavs, num_samples)
        padded = len(wavs) > 1 and bool((lengths != lengths.max()).any())
        mask = valid_mask(lengths, features.shape[1]).long() if padded else None
        return {"input_features": features, "attention_mask": mask}


class WhisperFamily(Family):
    """Whisper's encoder: always 30 s of log-mels, silence included, as it was trained."""

    def __init__(self, model: nn.Module, preprocessor: dict):
        super().__init__(model, preprocessor)
        model.layerdrop = 0.0
        seconds = model.config.max_source_positions // 50
        self.log_mel = WhisperLogMel(model.config.num_mel_bins, seconds)

    norm_comes_last = True

    @property
    def stack(self) -> nn.Module:  # noqa: D102
        return self.model

    def parts(self, number: int) -> LayerParts:  # noqa: D102
        layer = self.layers[number - 1]
        attention = layer.self_attn
        branch = FeedForward(layer.final_layer_norm, layer.fc2, layer.fc1, layer.fc2)
        return LayerParts(
            attention,
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.out_proj,
            [branch],
        )

    @property
    def hidden_size(self) -> int:  # noqa: D102
        return self.model.config.d_model

    @property
    def never_trained(self) -> list[nn.Module]:  # noqa: D102
        return [self.model.embed_positions]

    def count_frames(self, num_samples: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return torch.div(num_samples + 319, 320, rounding_mode="floor")

    def inputs(self, wavs: torch.Tensor, num_samples: torch.Tensor) -> dict:  # noqa: D102
        return {"input_features": self.log_mel.to(wavs.device)(wavs, num_samples)}

    @property
    def front_convolutions(self) -> list[nn.Conv1d]:  # noqa: D102
        return [self.model.conv1, self.model.conv2]

    def valid_frames(self, lengths: torch.Tensor) -> None:  # noqa: D102
        return None  # silence is part of what Whisper reads, so nothing is masked

    def call_for(self, hidden: torch.Tensor, lengths: torch.Tensor) -> LayerCall:  # noqa: D102
        window = self.model.max_source_positions
        if hidden.shape[1] != window:
            raise ValueError(
                f"{hidden.shape[1]} frames were given; Whisper's layers also look at the silence "
                f"behind the speech, so a stored state must have all {window}"
            )
        return super().call_for(hidden, lengths)

    def call_with(self, hidden: torch.Tensor, valid: torch.Tensor | None) -> LayerCall:  # noqa: D102
        mask = None if valid is None else valid[:, None, None, :]
        return LayerCall((mask,), valid=valid)


class LogMelFamily(Family):
    """No encoder at all: state 0 is the log-mels that w2v-BERT reads. The baseline to beat.

    Arguments
    ---------
    num_mels : int
        Mel bins of each 10 ms frame.
    stride : int
        Frames stacked into one; 4 gives 25 Hz as the built-in encoder has it.
    """

    layers = nn.ModuleList()
    norm_comes_last = False

    def __init__(self, num_mels: int = 80, stride: int = 4):
        self.model = KaldiLogMel(num_mels, stride)
        self.model.config = PretrainedConfig()
        self.model.config.model_type = "logmel"
        self.preprocessor = {"num_mel_bins": num_mels, "stride": stride}
        self.padding = Padding()
        self.minimum_samples = 400 + 160 * (stride - 1)

    @property
    def hidden_size(self) -> int:  # noqa: D102
        return self.preprocessor["num_mel_bins"] * self.preprocessor["stride"]

    def count_frames(self, num_samples: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.model.count_frames(num_samples)

    def enter(self, wavs: torch.Tensor, num_samples: torch.Tensor):  # noqa: D102
        return *self.model(wavs, num_samples), LayerCall()


FAMILIES: dict[str, type[Family]] = {
    "wav2vec2": WaveformFamily,
    "hubert": WaveformFamily,
    "unispeech-sat": WaveformFamily,
    "wavlm": WavLMFamily,
    "data2vec-audio": Data2VecFamily,
    "wav2vec2-conformer": ConformerFamily,
    "wav2vec2-bert": W2vBertFamily,
    "whisper": WhisperFamily,
}
