"""Batches of images for the classifiers of the zoo."""

from __future__ import annotations

from typing import Any

import torch
from tests.zoo.entry import generator, labels

STEPS = 3


def pictures(size: int, rows: int = 4) -> list[tuple[Any, Any]]:
    """Return square images of three channels with classes."""
    g = generator()
    return [(torch.randn(rows, 3, size, size, generator=g), labels(rows, g)) for _ in range(STEPS)]
