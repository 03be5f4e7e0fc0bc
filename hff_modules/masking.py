"""Masking of the fused features in time and width: SpecAugment's idea (arXiv 1904.08779).

Masked here and not in the waveform or inside the encoder, so that the states of a frozen trunk stay
the same in every epoch and can be kept on disk.
"""

import torch
from torch import nn


class FeatureMasking(nn.Module):
    """Zero spans of frames and bands of features, in training only.

    SpeechBrain's ``SpectrogramDrop`` draws positions over the padded length, so a short utterance
    in a long batch is hardly masked; here each utterance is masked within its own frames.

    Arguments
    ---------
    time_masks : int
        Spans per utterance; 0 for none.
    time_width : float
        Longest span, as a share of the utterance's frames.
    width_masks : int
        Bands per utterance; 0 for none.
    width_share : float
        Widest band, as a share of the features.

    Example
    -------
    >>> masking = FeatureMasking(time_masks=1, time_width=0.5, width_masks=0)
    >>> masked = masking(torch.ones(2, 8, 4), torch.tensor([8, 4]))
    >>> bool((masked[1, 4:] == 1).all()), masking.eval()(masked, None) is masked
    (True, True)
    """

    def __init__(
        self,
        time_masks: int = 2,
        time_width: float = 0.05,
        width_masks: int = 2,
        width_share: float = 0.1,
    ):
        super().__init__()
        for name, share in (("time_width", time_width), ("width_share", width_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: expected a share from 0 to 1")
        self.time_masks, self.time_width = time_masks, time_width
        self.width_masks, self.width_share = width_masks, width_share

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Mask features.

        Arguments
        ---------
        features : torch.Tensor
            (batch, frames, width).
        lengths : torch.Tensor
            (batch,), valid frames of each utterance.

        Returns
        -------
        torch.Tensor
            (batch, frames, width); the very same tensor in evaluation.
        """
        if not self.training or self.time_masks + self.width_masks == 0:
            return features
        batch, frames, width = features.shape
        in_time = _spans(self.time_masks, lengths, self.time_width, frames)
        widths = torch.full((batch,), width)
        in_width = _spans(self.width_masks, widths, self.width_share, width)
        masked = in_time[:, :, None] | in_width[:, None, :]
        return features.masked_fill(masked.to(features.device), 0.0)


def _spans(count: int, sizes: torch.Tensor, share: float, total: int) -> torch.Tensor:
    """Draw ``count`` spans inside ``[0, size)`` for each size; (len(sizes), total), True inside."""
    # Drawn on the CPU: one generator to save and restore, the same masks on every device.
    sizes = sizes.cpu().float()[:, None]
    spans = (torch.rand(len(sizes), count) * (sizes * share + 1)).floor()
    spans = torch.minimum(spans, (sizes * share).floor())
    starts = (torch.rand(len(sizes), count) * (sizes - spans + 1)).floor()
    positions = torch.arange(total)
    inside = (positions >= starts[..., None]) & (positions < (starts + spans)[..., None])
    return inside.any(1)
