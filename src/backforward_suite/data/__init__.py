"""Data sets, their splits, and batches from memory."""

from backforward_suite.data.asked import load_asked
from backforward_suite.data.errors import DataError
from backforward_suite.data.images import Images
from backforward_suite.data.loader import AUGMENTATIONS, EpochLoader
from backforward_suite.data.sources import KNOWN, default_root
from backforward_suite.data.splits import PROTOCOLS, DataSplits, load_data

__all__ = [
    "AUGMENTATIONS",
    "KNOWN",
    "PROTOCOLS",
    "DataError",
    "DataSplits",
    "EpochLoader",
    "Images",
    "default_root",
    "load_asked",
    "load_data",
]
