"""Encoders that begin with a CNN over samples."""

import contextlib
import functools

import torch
from torch import nn

from hff_modules.families.attention import wavlm_attention
from hff_modules.families.base import (
    Family,
    FeedForward,
    LayerCall,
    LayerParts,
    Padding,
    macaron_parts,
    transformer_parts,
)
from hff_modules.families.frozen_cnn import as_matrices, in_slices, is_hooked, is_known
from hff_modules.frontend import normalise, valid_mask


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
        if torch.is_grad_enabled():
            rows = []
            for row, length in zip(hidden.split(1), lengths.tolist(), strict=True):
                row = super().forward(row[..., :length])
                rows.append(nn.functional.pad(row, (0, hidden.shape[-1] - length)))
            return torch.cat(rows)
        # In place: a second copy of all utterances would be the highest peak of memory.
        for row, length in zip(hidden.split(1), lengths.tolist(), strict=True):
            row[..., :length] = super().forward(row[..., :length])
            row[..., length:] = 0
        return hidden


class InPlaceGELU(nn.Module):
    """GELU that writes over its input where no gradient is asked for."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Any shape; what was given is lost without a graph."""
        if torch.is_grad_enabled():
            return nn.functional.gelu(hidden)
        return torch.ops.aten.gelu_(hidden)


def one_by_one(convolution: nn.Module, padding: Padding, wavs: torch.Tensor) -> torch.Tensor:
    """Run a frozen CNN on (batch, samples), on a CPU utterance by utterance, without padding.

    The first convolutions give much more than they read: one utterance of it is enough at a time,
    and a slice of it where no hook waits (see ``frozen_cnn``; fp32 only). Where anything in the CNN
    is trained, or its hooks treat utterances of a batch differently, the batch goes as it is.
    """
    forward = type(convolution).forward
    trained = any(p.requires_grad for p in convolution.parameters()) or wavs.requires_grad
    hooked = is_hooked(convolution)
    if trained or (padding.together and hooked) or wavs.device.type != "cpu":
        return forward(convolution, wavs)
    counts = padding.num_samples
    lengths = [wavs.shape[1]] * len(wavs) if counts is None else counts.tolist()
    signals = [wav[:length] for wav, length in zip(wavs, lengths, strict=True)]
    with contextlib.nullcontext() if hooked else torch.no_grad():
        if is_known(convolution) and not hooked and not torch.is_autocast_enabled("cpu"):
            matrices = as_matrices(convolution)
            rows = [in_slices(convolution, matrices, signal) for signal in signals]
        else:
            padding.num_samples = None  # of the signals, none is padded
            rows = [forward(convolution, signal[None])[0].t() for signal in signals]
            padding.num_samples = counts
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)


class WaveformFamily(Family):
    """wav2vec 2.0, XLS-R, MMS, HuBERT, UniSpeech-SAT: a CNN over samples, then a Transformer."""

    def __init__(self, model: nn.Module, preprocessor: dict):
        super().__init__(model, preprocessor)
        convolution = model.feature_extractor
        first = convolution.conv_layers[0]
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            first.layer_norm = MaskedGroupNorm(first.layer_norm, first.conv, self.padding)
        positions = getattr(self.stack, "pos_conv_embed", None)
        if getattr(positions, "batch_norm", None) is not None:  # it makes padding other than zero
            self._mask_padding_at(positions.conv)
        # Otherwise Hugging Face makes the waveform itself require a gradient in train mode.
        convolution._freeze_parameters()
        convolution.forward = functools.partial(one_by_one, convolution, self.padding)
        if model.config.feat_extract_activation == "gelu":
            for layer in convolution.conv_layers:
                layer.activation = InPlaceGELU()

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
        return transformer_parts(attention, branch)

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
                wavlm_attention, layer.attention
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
        self._make_positions_anew()
        for layer in self.layers:
            self._mask_padding_at(layer.conv_module.depthwise_conv)

    def parts(self, number: int) -> LayerParts:  # noqa: D102
        return macaron_parts(self.layers[number - 1])
