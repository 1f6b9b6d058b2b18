"""The data set that settings ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from backforward_suite.data.splits import DataSplits, load_data
from backforward_suite.datafiles import stamps

if TYPE_CHECKING:  # pydantic is not needed to load data
    from backforward_suite.config import DataSettings


def load_asked(asked: DataSettings) -> DataSplits:
    """Load what the `data` group asks for, and note how its files looked before they were read.

    Raises:
        DataError: It cannot be had.
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
    return replace(data, files=before or stamps(asked.name, root))  # none before: they have been downloaded
