"""The one place that knows how a layer, its normalisation and its activation go together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

NORMS = ("none", "batch")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


@dataclass(frozen=True)
class Blocks:
    """Makes the blocks of a network: ``norm`` decides what stands between a layer and its activation.

    ======= ================================================================ =======================
    norm    hidden block                                                     last layer
    ======= ================================================================ =======================
    none    layer with bias, activation                                      layer with bias
    batch   layer without bias, BatchNorm, activation                        layer with bias
    ======= ================================================================ =======================

    The layer is called ``linear`` or ``conv`` under every norm, so that weights can be compared by name.

    Raises:
        ValueError: If a name is unknown or ``dropout`` is outside [0, 1).
    """

    norm: str = "none"
    activation: str = "relu"
    jacobian_factor: str | float = "exact"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}: there are {', '.join(NORMS)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}: there are {', '.join(ACTIVATIONS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout}")

    def linear(self, d_in: int, d_out: int) -> nn.Sequential:
        """A hidden fully connected block, dropout included: ``[N, d_in]`` to ``[N, d_out]``."""
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["linear"] = nn.Linear(d_in, d_out, bias=self.norm == "none")
        if self.norm == "batch":
            parts["norm"] = nn.BatchNorm1d(d_out)
        parts["act"] = ACTIVATIONS[self.activation]()
        if self.dropout:
            parts["dropout"] = nn.Dropout(self.dropout)
        return nn.Sequential(parts)

    def last_linear(self, d_in: int, d_out: int) -> nn.Module:
        """The layer that gives the logits: ``[N, d_in]`` to ``[N, d_out]``."""
        return nn.Linear(d_in, d_out)


def at_least(least: int, **values: int) -> None:
    """Raise ValueError for the first of the named values that is less than ``least``."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
