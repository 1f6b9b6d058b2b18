"""What the tape spares, and what it never returns again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from backforward import Backforward


class _Ran(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[name-defined]
    """Counts products below all of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def products(depth: int, engine: str) -> int:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss, engine=engine)
    x = torch.randn(3, 4)
    rule.step(x, x)
    with _Ran() as ran:
        rule.step(x, x)
    return ran.products


def test_forward_and_backward_are_spared_below_the_group() -> None:
    """With c_j = 1 for each layer of a chain, Backforward costs sum(2j + 1) - 1, naive L (3 L - 1)."""
    for depth in (2, 3, 5):
        assert products(depth, "auto") == sum(2 * j + 1 for j in range(1, depth + 1)) - 1
        assert products(depth, "naive") == depth * (3 * depth - 1)


def test_nothing_of_a_batch_outlives_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss)
    x = torch.randn(3, 4)
    out = rule.step(x, x)
    assert out.output.grad_fn is None
    assert not vars(x)
    assert all(not vars(p) for p in model.parameters())
