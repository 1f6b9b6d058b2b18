from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from backforward import Backforward
from backforward.flops import FlopCounter


def test_counts_products_by_their_sizes() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    with FlopCounter() as counter:
        model(torch.randn(2, 5))
    assert counter.get_total_flops() == 2 * 2 * (5 * 4 + 4 * 3)


def test_counting_does_not_change_what_an_engine_does() -> None:
    """A chain of L equal layers costs sum(2 j + 1) - 1 products under Backforward."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss)
    x = torch.randn(2, 4)
    rule.step(x, x)
    with FlopCounter() as counter:
        rule.step(x, x)
    assert counter.get_total_flops() == 2 * 2 * 4 * 4 * (3 + 5 + 7 - 1)
