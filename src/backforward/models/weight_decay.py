"""Weight decay on weights only."""

from __future__ import annotations

from typing import Any

from torch import nn


def weight_decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: its ``weight_decay`` holds for weight matrices and filters alone.

    Biases, scales, shifts (of BatchNorm and NormProp) and slopes have one dimension and get ``weight_decay=0``.

    Example:
        >>> optimizer = torch.optim.SGD(weight_decay_groups(model), lr=0.05, weight_decay=5e-4)
    """
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
