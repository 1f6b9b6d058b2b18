"""The data set that settings ask for."""

from __future__ import annotations

from pathlib import Path

from backforward_suite.config import DataSettings
from backforward_suite.data.splits import DataSplits, load_data


def load_asked(asked: DataSettings) -> DataSplits:
    """Load what the `data` group asks for.

    Raises:
        DataError: It cannot be had.
    """
    return load_data(
        asked.name,
        Path(asked.root),
        protocol=asked.protocol,
        size=asked.size,
        train_images=asked.train_images,
        evaluation_images=asked.evaluation_images,
    )
