"""Data sets, their splits, and batches out of memory."""

from backforward.data.errors import DataError
from backforward.data.images import Images
from backforward.data.loader import AUGMENTATIONS, EpochLoader
from backforward.data.sources import KNOWN, default_root
from backforward.data.splits import PROTOCOLS, DataSplits, load_data

__all__ = [
    "AUGMENTATIONS",
    "KNOWN",
    "PROTOCOLS",
    "DataError",
    "DataSplits",
    "EpochLoader",
    "Images",
    "default_root",
    "load_data",
]
