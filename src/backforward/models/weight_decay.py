"""Weight decay on weights only."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm


def weight_decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return parameter groups that apply an optimizer's ``weight_decay`` to weight matrices and filters alone.

    Biases, scales, shifts (of BatchNorm and NormProp) and slopes, which have one dimension, get ``weight_decay=0``. So
    do the lengths g of torch's weight normalisation, in any shape.

    Examples:
        >>> optimizer = torch.optim.SGD(weight_decay_groups(model), lr=0.05, weight_decay=5e-4)
    """
    lengths = {
        id(made.original0)
        for made in model.modules()
        if isinstance(made, parametrize.ParametrizationList) and isinstance(made[0], _WeightNorm)
    }
    parameters = list(model.parameters())
    decayed = {id(p) for p in parameters if p.ndim >= 2} - lengths
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) in decayed]},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
