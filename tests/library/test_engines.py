"""The tape against the naive engine, on the table of problems; the zoo has many more networks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests.helpers.problems import OPTIMIZERS, PROBLEMS, Problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backforward import Backforward
from backforward.batch import tensors_in


def trained(problem: Problem, engine: str, optimizer: str) -> tuple[dict[str, Tensor], list[Tensor], Backforward]:
    """Return weights and buffers after three batches, the results, and the rule."""
    torch.manual_seed(0)
    model = problem.model()
    rule = Backforward(model, OPTIMIZERS[optimizer](list(model.parameters())), problem.loss, engine=engine)
    shown = []
    for number in range(3):
        out = rule.step(*problem.batch(number))
        shown += [out.loss, *tensors_in(out.output), torch.get_rng_state()]
    return copy.deepcopy(model.state_dict()), shown, rule


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
def test_the_tape_equals_the_naive_engine_bitwise(problem: Problem, optimizer: str) -> None:
    ours, shown, rule = trained(problem, "auto", optimizer)
    theirs, expected, _ = trained(problem, "naive", optimizer)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(shown) == len(expected)
    assert all(map(torch.equal, shown, expected))
    assert isinstance(rule.engine_reason, str)


class Graph(nn.Module):
    """Differentiates in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).tanh()
        (slope,) = torch.autograd.grad(h.sum(), h, retain_graph=True)
        return self.two(h * slope)


def test_a_forward_that_cannot_be_replayed_runs_in_full_and_says_why() -> None:
    model = Graph()
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.functional.cross_entropy)
    rule.step(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    assert "graph" in rule.engine_reason


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_any_order_of_the_groups_is_exact(order: str) -> None:
    ends = []
    for engine in ("auto", "naive"):
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        rule = Backforward(model, optimizer, nn.functional.mse_loss, engine=engine, order=order, seed=3)
        names = []
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            rule.step(torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator))
            names.append([group.name for group in rule.groups])
        ends.append((names, model.state_dict()))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[0][1][name], value) for name, value in ends[1][1].items())
    if order == "reverse":
        assert ends[0][0][0] == ["9", "6", "3", "0"]
    else:
        assert len({tuple(each) for each in ends[0][0]}) > 1


def test_freezing_and_other_grad_modes_between_batches_are_seen() -> None:
    ends = []
    for engine in ("auto", "naive"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        rule = Backforward(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.functional.cross_entropy, engine=engine
        )
        names = []
        for frozen in (True, True, False, False, True, False):
            model[2].requires_grad_(not frozen)
            rule.step(torch.randn(6, 4), torch.arange(6) % 2)
            names.append([group.name for group in rule.groups])
            with torch.no_grad(), pytest.raises(ValueError, match="depends on no trainable parameter"):
                rule.step(torch.randn(6, 4), torch.arange(6) % 2)
        assert names == [["0", "4"], ["0", "4"], ["0", "2", "4"], ["0", "2", "4"], ["0", "4"], ["0", "2", "4"]]
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(
    "groups", [[["0"], ["1"], ["2"], ["3", "5"]], [["0", "1"], ["2"], ["3"], ["5"]], [["0"], ["3", "5"]]]
)
def test_group_norm_first_in_its_group_with_channels_last(groups: list[list[str]], order: str) -> None:
    """There torch's backward ends the process if the input's gradient is not wanted."""
    ends = []
    for engine in ("auto", "naive"):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.Flatten()),
            nn.Linear(8 * 16, 2),
        ).to(memory_format=torch.channels_last)
        model.requires_grad_(False)
        trained = [p.requires_grad_() for names in groups for name in names for p in model[int(name)].parameters()]
        rule = Backforward(
            model,
            torch.optim.SGD(trained, lr=0.1),
            nn.functional.cross_entropy,
            groups=groups,
            engine=engine,
            order=order,
        )
        for _ in range(3):
            rule.step(torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last), torch.arange(4) % 2)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


class GroupNormIn(nn.Module):
    """Calls a group norm in an unusual way."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8 * 36, 2)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.norm, self.first(x)).flatten(1))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, on the first use of jvp
@pytest.mark.parametrize(
    "call",
    [
        lambda norm, h: torch.vmap(lambda one: norm(one[None])[0])(h),
        lambda norm, h: torch.func.jvp(norm, (h,), (torch.ones_like(h),))[0],
        lambda norm, h: norm(h) + torch.func.grad(lambda z: norm(z).square().sum())(h),
        lambda norm, h: checkpoint(norm, h, use_reentrant=False),
        lambda norm, h: checkpoint(norm, h, use_reentrant=True),
        lambda norm, h: norm(h.detach()),
    ],
    ids=["vmap", "jvp", "grad", "checkpoint", "reentrant", "detached"],
)
def test_group_norm_in_transforms_and_checkpoints(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    ends = []
    for engine in ("auto", "naive"):
        torch.manual_seed(0)
        model = GroupNormIn(call)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rule = Backforward(model, optimizer, nn.functional.cross_entropy, engine=engine)
        for _ in range(3):
            rule.step(torch.randn(4, 3, 8, 8), torch.arange(4) % 2)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
