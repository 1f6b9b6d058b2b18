"""Runs experiments with Backforward: configs, training, sweeps, studies, reports."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load"]


def load(folder: Path | str, checkpoint: Literal["last", "best"] = "last") -> nn.Module:
    """Return the trained network of a run: see `backforward_suite.trained.load`."""
    # Imported on first use: torch takes seconds, which a skipped run does not need.
    network: nn.Module = import_module("backforward_suite.trained").load(folder, checkpoint)
    return network
