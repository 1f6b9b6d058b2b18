"""The rules between SGD and Backforward Propagation against their formulas, SGD, and Backforward Propagation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.naive_rules import sgd_loop
from torch import Tensor, nn

from backforward.models import MLP, NIN
from backforward.models.init import generator
from backforward.rules import Backforward
from backforward.shift import Watch, covariate_shift, layers
from backforward_suite.study_rules import Dose, FreshDirection, FreshLength, ShiftNoise

DEPTHS = (1, 3)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.3),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def network(depth: int) -> nn.Module:
    return MLP((1, 4, 4), 5, hidden=7, depth=depth, seed=0)


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 1, 4, 4, generator=draw), torch.randint(5, (8,), generator=draw)) for _ in range(count)]


def trained(make_rule: Callable[..., Any], depth: int, optimizer: str = "sgd") -> tuple[nn.Module, list[Tensor]]:
    """The network after a few batches, and the losses."""
    model = network(depth)
    rule = make_rule(model, OPTIMIZERS[optimizer](model.parameters()), F.cross_entropy)
    return model, [rule.step(x, y).loss for x, y in batches()]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_dose_1_is_backforward_bitwise(depth: int, optimizer: str) -> None:
    one, losses = trained(partial(Dose, dose=1), depth, optimizer)
    other, theirs = trained(partial(Backforward, engine="naive"), depth, optimizer)
    assert same(one, other)
    assert losses == theirs
    assert not same(one, network(depth))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_dose_0_is_sgd_bitwise(depth: int, optimizer: str) -> None:
    one, losses = trained(partial(Dose, dose=0), depth, optimizer)
    other = network(depth)
    theirs = sgd_loop(other, OPTIMIZERS[optimizer](other.parameters()), F.cross_entropy, batches())
    assert same(one, other)
    assert [loss.item() for loss in losses] == theirs


def by_formula(
    model: nn.Module, along: Callable[[Tensor, Tensor, int, int], Tensor], lr: float = 0.3
) -> tuple[nn.Module, list[Tensor]]:
    """The definition: two gradients of every layer from copies of the network, plain steps, in double precision."""
    model = copy.deepcopy(model).double()
    own = layers(model, batches(1)[0][0].double())
    losses = []
    for number, (x, y) in enumerate(batches()):
        x = x.double()  # noqa: PLW2901
        before = copy.deepcopy(model)
        for k, (name, parameters) in enumerate(own):
            stale = _flat_gradient(before, name, x, y)
            fresh = _flat_gradient(model, name, x, y)
            step = along(stale, fresh, number, k)
            with torch.no_grad():
                for p, part in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
                    p.sub_(lr * part.view_as(p))
        losses.append(F.cross_entropy(before(x), y).detach())
    return model, losses


def _flat_gradient(model: nn.Module, layer: str, x: Tensor, y: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    F.cross_entropy(model(x), y).backward()
    gradients = [p.grad for p in model.get_submodule(layer).parameters()]
    return torch.cat([g.reshape(-1) for g in gradients if g is not None])


def _noise(stale: Tensor, fresh: Tensor, batch: int, layer: int) -> Tensor:
    u = torch.randn(len(stale), generator=generator("ShiftNoise", 5, batch, layer)).double()
    return stale + (fresh - stale).norm() * u / u.norm()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    ("make_rule", "along"),
    [
        pytest.param(partial(Dose, dose=2), lambda g, f, *_: 2 * f - g, id="dose 2"),
        pytest.param(partial(Dose, dose=-1), lambda g, f, *_: 2 * g - f, id="dose -1"),
        pytest.param(partial(Dose, dose=0.5), lambda g, f, *_: (g + f) / 2, id="dose .5"),
        pytest.param(FreshDirection, lambda g, f, *_: f / f.norm() * g.norm(), id="fresh direction"),
        pytest.param(FreshLength, lambda g, f, *_: g / g.norm() * f.norm(), id="fresh length"),
        pytest.param(partial(ShiftNoise, seed=5), _noise, id="noise"),
    ],
)
def test_rules_are_their_formulas(depth: int, make_rule: Any, along: Any) -> None:
    model, losses = trained(make_rule, depth)
    other, theirs = by_formula(network(depth), along)
    for mine, their in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), their, rtol=1e-4, atol=1e-5)  # single against double precision
    torch.testing.assert_close(torch.stack(losses).double(), torch.stack(theirs), rtol=1e-4, atol=1e-5)


def test_noise_depends_on_seed_and_batches_alone() -> None:
    one, _ = trained(partial(ShiftNoise, seed=5), 1)
    torch.manual_seed(99)
    again, _ = trained(partial(ShiftNoise, seed=5), 1)
    other, _ = trained(partial(ShiftNoise, seed=6), 1)
    assert same(one, again)
    assert not same(one, other)

    def resumed(model: nn.Module, *args: Any) -> Any:
        rule = ShiftNoise(model, *args, seed=5)
        rule.set_epoch(0, 3)
        return rule

    later, _ = trained(resumed, 1)
    assert not same(one, later)


@pytest.mark.parametrize(("dose", "share"), [(0, 1.0), (0.5, 0.5), (1, 0.0), (2, 1.0)])
def test_the_diagnostics_see_the_shift_that_a_dose_leaves(dose: float, share: float) -> None:
    """What is stepped along differs from G' by |1 - a| of the induced shift at the second layer."""
    model = network(1)
    watch = Watch(model)
    rule = Dose(
        model, torch.optim.SGD(model.parameters(), lr=0.3), F.cross_entropy, dose=dose, after_update=watch.observe
    )
    x, y = batches(1)[0]
    watch.begin()
    rule.step(x, y)
    (update,) = watch.end()
    replica = watch.replica
    first, second = covariate_shift(replica, layers(replica, x), update, lambda net: F.cross_entropy(net(x), y))
    assert first.induced.distance == 0
    assert second.induced.distance > 1e-3
    assert second.applied is not None
    torch.testing.assert_close(second.applied.distance, share * second.induced.distance, rtol=1e-4, atol=1e-7)


def test_the_mean_over_ranks_is_taken_before_the_mix() -> None:
    """With a reduce that halves every gradient, Backforward Propagation and dose 1 still agree."""
    one, _ = trained(partial(Dose, dose=1, reduce=lambda flat: flat / 2), 2)
    other, _ = trained(partial(Backforward, engine="naive", reduce=lambda flat: flat / 2), 2)
    assert same(one, other)


@pytest.mark.parametrize(
    ("model", "hooks", "message"),
    [
        (MLP((1, 4, 4), 5, hidden=7, dropout=0.5), {}, "without dropout"),
        (NIN((3, 32, 32), 5, width=0.05, norm="batch"), {}, "batch statistics"),
        (network(1), {"max_grad_norm": 1.0}, "max_grad_norm=1.0 would change the lengths"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(model: nn.Module, hooks: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreshLength(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, **hooks)
