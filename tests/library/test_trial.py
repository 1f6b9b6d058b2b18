"""Trial steps refuse unusable optimizers and leave no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.helpers import miniatures
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from backforward.rules import Backforward, Backprop


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 20).view(4, 5), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("make", [*miniatures.COUNTING.values(), torch.optim.Adam])
def test_making_a_rule_leaves_no_trace(make: Callable[..., Optimizer]) -> None:
    model = network()
    optimizer = make(model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    before = {
        name: copy.deepcopy(value) for name, value in vars(optimizer).items() if "hook" not in name and name != "step"
    }
    generators = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    Backforward(model, optimizer, F.cross_entropy)
    handle.remove()
    assert not calls
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), str(np.random.get_state())) == generators[1:]
    assert all(map(torch.equal, model.parameters(), network().parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert str(before) == str({name: vars(optimizer)[name] for name in before})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "LBFGS needs a closure"),
        (miniatures.ClosureBySignature, "ClosureBySignature needs a closure"),
        (miniatures.ClosureByAssertion, "ClosureByAssertion needs a closure"),
        (miniatures.ReadsTheLoss, "ReadsTheLoss reads the loss, which only a closure gives"),
        (miniatures.SecondDerivatives, "SecondDerivatives needs second derivatives"),
        (miniatures.OwnLoop, r"OwnLoop needs a training loop of its own, which calls update_hessian\(\)"),
        (miniatures.Wraps, "Wraps wraps another optimizer; give the SGD itself"),
        (miniatures.KeepsObjects, r"KeepsObjects keeps 'schedule' \(a _Schedule\) from step to step"),
        (miniatures.CannotBeCopied, "CannotBeCopied cannot be copied for a trial step"),
        (miniatures.Fails, r"Fails cannot take a step \(NotImplementedError: use fit\(\) instead\)"),
        (partial(torch.optim.SGD, lr=0.1, differentiable=True), "SGD has differentiable=True"),
    ],
)
def test_refuses_in_one_line(make: Callable[..., Optimizer], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=f"^Backforward: {message}") as refusal:
        Backforward(model, make(model.parameters()), F.cross_entropy)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("lr", [0.0, 1e38, float("inf")])
def test_accepts_a_learning_rate_that_diverges(lr: float) -> None:
    model = network()
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), F.cross_entropy)
    assert rule.step(*batch()).loss.isfinite()


def test_refuses_hooks_that_would_never_run() -> None:
    model = network()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="SGD has parameters with hooks on accumulated gradients"):
        Backprop(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy)


class DrawsElsewhere(miniatures.Mini):
    """Draws from the generators of Python and NumPy."""

    def scale(self, group: dict[str, Any]) -> float:
        return random.random() + float(np.random.random())


@pytest.mark.parametrize("kind", [miniatures.Draws, DrawsElsewhere, miniatures.Fails])
def test_accepts_optimizers_that_draw_and_restores_the_generators(kind: type[Optimizer]) -> None:
    model = network()
    generators = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    if kind is miniatures.Fails:
        with pytest.raises(ValueError, match="cannot take a step"):
            Backforward(model, kind(model.parameters()), F.cross_entropy)
    else:
        Backforward(model, kind(model.parameters()), F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), str(np.random.get_state())) == generators[1:]


def test_a_trial_skips_lazy_parameters() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    optimizer = miniatures.CountsInGroups(model.parameters())
    rule = Backforward(model, optimizer, F.cross_entropy)
    model(batch()[0])
    rule.step(*batch())
    assert len(optimizer.param_groups[0]["backforward"]) == 2


def test_accepts_an_exhausted_generator_of_parameters() -> None:
    class Remembers(miniatures.Mini):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.given = params

    model = network()
    Backforward(model, Remembers(model.parameters()), F.cross_entropy)


@pytest.mark.parametrize(
    "kind",
    [miniatures.ReadsTheLoss, miniatures.Wraps, miniatures.KeepsObjects, miniatures.CannotBeCopied],
)
def test_backprop_accepts_optimizers_that_only_groups_rule_out(kind: type[Optimizer]) -> None:
    model, plain = network(), network()
    optimizer, alone = kind(model.parameters()), kind(plain.parameters())
    rule = Backprop(model, optimizer, F.cross_entropy)
    x, y = batch()
    for _ in range(3):
        rule.step(x, y)
        alone.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        alone.step()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert not all(map(torch.equal, model.parameters(), network().parameters()))


@pytest.mark.parametrize("kind", [miniatures.ClosureByAssertion, miniatures.SecondDerivatives, miniatures.OwnLoop])
def test_backprop_refuses_optimizers_that_need_more_than_step(kind: type[Optimizer]) -> None:
    model = network()
    with pytest.raises(ValueError, match=f"^Backprop: {kind.__name__} needs"):
        Backprop(model, kind(model.parameters()), F.cross_entropy)
