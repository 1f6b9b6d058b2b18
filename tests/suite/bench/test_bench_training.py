"""The bare loops that training is measured against do the arithmetic of the rules; nothing here is timed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from backforward.models import MLP
from backforward.rules import Backforward, Backprop
from backforward_suite.bench import training as bench


@pytest.mark.parametrize(("method", "rule"), [("sgd", Backprop), ("bfp", Backforward)])
def test_a_bare_loop_takes_the_steps_of_the_rule(method: str, rule: type[Backprop | Backforward]) -> None:
    network = MLP((1, 4, 4), 3, hidden=8, depth=2, seed=0)
    ruled = copy.deepcopy(network)
    x, y = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    step = bench.STEPS[method](network)
    other = rule(ruled, torch.optim.SGD(ruled.parameters(), lr=bench.LR), F.cross_entropy)
    for _ in range(3):
        step(x, y)
        other.step(x, y)
    torch.testing.assert_close(dict(network.named_parameters()), dict(ruled.named_parameters()))


def test_the_floor_counts_what_cannot_be_avoided() -> None:
    layers = [2 * 784 * 256, 2 * 256 * 10]  # multiply-accumulates of a batch of two
    macs = {method: bench.multiply_accumulates(MLP((1, 28, 28), 10), method, (2, 1, 28, 28)) for method in bench.STEPS}
    assert macs["sgd"] == 3 * sum(layers) - layers[0]
    assert macs["bfp"] == 3 * layers[0] + 5 * layers[1] - layers[1]
