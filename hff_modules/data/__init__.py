"""Data: audio files, manifests, text units and the built-in spoken corpus."""

from hff_modules.data.audio import AudioError, AudioInfo, audio_info, read_audio
from hff_modules.data.manifest import (
    ManifestError,
    ManifestSummary,
    summarize_manifest,
    write_manifest,
)
from hff_modules.data.spoken import prepare_spoken
from hff_modules.data.text import CharUnits, SentencePieceUnits, build_units, load_units

__all__ = [
    "AudioError",
    "AudioInfo",
    "CharUnits",
    "ManifestError",
    "ManifestSummary",
    "SentencePieceUnits",
    "audio_info",
    "build_units",
    "load_units",
    "prepare_spoken",
    "read_audio",
    "summarize_manifest",
    "write_manifest",
]
