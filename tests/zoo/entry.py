"""The definition of a network of the zoo: how to build it, its batches, its loss, what happens between batches."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = Callable[[], list[tuple[Any, Any]]]
Loss = Callable[[Any, Any], Tensor]
Build = TypeVar("Build", bound=Callable[[], nn.Module])

ROWS, FEATURES, CLASSES = 6, 5, 4


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        id: Unique and readable.
        about: What the network is for, in one line.
        build: Makes the network. It may draw, so `make` seeds the generators.
        batches: Makes the batches (x, y) of a training; they may differ from each other.
        loss_of: Returns the loss function for a network; it may read attributes that the forward set.
        between: Called with the network and i before batch i > 0.
        optimizers: Names in `check.OPTIMIZERS`.
        refused: Part of the one-line refusal, if the network may be refused.
        oracle: Whether the independent oracle, which copies the network in each pass, can handle it.
        groups: The argument of `Backforward`.
    """

    id: str
    about: str
    build: Callable[[], nn.Module]
    batches: Batches
    loss_of: Callable[[nn.Module], Loss] = lambda model: F.cross_entropy
    between: Callable[[nn.Module, int], None] | None = None
    optimizers: Sequence[str] = ("sgd", "adamw")
    refused: str = ""
    oracle: bool = True
    groups: str | int = "layer"

    def make(self) -> nn.Module:
        """Build the network in training mode, with the same weights and generator states each time."""
        seed()
        model = self.build().train()
        seed(1)
        return model


def seed(value: int = 0) -> None:
    """Seed all global generators."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


# --- Batches ---------------------------------------------------------------------------------------------------------


def generator(value: int = 0) -> torch.Generator:
    """Return a separate generator for making batches."""
    return torch.Generator().manual_seed(value)


def labels(rows: int, g: torch.Generator) -> Tensor:
    return torch.randint(CLASSES, (rows,), generator=g)


def vectors(rows: int = ROWS, steps: int = 3) -> list[tuple[Any, Any]]:
    """Return standard normal vectors with classes."""
    g = generator()
    return [(torch.randn(rows, FEATURES, generator=g), labels(rows, g)) for _ in range(steps)]


def images() -> list[tuple[Any, Any]]:
    """Return small images of two channels with classes."""
    g = generator()
    return [(torch.randn(ROWS, 2, 6, 6, generator=g), labels(ROWS, g)) for _ in range(3)]


def sequences() -> list[tuple[Any, Any]]:
    """Return sequences of seven vectors with classes."""
    g = generator()
    return [(torch.randn(ROWS, 7, FEATURES, generator=g), labels(ROWS, g)) for _ in range(3)]


def tokens() -> list[tuple[Any, Any]]:
    """Return sequences of seven tokens out of eleven, with classes."""
    g = generator()
    return [(torch.randint(11, (ROWS, 7), generator=g), labels(ROWS, g)) for _ in range(3)]


# --- Collecting ------------------------------------------------------------------------------------------------------


class Cases(list[Entry]):
    """Collects entries by the decorator `@cases.add()`, on a module class or a function that builds a module."""

    def add(self, batches: Batches = vectors, **rest: Any) -> Callable[[Build], Build]:
        """Add the decorated class or function under its own name, described by its docstring."""

        def collect(build: Build) -> Build:
            name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", build.__name__).lower().strip("_")
            self.append(Entry(name, (build.__doc__ or "").strip(), build, batches, **rest))
            return build

        return collect
