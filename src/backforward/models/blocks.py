"""The one place that knows how a layer, its normalisation and its activation go together."""

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
    """Makes the blocks of a network: ``norm`` decides what stands between a layer and its activation.

    ======= ============================================== =====================================
    norm    hidden block                                   last layer
    ======= ============================================== =====================================
    none    layer with bias, activation                    layer with bias
    batch   layer without bias, BatchNorm, activation      layer with bias
    prop    NormProp layer, which includes the activation  gamma (W * x) / ||W|| + beta
    other   layer, what it makes of the layer, activation  layer with bias
    ======= ============================================== =====================================

    Other norms are functions of the layer (``models.norms``): of a layer with bias, which is taken away where the
    norm's module has a shift of its own.

    NormProp's last layer has no activation, so neither J nor post-normalisation, and is not projected: the paper
    constrains hidden weights (section 4.4). The layer is called ``linear`` or ``conv`` under every norm, so that
    weights can be compared by name.

    Raises:
        ValueError: If a name is unknown.
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
        """A hidden fully connected block: ``[N, d_in]`` to ``[N, d_out]``."""
        if self.norm == "prop":
            prop = NormPropLinear(d_in, d_out, activation=self.activation, jacobian_factor=self.jacobian_factor)
            return named(linear=prop)
        linear = nn.Linear(d_in, d_out, bias=self.norm != "batch")
        norm = self._after(linear) if callable(self.norm) else nn.BatchNorm1d(d_out) if self.norm == "batch" else None
        return named(linear=linear, norm=norm, act=self.activate())

    def conv(
        self, c_in: int, c_out: int, size: int, *, stride: int = 1, padding: int = 0, activate: bool = True
    ) -> nn.Sequential:
        """A hidden convolutional block, zero-padded: ``[N, c_in, H, W]`` to ``[N, c_out, H', W']``.

        With ``activate=False`` it ends in its normalisation (before the sum of a residual block).
        """
        if self.norm == "prop":
            activation, factor = (self.activation, self.jacobian_factor) if activate else ("identity", "none")
            prop = NormPropConv2d(c_in, c_out, size, stride, padding, activation=activation, jacobian_factor=factor)
            return named(conv=prop)
        conv = nn.Conv2d(c_in, c_out, size, stride, padding, bias=self.norm != "batch")
        norm = self._after(conv) if callable(self.norm) else nn.BatchNorm2d(c_out) if self.norm == "batch" else None
        return named(conv=conv, norm=norm, act=self.activate() if activate else None)

    def _after(self, layer: nn.Linear | nn.Conv2d) -> nn.Module | None:
        """What a norm that is a function puts after a layer."""
        assert callable(self.norm)
        norm = self.norm(layer)
        if norm is not None and getattr(norm, "bias", None) is not None:
            layer.bias = None
        return norm

    def activate(self) -> nn.Module:
        """The activation alone, which may overwrite its input; with NormProp standardised, for input of variance 1."""
        if self.norm == "prop":
            return StandardizedActivation(self.activation)
        if self.activation == "relu":
            return nn.ReLU(inplace=True)  # backward needs its output only: half the memory, and BatchNorm's step 0.9
        return ACTIVATIONS[self.activation]()

    def last_linear(self, d_in: int, d_out: int) -> nn.Module:
        """The layer that gives the logits: ``[N, d_in]`` to ``[N, d_out]``."""
        if self.norm == "prop":
            return NormPropLinear(d_in, d_out, activation="identity", jacobian_factor="none", project=False)
        return nn.Linear(d_in, d_out)

    def last_conv(self, c_in: int, c_out: int) -> nn.Module:
        """The 1 x 1 convolution that gives a logit for each class and position."""
        if self.norm == "prop":
            return NormPropConv2d(c_in, c_out, 1, activation="identity", jacobian_factor="none", project=False)
        return nn.Conv2d(c_in, c_out, 1)


class Chain(nn.Sequential):
    """A sequence whose slices are plain sequences, as a subclass with its own constructor cannot be called for one."""

    def __getitem__(self, index: slice | int) -> Any:
        """A module, or a plain sequence of several."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)


def named(**modules: nn.Module | None) -> nn.Sequential:
    """A sequence of named modules, without those that are None."""
    return nn.Sequential(OrderedDict({name: module for name, module in modules.items() if module is not None}))


def dropout_or_none(share: float) -> nn.Module | None:
    """Dropout of that share, or None for none.

    Raises:
        ValueError: If the share is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {share}")
    return nn.Dropout(share) if share else None


def scaled(filters: int, width: float) -> int:
    """So many filters times the width, at least one.

    Raises:
        ValueError: If the width is not positive.
    """
    if not width > 0:
        raise ValueError(f"width must be more than 0, got {width}")
    return max(1, round(filters * width))


def image_channels(in_shape: Sequence[int], smallest: int, network: str) -> int:
    """The channels of images of shape ``(channels, height, width)``.

    Raises:
        ValueError: If it is no such shape or a side has less than ``smallest`` pixels.
    """
    if len(in_shape) != 3 or min(in_shape) < 1:
        raise ValueError(f"{network} needs images of shape (channels, height, width), got {tuple(in_shape)}")
    channels, height, width = in_shape
    if min(height, width) < smallest:
        raise ValueError(
            f"{network} needs at least {smallest} x {smallest} pixels, got {height} x {width}: enlarge them"
        )
    return channels


def use_channels_last_(network: nn.Module) -> None:
    """Keep filters, and so every activation, with the channels innermost, whatever the layout of the images.

    It pays on a CPU (``make bench``). ``network.to(memory_format=torch.contiguous_format)`` undoes it.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs


def at_least(least: int, **values: int) -> None:
    """Raise ValueError for the first of the named values that is less than ``least``."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
