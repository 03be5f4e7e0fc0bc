"""Training loops, one file per task; ``base`` holds what they share."""

from hff_modules.brains.base import SSLBrain
from hff_modules.brains.ctc import CTCBrain, train_ctc

__all__ = ["CTCBrain", "SSLBrain", "train_ctc"]
