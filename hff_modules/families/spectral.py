"""Encoders that read log-mels, and log-mels alone."""

import torch
from torch import nn
from transformers import PretrainedConfig

from hff_modules.families.attention import HOOKED, give_relative_keys
from hff_modules.families.base import (
    Family,
    FeedForward,
    LayerCall,
    LayerParts,
    Padding,
    macaron_parts,
    transformer_parts,
)
from hff_modules.frontend import KaldiLogMel, WhisperLogMel, valid_mask


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
        self._make_positions_anew()
        if model.config.position_embeddings_type == "relative_key":
            for layer in self.layers:
                give_relative_keys(layer.self_attn)
            self.attention_implementation = HOOKED
            self.route_attention()

    def parts(self, number: int) -> LayerParts:  # noqa: D102
        return macaron_parts(self.layers[number - 1])

    def count_frames(self, num_samples: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.log_mel.count_frames(num_samples)

    def inputs(self, wavs: torch.Tensor, num_samples: torch.Tensor) -> dict:  # noqa: D102
        features, lengths = self.log_mel.to(wavs.device)(wavs, num_samples)
        padded = len(wavs) > 1 and bool((lengths != lengths.max()).any())
        mask = valid_mask(lengths, features.shape[1]).long() if padded else None
        return {"input_features": features, "attention_mask": mask}


class WhisperFamily(Family):
    """Whisper's encoder: always 30 s of log-mels, silence included, as it was trained."""

    hears_padding = True

    def __init__(self, model: nn.Module, preprocessor: dict):
        super().__init__(model, preprocessor)
        model.layerdrop = 0.0
        seconds = model.config.max_source_positions // 50
        self.log_mel = WhisperLogMel(model.config.num_mel_bins, seconds)
        self.maximum_samples = self.log_mel.num_samples

    norm_comes_last = True

    @property
    def stack(self) -> nn.Module:  # noqa: D102
        return self.model

    def parts(self, number: int) -> LayerParts:  # noqa: D102
        layer = self.layers[number - 1]
        branch = FeedForward(layer.final_layer_norm, layer.fc2, layer.fc1, layer.fc2)
        return transformer_parts(layer.self_attn, branch)

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
        with torch.autocast(wavs.device.type, enabled=False):  # see Family.enter
            return *self.model(wavs, num_samples), LayerCall()
