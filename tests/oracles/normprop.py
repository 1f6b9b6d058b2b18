"""NormProp by its printed formula, one operation after the other (equations 9 and 11)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from backforward.normprop import NormPropConv2d, NormPropLinear


def literal(layer: NormPropLinear | NormPropConv2d, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """``(act(gamma (W * x) / (J ||W||) + beta) - mean) / std``; ``act`` is the layer's."""
    mean, std, jacobian = layer.moments()
    norm = layer.weight.square().flatten(1).sum(1).sqrt()
    if isinstance(layer, NormPropConv2d):
        z = F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        per_unit = (-1, 1, 1)
    else:
        z = x @ layer.weight.T
        per_unit = (-1,)
    u = layer.gamma.view(per_unit) * z / (jacobian * norm).view(per_unit) + layer.beta.view(per_unit)
    if isinstance(mean, Tensor):  # PReLU: a slope for all units, or one for each
        mean, std = mean.view(per_unit), std.view(per_unit)
    return (act(u) - mean) / std


def monte_carlo_moments(act: Callable[[Tensor], Tensor], draws: int, seed: int) -> dict[str, tuple[float, float]]:
    """Mean, standard deviation and E[act'^2] of ``act(N(0, 1))`` from draws, each with its standard error."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(6, dtype=torch.float64)
    chunk = min(draws, 1_000_000)
    for _ in range(draws // chunk):
        z = torch.randn(chunk, generator=generator, dtype=torch.float64).requires_grad_()
        y = act(z)
        (slope,) = torch.autograd.grad(y.sum(), z)
        y, square = y.detach(), slope.detach().square()
        sums += torch.stack([y.sum(), (y**2).sum(), (y**3).sum(), (y**4).sum(), square.sum(), (square**2).sum()])
    m1, m2, m3, m4, d2, d4 = (sums / draws).tolist()
    var = m2 - m1**2
    central4 = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    std = var**0.5
    return {
        "mean": (m1, (var / draws) ** 0.5),
        "std": (std, ((central4 - var**2) / draws) ** 0.5 / (2 * std)),
        "derivative": (d2, (max(d4 - d2**2, 0) / draws) ** 0.5),
    }
