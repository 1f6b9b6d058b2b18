"""Labelled images in memory, as bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 1024  # images converted to floats at a time


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images; ``x`` is uint8 ``[N, C, H, W]``, ``y`` is int64 ``[N]``, both on one device.

    Raises:
        TypeError: ``x`` is not uint8, or ``y`` is not int64.
        ValueError: The shapes do not match.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.x.dtype != torch.uint8 or self.y.dtype != torch.int64:
            raise TypeError(f"images are uint8 with int64 labels, got {self.x.dtype} with {self.y.dtype}")
        if self.x.dim() != 4 or self.y.shape != self.x.shape[:1]:
            raise ValueError(
                f"images are [N, C, H, W] with labels [N], got {list(self.x.shape)} with {list(self.y.shape)}"
            )

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor | slice) -> Images:
        """Return the images at ``index`` (int64 ``[M]``, copied; or a slice, shared)."""
        return Images(self.x[index], self.y[index])

    def to(self, device: torch.device | str) -> Images:
        """Return the images on ``device``, without a copy if they are there."""
        return Images(self.x.to(device), self.y.to(device))

    def resize(self, size: int) -> Images:
        """Return the images at ``size`` x ``size`` pixels: bilinear, antialiased, rounded."""
        if self.x.shape[-2:] == (size, size):
            return self
        out = self.x.new_empty((*self.x.shape[:2], size, size))
        for to, block in zip(out.split(_BLOCK), self.x.split(_BLOCK), strict=True):  # no float copy of all images
            floats = F.interpolate(block.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
            to.copy_(floats.round_().clamp_(0, 255))
        return Images(out, self.y)
