"""The frozen CNN of waveform encoders, on one utterance on a CPU: same states, less time and room.

Three things make it faster than a chain of convolutions. A strided convolution is a matrix product
of overlapping windows, which lie in memory as they are if channels come last. The group norm of the
first convolution is a linear map once its statistics are known, and these follow from the second
moments of the samples. And a slice of the speech goes through all convolutions while it is in the
processor's cache: what the first ones give, 32 MB for five seconds, is never written out.
"""

import torch
from torch import nn

_WINDOWS = 65536  # at a time, for the statistics of the group norm
_FRAMES = 64  # in a slice, of what the last convolution gives: 1.3 s at 50 frames a second


def is_known(cnn: nn.Module) -> bool:
    """Whether all convolutions and norms are of a kind that slices can have."""
    for number, layer in enumerate(cnn.conv_layers):
        conv, norm = layer.conv, getattr(layer, "layer_norm", None)
        plain = type(conv) is nn.Conv1d and conv.padding == (0,) and conv.dilation == (1,)
        if not plain or conv.groups != 1:
            return False
        by_channel = isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels
        if not (norm is None or isinstance(norm, nn.LayerNorm) or (by_channel and number == 0)):
            return False
    return True


def is_hooked(cnn: nn.Module) -> bool:
    """Whether a hook waits for anything in the CNN, those of adapters that do nothing left out."""
    for part in cnn.conv_layers.modules():
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
            applies = getattr(getattr(hook, "__self__", None), "applies", None)
            if applies is None or applies():
                return True
    return False


def as_matrices(cnn: nn.Module) -> list[torch.Tensor]:
    """Each convolution's weight as (kernel * channels in, channels out)."""
    return [layer.conv.weight.permute(2, 1, 0).flatten(0, 1) for layer in cnn.conv_layers]


def in_slices(cnn: nn.Module, matrices: list[torch.Tensor], wav: torch.Tensor) -> torch.Tensor:
    """What the CNN gives for one utterance (samples,): (frames, channels), without a graph."""
    kernels = [layer.conv.kernel_size[0] for layer in cnn.conv_layers]
    strides = [layer.conv.stride[0] for layer in cnn.conv_layers]
    field, hop, frames = 1, 1, len(wav)  # samples that a frame sees, samples between two frames
    for kernel, stride in zip(kernels, strides, strict=True):
        field, hop = field + (kernel - 1) * hop, hop * stride
        frames = (frames - kernel) // stride + 1
    biases = [layer.conv.bias for layer in cnn.conv_layers]
    first, norm = matrices[0], getattr(cnn.conv_layers[0], "layer_norm", None)
    if isinstance(norm, nn.GroupNorm):
        first, biases[0] = _with_group_norm(first, biases[0], norm, wav, kernels[0], strides[0])
    given = []
    for start in range(0, frames, _FRAMES):
        stop = min(frames, start + _FRAMES)
        hidden = wav[start * hop : (stop - 1) * hop + field, None]
        for number, layer in enumerate(cnn.conv_layers):
            matrix = matrices[number] if number else first
            hidden = _convolve(hidden, matrix, biases[number], kernels[number], strides[number])
            norm = getattr(layer, "layer_norm", None)
            hidden = norm(hidden) if isinstance(norm, nn.LayerNorm) else hidden
            hidden = layer.activation(hidden)
        given.append(hidden)
    return torch.cat(given)


def _convolve(
    hidden: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, kernel: int, stride: int
) -> torch.Tensor:
    """A convolution of (time, channels) as products, ``stride`` frames of the kernel at a time."""
    time, channels = hidden.shape
    rows, flat, given = (time - kernel) // stride + 1, hidden.reshape(-1), None
    for place in range(0, kernel, stride):
        part = matrix[place * channels : (place + stride) * channels]
        # Read where they are: a copy of all windows would be larger than what they are made of.
        windows = flat[place * channels :].as_strided((rows, len(part)), (stride * channels, 1))
        if given is not None:
            given.addmm_(windows, part)
        else:
            given = windows @ part if bias is None else torch.addmm(bias, windows, part)
    return given


def _with_group_norm(
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    norm: nn.GroupNorm,
    wav: torch.Tensor,
    kernel: int,
    stride: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix and bias of the first convolution and the norm behind it, for this utterance.

    Over windows ``x``, ``w · x + b`` has the mean ``w · mean(x) + b`` and variance ``w cov(x) w``.
    """
    exact = matrix.double()
    count, offset = (len(wav) - kernel) // stride + 1, wav.mean(dtype=torch.float64)
    mean, squares = exact.new_zeros(kernel), exact.new_zeros(kernel, kernel)
    for start in range(0, count, _WINDOWS):
        stop = min(count, start + _WINDOWS)
        samples = wav[start * stride : (stop - 1) * stride + kernel].double() - offset
        windows = samples.unfold(0, kernel, stride)
        mean, squares = mean + windows.sum(0) / count, squares + windows.t() @ windows / count
    covariance, mean = squares - torch.outer(mean, mean), mean + offset
    variance = ((covariance @ exact) * exact).sum(0)
    scale = (variance + norm.eps).rsqrt()
    shift = -(mean @ exact) * scale  # the convolution's own bias is taken off with the mean
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    return (exact * scale).to(matrix.dtype), shift.to(matrix.dtype)
