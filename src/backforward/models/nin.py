"""The Network in Network of the Normalization Propagation paper."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

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

SMALLEST = 17  # pixels per side: two poolings leave 5, the kernel size of conv7


class NIN(Chain):
    """Network in Network as in Arpit et al., "Normalization Propagation", ICML 2016, section 5.

    conv1 192 5x5 pad 2, conv2 160 1x1, pool1 max 3x3 stride 2 pad 1, conv3 96 1x1, conv4 192 5x5 pad 2, conv5 192
    1x1, pool2 average 3x3 stride 2 pad 1, conv6 192 1x1, conv7 192 5x5, conv8 192 1x1 pad 2, head (classes) 1x1, pool3
    average over all positions. At 32 x 32 pixels the sides are 32, 16 after pool1, 8 after pool2, 4, 8 again, 1.

    Shape: ``[N, *in_shape]`` to logits ``[N, classes]``.

    Args:
        in_shape: ``(channels, height, width)``, at least 17 x 17 pixels.
        classes: Number of logits.
        width: Scales the number of hidden filters.
        dropout: Probability of dropping a feature after pool1 and pool2 in training. The paper uses none with NormProp.
        norm, activation, jacobian_factor, init, seed: See ``MLP``.

    Raises:
        ValueError: A name is unknown, a size is out of range, or the images are too small.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        classes: int,
        width: float = 1.0,
        norm: str | Norm = "none",
        *,
        activation: str = "relu",
        jacobian_factor: str | float = "exact",
        dropout: float = 0.0,
        init: str = "glorot",
        seed: int | None = None,
    ) -> None:
        channels = image_channels(in_shape, SMALLEST, "NIN")
        at_least(1, classes=classes)
        blocks = Blocks(norm, activation, jacobian_factor)
        c96, c160, c192 = (scaled(filters, width) for filters in (96, 160, 192))
        with undisturbed_generator():
            layers: OrderedDict[str, nn.Module | None] = OrderedDict(
                conv1=blocks.conv(channels, c192, 5, padding=2),
                conv2=blocks.conv(c192, c160, 1),
                pool1=nn.MaxPool2d(3, 2, padding=1),
                dropout1=dropout_or_none(dropout),
                conv3=blocks.conv(c160, c96, 1),
                conv4=blocks.conv(c96, c192, 5, padding=2),
                conv5=blocks.conv(c192, c192, 1),
                pool2=nn.AvgPool2d(3, 2, padding=1),
                dropout2=dropout_or_none(dropout),
                conv6=blocks.conv(c192, c192, 1),
                conv7=blocks.conv(c192, c192, 5),
                conv8=blocks.conv(c192, c192, 1, padding=2),
                head=blocks.last_conv(c192, classes),
                pool3=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
            )
        super().__init__(OrderedDict((name, layer) for name, layer in layers.items() if layer is not None))
        initialise_(self, init, seed)
        use_channels_last_(self)
