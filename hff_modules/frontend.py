"""From waveforms to what an encoder reads: normalised samples, Kaldi log-mels, Whisper log-mels.

Batched torch versions of the feature extractors in Hugging Face Transformers
(``Wav2Vec2FeatureExtractor``, ``SeamlessM4TFeatureExtractor``, ``WhisperFeatureExtractor``). All
statistics are taken over the valid samples of each utterance, so an utterance gives the same
features alone as in any padded batch.
"""

import torch
from transformers.audio_utils import mel_filter_bank, window_function

SAMPLE_RATE = 16000
_MEL_FLOOR = 1.192092955078125e-07


def valid_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Boolean mask of the first ``lengths[b]`` of ``size`` positions.

    Arguments
    ---------
    lengths : torch.Tensor
        (batch,), whole numbers.
    size : int
        Number of positions.

    Returns
    -------
    torch.Tensor
        (batch, size), True where valid.
    """
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def normalise(values: torch.Tensor, mask: torch.Tensor, unbiased: bool = False) -> torch.Tensor:
    """Zero mean and unit variance over the valid positions of axis 1; padding becomes zero.

    Arguments
    ---------
    values : torch.Tensor
        (batch, time) or (batch, time, channels).
    mask : torch.Tensor
        (batch, time), True where valid.
    unbiased : bool
        Divide the squares by n - 1 instead of n.

    Returns
    -------
    torch.Tensor
        Same shape as ``values``.
    """
    if values.dim() == 3:
        mask = mask.unsqueeze(-1)
    mask = mask.to(values.dtype)
    count = mask.sum(1, keepdim=True).clamp(min=1)
    centred = (values - (values * mask).sum(1, keepdim=True) / count) * mask
    variance = centred.square().sum(1, keepdim=True) / (count - int(unbiased)).clamp(min=1)
    return centred / torch.sqrt(variance + 1e-7)


class KaldiLogMel(torch.nn.Module):
    """Normalised Kaldi log-mels, ``stride`` frames of 10 ms stacked into one (w2v-BERT 2.0).

    A last group with fewer than ``stride`` frames is dropped, so that the number of frames depends
    on the utterance alone.

    Arguments
    ---------
    num_mels : int
        Mel bins of each 10 ms frame.
    stride : int
        Frames stacked into one: 2 gives 50 Hz, 4 gives 25 Hz.

    Example
    -------
    >>> features, lengths = KaldiLogMel()(torch.randn(2, 16000), torch.tensor([16000, 8000]))
    >>> features.shape, lengths.tolist()
    (torch.Size([2, 49, 160]), [49, 24])
    """

    def __init__(self, num_mels: int = 80, stride: int = 2):
        super().__init__()
        self.num_mels, self.stride = num_mels, stride
        mels = mel_filter_bank(
            257, num_mels, 20, SAMPLE_RATE // 2, SAMPLE_RATE, None, "kaldi", True
        )
        window = window_function(400, "povey", periodic=False)
        self.register_buffer("mels", torch.tensor(mels, dtype=torch.float32), persistent=False)
        self.register_buffer("window", torch.tensor(window, dtype=torch.float32), persistent=False)

    def count_frames(self, num_samples: torch.Tensor) -> torch.Tensor:
        """Stacked frames of utterances with ``num_samples`` samples each."""
        fbank_frames = torch.div(num_samples - 400, 160, rounding_mode="floor") + 1
        return torch.div(fbank_frames, self.stride, rounding_mode="floor").clamp(min=0)

    def forward(
        self, wavs: torch.Tensor, num_samples: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute features.

        Arguments
        ---------
        wavs : torch.Tensor
            (batch, samples), 16 kHz, -1 to 1.
        num_samples : torch.Tensor
            (batch,), valid samples.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            Features (batch, frames, stride * num_mels) and valid frames (batch,).
        """
        frames = (wavs * 2**15).unfold(1, 400, 160)
        frames = frames - frames.mean(-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        frames = (frames - 0.97 * previous) * self.window
        power = torch.fft.rfft(frames, n=512).abs().square()
        log_mels = torch.log((power @ self.mels).clamp(min=_MEL_FLOOR))
        fbank_frames = torch.div(num_samples - 400, 160, rounding_mode="floor") + 1
        log_mels = normalise(log_mels, valid_mask(fbank_frames, log_mels.shape[1]), unbiased=True)
        lengths = self.count_frames(num_samples)
        steps = int(lengths.max())
        stacked = log_mels[:, : steps * self.stride].reshape(len(wavs), steps, -1)
        return stacked * valid_mask(lengths, steps).unsqueeze(-1), lengths


class WhisperLogMel(torch.nn.Module):
    """Whisper's log-mels of an utterance padded with silence to the window (30 s).

    Arguments
    ---------
    num_mels : int
        Mel bins (80 or 128).
    window_seconds : int
        Length that every utterance is padded to.
    """

    def __init__(self, num_mels: int = 80, window_seconds: int = 30):
        super().__init__()
        self.num_samples = window_seconds * SAMPLE_RATE
        mels = mel_filter_bank(201, num_mels, 0.0, 8000.0, SAMPLE_RATE, "slaney", "slaney")
        self.register_buffer("mels", torch.tensor(mels, dtype=torch.float32), persistent=False)
        self.register_buffer("window", torch.hann_window(400), persistent=False)

    def forward(self, wavs: torch.Tensor, num_samples: torch.Tensor) -> torch.Tensor:
        """Compute features.

        Arguments
        ---------
        wavs : torch.Tensor
            (batch, samples), 16 kHz, -1 to 1.
        num_samples : torch.Tensor
            (batch,), valid samples.

        Returns
        -------
        torch.Tensor
            (batch, num_mels, 100 * window_seconds).

        Raises
        ------
        ValueError
            When an utterance is longer than the window.
        """
        longest = int(num_samples.max())
        if longest > self.num_samples:
            raise ValueError(
                f"Whisper reads at most {self.num_samples / SAMPLE_RATE:g} s at once; an utterance "
                f"of this batch has {longest / SAMPLE_RATE:.1f} s"
            )
        wavs = wavs[:, :longest] * valid_mask(num_samples, longest)
        wavs = torch.nn.functional.pad(wavs, (0, self.num_samples - longest))
        spectrum = torch.stft(wavs, 400, 160, window=self.window, return_complex=True)[..., :-1]
        log_mels = (self.mels.T @ spectrum.abs().square()).clamp(min=1e-10).log10()
        floor = log_mels.amax(dim=(1, 2), keepdim=True) - 8.0
        return (torch.maximum(log_mels, floor) + 4.0) / 4.0
