"""The data set of a run's settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from backforward_suite.data.splits import DataSplits, load_data
from backforward_suite.datafiles import stamps

if TYPE_CHECKING:  # pydantic is not needed to load data
    from backforward_suite.config import DataSettings


def load_asked(asked: DataSettings) -> DataSplits:
    """Load the data set of the `data` group, and note size and time of its files before reading them.

    Raises:
        DataError: The data set cannot be loaded.
    """
    root = Path(asked.root)
    before = stamps(asked.name, root)
    data = load_data(
        asked.name,
        root,
        protocol=asked.protocol,
        size=asked.size,
        train_images=asked.train_images,
        evaluation_images=asked.evaluation_images,
        layout=asked.layout,
    )
    return replace(data, files=before or stamps(asked.name, root))  # none before: they were downloaded
