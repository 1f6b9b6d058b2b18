"""Blocks: a layer with its normalisation and activation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from backforward.models.norms import Norm
from backforward.moments import ACTIVATIONS, make_activation
from backforward.normprop import NormPropConv2d, NormPropLinear, StandardizedActivation, check_jacobian_factor

NORMS = ("none", "batch", "prop")


@dataclass(frozen=True)
class Blocks:
    """Makes the blocks of a network; ``norm`` decides what comes between a layer and its activation.

    | norm  | hidden block                                  | last layer                               |
    |-------|-----------------------------------------------|------------------------------------------|
    | none  | layer with bias, activation                   | layer with bias                          |
    | batch | layer without bias, BatchNorm, activation     | layer with bias                          |
    | prop  | NormProp layer, which includes the activation | gamma (W * x) / norm(W) + beta           |
    | other | layer, the norm's module, activation          | layer with bias                          |

    Any other norm is a function of the layer (see ``models.norms``). The layer loses its bias if the norm's module has
    a shift of its own.

    NormProp's last layer has no activation, so it has neither J nor post-normalisation, and it is not projected: the
    paper constrains hidden weights only (section 4.4). The layer is called ``linear`` or ``conv`` under every norm, so
    that weights can be compared by name.

    Raises:
        ValueError: A name is unknown.
    """

    norm: str | Norm = "none"
    activation: str = "relu"
    jacobian_factor: str | float = "exact"

    def __post_init__(self) -> None:
        if not callable(self.norm) and self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}: there are {', '.join(NORMS)}, and functions of a layer")
        make_activation(self.activation)
        check_jacobian_factor(self.jacobian_factor)

    def linear(self, d_in: int, d_out: int) -> nn.Sequential:
        """Return a hidden fully connected block: ``[N, d_in]`` to ``[N, d_out]``."""
        if self.norm == "prop":
            prop = NormPropLinear(d_in, d_out, activation=self.activation, jacobian_factor=self.jacobian_factor)
            return named(linear=prop)
        linear = nn.Linear(d_in, d_out, bias=self.norm != "batch")
        norm = self._after(linear) if callable(self.norm) else nn.BatchNorm1d(d_out) if self.norm == "batch" else None
        return named(linear=linear, norm=norm, act=self.activate())

    def conv(
        self, c_in: int, c_out: int, size: int, *, stride: int = 1, padding: int = 0, activate: bool = True
    ) -> nn.Sequential:
        """Return a hidden convolutional block, zero-padded: ``[N, c_in, H, W]`` to ``[N, c_out, H', W']``.

        With ``activate=False`` it ends with its normalisation (before the sum of a residual block).
        """
        if self.norm == "prop":
            activation, factor = (self.activation, self.jacobian_factor) if activate else ("identity", "none")
            prop = NormPropConv2d(c_in, c_out, size, stride, padding, activation=activation, jacobian_factor=factor)
            return named(conv=prop)
        conv = nn.Conv2d(c_in, c_out, size, stride, padding, bias=self.norm != "batch")
        norm = self._after(conv) if callable(self.norm) else nn.BatchNorm2d(c_out) if self.norm == "batch" else None
        return named(conv=conv, norm=norm, act=self.activate() if activate else None)

    def _after(self, layer: nn.Linear | nn.Conv2d) -> nn.Module | None:
        """Apply a norm that is a function to a layer, and return the norm's module."""
        assert callable(self.norm)
        norm = self.norm(layer)
        if norm is not None and getattr(norm, "bias", None) is not None:
            layer.bias = None
        return norm

    def activate(self) -> nn.Module:
        """Return the activation, which may overwrite its input; for NormProp standardised, for input of variance 1."""
        if self.norm == "prop":
            return StandardizedActivation(self.activation)
        if self.activation == "relu":
            return nn.ReLU(inplace=True)  # backward needs its output only: half the memory, .9 of the time
        return ACTIVATIONS[self.activation]()

    def last_linear(self, d_in: int, d_out: int) -> nn.Module:
        """Return the layer that computes the logits: ``[N, d_in]`` to ``[N, d_out]``."""
        if self.norm == "prop":
            return NormPropLinear(d_in, d_out, activation="identity", jacobian_factor="none", project=False)
        return nn.Linear(d_in, d_out)

    def last_conv(self, c_in: int, c_out: int) -> nn.Module:
        """Return the 1 x 1 convolution that computes a logit per class and position."""
        if self.norm == "prop":
            return NormPropConv2d(c_in, c_out, 1, activation="identity", jacobian_factor="none", project=False)
        return nn.Conv2d(c_in, c_out, 1)


class Chain(nn.Sequential):
    """An `nn.Sequential` that can be sliced although its subclasses have constructors of their own."""

    def __getitem__(self, index: slice | int) -> Any:
        """Return a module, or a plain `nn.Sequential` for a slice."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)


def named(**modules: nn.Module | None) -> nn.Sequential:
    """Return a sequence of the named modules that are not None."""
    return nn.Sequential(OrderedDict({name: module for name, module in modules.items() if module is not None}))


def dropout_or_none(share: float) -> nn.Module | None:
    """Return dropout with this probability, or None for 0; raise `ValueError` outside [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {share}")
    return nn.Dropout(share) if share else None


def scaled(filters: int, width: float) -> int:
    """Return the number of filters scaled by ``width``, at least 1; raise `ValueError` unless ``width`` > 0."""
    if not width > 0:
        raise ValueError(f"width must be more than 0, got {width}")
    return max(1, round(filters * width))


def image_channels(in_shape: Sequence[int], smallest: int, network: str) -> int:
    """Return the channels of a shape ``(channels, height, width)``; raise `ValueError` for any other or smaller one."""
    if len(in_shape) != 3 or min(in_shape) < 1:
        raise ValueError(f"{network} needs images of shape (channels, height, width), got {tuple(in_shape)}")
    channels, height, width = in_shape
    if min(height, width) < smallest:
        raise ValueError(
            f"{network} needs at least {smallest} x {smallest} pixels, got {height} x {width}: enlarge them"
        )
    return channels


def use_channels_last_(network: nn.Module) -> None:
    """Store filters, and so all activations, with the channels innermost, for any layout of the images.

    This is faster on a CPU (``make bench``). ``network.to(memory_format=torch.contiguous_format)`` undoes it.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs


def at_least(least: int, **values: int) -> None:
    """Raise `ValueError` for the first of the named values below ``least``."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
