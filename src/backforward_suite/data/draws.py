"""Class-balanced draws that are the same in every version: NumPy froze the stream of ``RandomState`` (NEP 19)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SEED = 0  # of every split, independent of a run's seed


def turns(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shuffle each class: return for each image how many of its class come before it, ``[N]``.

    ``turns(labels) < n`` then draws n images of each class, and a smaller n draws a subset of them.
    """
    random, turn = np.random.RandomState(_SEED), np.empty(len(labels), np.int64)
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        turn[random.permutation(members)] = np.arange(len(members))
    return turn


def first(labels: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Draw ``count`` images, balanced over classes to within one image; return the mask, ``[N]``.

    A smaller count draws a subset of a larger one's images.
    """
    order = np.lexsort((np.random.RandomState(_SEED).permutation(len(labels)), turns(labels)))
    mask = np.zeros(len(labels), bool)
    mask[order[:count]] = True
    return mask
