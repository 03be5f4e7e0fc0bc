"""Training loops, one file per task; ``base`` and ``job`` hold what they share."""

from hff_modules.brains.base import SSLBrain
from hff_modules.brains.classification import ClassificationBrain, train_classification
from hff_modules.brains.ctc import CTCBrain, train_ctc
from hff_modules.brains.job import enter_folder, manifests_folder, prepared
from hff_modules.brains.speaker import SpeakerBrain, train_speaker

__all__ = [
    "CTCBrain",
    "ClassificationBrain",
    "SSLBrain",
    "SpeakerBrain",
    "enter_folder",
    "manifests_folder",
    "prepared",
    "train_classification",
    "train_ctc",
    "train_speaker",
]
