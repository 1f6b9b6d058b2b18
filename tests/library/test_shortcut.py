from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backforward.batch import Inputs
from backforward.shortcut import linear_chain


def test_splits_a_linear_chain() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 3)
    )
    x = torch.randn(2, 2, 3)
    before, layers, after = linear_chain(model, Inputs.of(x))
    value = before(x)
    for layer, function in zip(layers, after, strict=True):
        value = function(layer(value))
    assert torch.equal(value, model(x))
    assert layers == [model[1], model[3], model[5]]
    assert after[0] is torch.relu


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.one(x)) + self.two(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branches(), "no chain"),
        (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), "random numbers"),
        (nn.Sequential(nn.Tanh()), "no linear layer"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "1 is no linear layer used once"),
    ],
    ids=["branches", "dropout", "no layer", "norm"],
)
def test_refuses_what_is_no_chain_and_says_why(model: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        linear_chain(model, Inputs.of(torch.randn(2, 3)))
