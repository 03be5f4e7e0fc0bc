"""Select layers of a frozen speech encoder and fuse them hierarchically, in SpeechBrain."""

from hff_modules import adapters
from hff_modules.encoder import SSLEncoder
from hff_modules.fusion import (
    ConcatProjection,
    HierarchicalConv,
    HierarchicalFusion,
    InterAdapter,
    LastLayer,
    LayerAdapters,
    WeightedSum,
)

__version__ = "0.1.0"

__all__ = [
    "ConcatProjection",
    "HierarchicalConv",
    "HierarchicalFusion",
    "InterAdapter",
    "LastLayer",
    "LayerAdapters",
    "SSLEncoder",
    "WeightedSum",
    "adapters",
]
