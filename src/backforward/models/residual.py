"""The residual network for CIFAR by He et al., 2016."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backforward.models.blocks import (
    Blocks,
    Chain,
    at_least,
    dropout_or_none,
    image_channels,
    scaled,
    use_channels_last_,
)
from backforward.models.init import initialise_, undisturbed_generator
from backforward.models.norms import Norm


class ResidualBlock(nn.Module):
    """``act(conv2(conv1(x)) + shortcut(x))`` with a shortcut that has no parameters (He et al., section 4.2, option A).

    If the block halves the image and adds channels, the shortcut takes every other pixel and is 0 in the new channels.
    Under NormProp, the sum of two values of variance 1 is scaled back to variance 1 before the standardised activation.

    Shape: ``[N, c_in, H, W]`` to ``[N, c_out, H / stride, W / stride]``, rounded up.
    """

    scale: Tensor | None

    def __init__(self, blocks: Blocks, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = blocks.conv(c_in, c_out, 3, stride=stride, padding=1)
        self.conv2 = blocks.conv(c_out, c_out, 3, padding=1, activate=False)
        self.act = blocks.activate()
        self.stride = stride
        self.new_channels = c_out - c_in
        scale = None
        if blocks.norm == "prop":
            scale = torch.ones(c_out, 1, 1)
            scale[:c_in] = math.sqrt(0.5)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the transformed input to the shortcut."""
        branch = self.conv2(self.conv1(x))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        total = branch + x
        out: Tensor = self.act(total if self.scale is None else total * self.scale)
        return out


class Residual(Chain):
    """Residual network of He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

    A 3 x 3 convolution; three groups of (depth - 2) / 6 blocks with 16, 32 and 64 filters, of which the last two halve
    the image; the average over all positions; a linear layer. The default is ResNet-20, which has 269,722 parameters
    with BatchNorm and 10 classes.

    Shape: ``[N, *in_shape]`` to logits ``[N, classes]``.

    Args:
        in_shape: ``(channels, height, width)``.
        classes: Number of logits.
        depth: Number of layers with weights: 8, 14, 20, 26, ...
        width: Scales the number of filters.
        dropout: Probability of dropping a feature before the last layer in training.
        norm, activation, jacobian_factor, init, seed: See ``MLP``.

    Raises:
        ValueError: A name is unknown or a size is out of range.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        classes: int,
        depth: int = 20,
        width: float = 1.0,
        *,
        norm: str | Norm = "batch",
        activation: str = "relu",
        jacobian_factor: str | float = "exact",
        dropout: float = 0.0,
        init: str = "he",
        seed: int | None = None,
    ) -> None:
        channels = image_channels(in_shape, 1, "Residual")
        at_least(1, classes=classes)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 8, 14, 20, ... (2 more than a multiple of 6), got {depth}")
        blocks = Blocks(norm, activation, jacobian_factor)
        widths = [scaled(filters, width) for filters in (16, 32, 64)]
        with undisturbed_generator():
            layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=blocks.conv(channels, widths[0], 3, padding=1))
            c_in = widths[0]
            for group, c_out in enumerate(widths, start=1):
                for block in range(1, (depth - 2) // 6 + 1):
                    stride = 2 if group > 1 and block == 1 else 1
                    layers[f"block{group}_{block}"] = ResidualBlock(blocks, c_in, c_out, stride)
                    c_in = c_out
            layers["pool"] = nn.AdaptiveAvgPool2d(1)
            layers["flatten"] = nn.Flatten()
            if drop := dropout_or_none(dropout):
                layers["dropout"] = drop
            layers["head"] = blocks.last_linear(c_in, classes)
        super().__init__(layers)
        initialise_(self, init, seed)
        use_channels_last_(self)
