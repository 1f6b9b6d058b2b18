"""Update rules and layers meant to remove internal covariate shift, with tools to test whether they do.

Public names are imported on first use, so tools that only read run folders do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backforward.data_norm import DataNorm
    from backforward.loops import in_accelerate, in_lightning
    from backforward.moments import gaussian_moments
    from backforward.normprop import NormPropConv2d, NormPropLinear, unit_norm_projection
    from backforward.rules import Backforward, Backprop
from backforward.switch import Switch

__version__ = "0.2.0"

_HOME = {
    "Backforward": "rules",
    "Backprop": "rules",
    "DataNorm": "data_norm",
    "NormPropConv2d": "normprop",
    "NormPropLinear": "normprop",
    "Switch": "switch",
    "gaussian_moments": "moments",
    "in_accelerate": "loops",
    "in_lightning": "loops",
    "unit_norm_projection": "normprop",
}

__all__ = [
    "Backforward",
    "Backprop",
    "DataNorm",
    "NormPropConv2d",
    "NormPropLinear",
    "Switch",
    "__version__",
    "gaussian_moments",
    "in_accelerate",
    "in_lightning",
    "unit_norm_projection",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'backforward' has no attribute {name!r}")
    return getattr(import_module(f"backforward.{_HOME[name]}"), name)
