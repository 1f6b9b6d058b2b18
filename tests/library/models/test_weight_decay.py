from __future__ import annotations

import torch
from torch import nn

from backforward.models import MLP, weight_decay_groups


def test_weights_decay_and_biases_and_scales_do_not() -> None:
    model = MLP((1, 4, 4), 3, hidden=5, norm="batch", seed=0)
    decayed, free = weight_decay_groups(model)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    optimizer = torch.optim.SGD(weight_decay_groups(model), lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_no_group_is_empty() -> None:
    [group] = weight_decay_groups(nn.Linear(2, 2, bias=False))
    assert len(group["params"]) == 1
