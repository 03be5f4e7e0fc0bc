"""The only place that knows the names inside other people's encoders."""

from hff_modules.families.attention import KeyValueHook
from hff_modules.families.base import Family, LayerCall, LayerParts
from hff_modules.families.spectral import LogMelFamily, W2vBertFamily, WhisperFamily
from hff_modules.families.waveform import (
    ConformerFamily,
    Data2VecFamily,
    WaveformFamily,
    WavLMFamily,
)

# By the ``model_type`` in an encoder's config.json.
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

__all__ = [
    "FAMILIES",
    "Family",
    "KeyValueHook",
    "LayerCall",
    "LayerParts",
    "LogMelFamily",
    "WhisperFamily",
]
