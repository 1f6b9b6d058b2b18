"""Normalises a network's input with statistics of the training set or of the mini-batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary


def visible(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a custom function visible to function modes as one call: `autograd.Function.apply` bypasses them."""

    @functools.wraps(function)
    def call(tensor: Tensor, *rest: Any) -> Tensor:
        if has_torch_function_unary(tensor):
            seen: Tensor = handle_torch_function(call, (tensor,), tensor, *rest)
            return seen
        return function(tensor, *rest)

    return call


@visible
def _scaled_and_shifted(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``x * scale + shift``, with one number per channel or pixel ``[C, H, W]`` in each."""
    # Expand both to all pixels first: with two operands of one number per channel, addcmul takes four times as long.
    shift, scale = (each.expand(x.shape[-3:]).contiguous() for each in (shift, scale))
    return torch.addcmul(shift, x, scale)


DATA_NORMS = ("global", "channel", "batch", "none")

#: A standard deviation below this share of the input's range counts as 1 (for a pixel that is always black, say).
CONSTANT_FEATURE_STD = 1e-3


class DataNorm(nn.Module):
    """Normalise the network's input: ``(x - mean) / std``. Put this layer, which has no parameters, first.

    | kind    | mean and std                                                                                      |
    |---------|---------------------------------------------------------------------------------------------------|
    | global  | per feature (channel and pixel) over the training set (NormProp, section 4.2)                     |
    | channel | per channel over the training set                                                                 |
    | batch   | per feature over the mini-batch (section 4.2); in evaluation, averages over all training batches  |
    | none    | 0 and 1                                                                                           |

    A std below 1e-3 counts as 1. ``batch`` weights all batches equally in its averages, where BatchNorm favours recent
    ones: the input's distribution is fixed.

    Shape: ``[N, C, H, W]`` to the same; values in [0, 1].

    Examples:
        >>> norm = DataNorm.fit("channel", images)      # uint8 [N, C, H, W]
        >>> network = nn.Sequential(norm, network)

    Args:
        kind: One of the above.
        mean: ``[C, H, W]`` for ``global``, ``[C]`` for ``channel``.
        std: As ``mean``.
        shape: ``(C, H, W)``, for ``batch`` only.

    Raises:
        ValueError: The kind is unknown, an argument that it needs is missing, or ``batch`` trains on a single image.
    """

    shift: Tensor
    scale: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor

    def __init__(
        self,
        kind: str,
        mean: Tensor | Sequence[float] | None = None,
        std: Tensor | Sequence[float] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if kind not in DATA_NORMS:
            raise ValueError(f"unknown data norm {kind!r}: there are {', '.join(DATA_NORMS)}")
        self.kind = kind
        if kind in ("global", "channel"):
            if mean is None or std is None:
                raise ValueError(f"data norm {kind!r} needs mean and std (or use DataNorm.fit)")
            scale = _inverse_std(torch.as_tensor(std, dtype=torch.float64))
            shift = -torch.as_tensor(mean, dtype=torch.float64) * scale
            shape = (-1, 1, 1) if kind == "channel" else shift.shape
            self.register_buffer("shift", shift.reshape(shape).to(torch.get_default_dtype()))
            self.register_buffer("scale", scale.reshape(shape).to(torch.get_default_dtype()))
        elif kind == "batch":
            if shape is None:
                raise ValueError("data norm 'batch' needs shape=(channels, height, width)")
            self.register_buffer("running_mean", torch.zeros(*shape))
            self.register_buffer("running_var", torch.ones(*shape))
            self.register_buffer("batches", torch.zeros(()))

    @classmethod
    def fit(cls, kind: str, images: Tensor) -> DataNorm:
        """Make the layer from training images, without a float copy of all of them.

        Args:
            kind: As for the class.
            images: uint8 ``[N, C, H, W]``; 255 stands for 1.0.

        Raises:
            ValueError: The kind is unknown.
            TypeError: The images are not uint8 with four dimensions.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise TypeError(f"DataNorm.fit needs uint8 images [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if kind not in ("global", "channel"):
            return cls(kind, shape=images.shape[1:])
        total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
        squares = torch.zeros_like(total)
        for chunk in images.split(256):  # 256 * 255^2 < 2^24: every sum within a chunk is exact in float32
            values = chunk.to(torch.float32)
            total += values.sum(0)
            squares += values.square_().sum(0)
        count = len(images)
        if kind == "channel":
            count *= total[0].numel()
            total, squares = total.sum((1, 2)), squares.sum((1, 2))
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        return cls(kind, mean / 255, std / 255).to(images.device)

    @classmethod
    def unfitted(cls, kind: str, shape: Sequence[int]) -> DataNorm:
        """Make a layer for images ``(C, H, W)`` with mean 0 and std 1, to load statistics into."""
        if kind in ("global", "channel"):
            features = tuple(shape) if kind == "global" else tuple(shape[:1])
            return cls(kind, torch.zeros(features), torch.ones(features))
        return cls(kind, shape=shape)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images ``[N, C, H, W]``."""
        if self.kind == "none":
            return x
        if self.kind != "batch":
            return _scaled_and_shifted(x, self.scale, self.shift)
        if self.training:
            var, mean = self._batch_moments(x)
        else:
            var, mean = self.running_var, self.running_mean
        scale = _inverse_std(var.sqrt())
        return torch.addcmul(-mean * scale, x, scale)

    def _batch_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return each feature's biased variance and mean over the batch; update the running (unbiased) estimates."""
        n = x.shape[0]
        if n < 2:
            raise ValueError("data norm 'batch' trains on batches of at least 2 images: use 'global' for batch size 1")
        var, mean = torch.var_mean(x, dim=0, correction=0)
        with torch.no_grad():
            self.batches += 1
            weight = 1 / self.batches
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_(var.to(self.running_var.dtype) * (n / (n - 1)), weight)
        return var, mean

    def extra_repr(self) -> str:
        """Show the kind."""
        return self.kind


def _inverse_std(std: Tensor) -> Tensor:
    return torch.where(std < CONSTANT_FEATURE_STD, 1.0, std).reciprocal()
