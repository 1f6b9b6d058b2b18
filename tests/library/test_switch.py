from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backforward import Backforward, Backprop, Switch


def rules(model: nn.Module) -> tuple[Backforward, Backprop]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Backforward(model, optimizer, F.cross_entropy), Backprop(model, optimizer, F.cross_entropy)


def test_the_epoch_chooses_the_rule() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    first, then = rules(model)
    switch = Switch(first, then, at_epoch=2)
    switch.prepare(torch.randn(5, 3))
    assert [len(switch.groups) for epoch in range(4) if not switch.set_epoch(epoch)] == [2, 2, 1, 1]  # type: ignore[func-returns-value]
    switch.set_epoch(0)
    before = [p.clone() for p in model.parameters()]
    switch.step(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0]))
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("epoch", [-1, 1.5, True])
def test_refuses_a_bad_epoch(epoch: float) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="at_epoch"):
        Switch(*rules(model), at_epoch=epoch)  # type: ignore[arg-type]


def test_refuses_rules_of_different_networks() -> None:
    with pytest.raises(ValueError, match="share one network"):
        Switch(rules(nn.Linear(2, 2))[0], rules(nn.Linear(2, 2))[1], at_epoch=1)
