"""Gradient accumulation over micro-batches, against plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.helpers.problems import OPTIMIZERS, PROBLEMS, Problem
from tests.oracles.naive_rules import backforward_batch
from torch import Tensor, nn

from backforward import Backforward, Backprop
from backforward.batch import tensors_in

Train = Callable[[nn.Module, torch.optim.Optimizer, Problem], list[Tensor]]
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)


def trained(problem: Problem, train: Train, optimizer: str = "nesterov") -> list[Tensor]:
    """Return weights, buffers and the results of a training."""
    model = problem.model()
    torch.manual_seed(3)
    losses = train(model, OPTIMIZERS[optimizer](list(model.parameters())), problem)
    return [*model.state_dict().values(), *losses, torch.get_rng_state()]


def by(rule: type[Backforward | Backprop], **arguments: Any) -> Train:
    """Train on three batches with a rule."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, problem: Problem) -> list[Tensor]:
        step = rule(model, optimizer, problem.loss, **arguments).step
        return [step(*problem.batch(i)).loss for i in range(3)]

    return train


def by_oracle(model: nn.Module, optimizer: torch.optim.Optimizer, problem: Problem) -> list[Tensor]:
    groups = list(problem.groups.values())
    return [
        backforward_batch(
            *(model, optimizer, problem.loss, *problem.batch(i), groups, problem.statistics), micro_batches=2
        )
        for i in range(3)
    ]


def by_accumulation(model: nn.Module, optimizer: torch.optim.Optimizer, problem: Problem) -> list[Tensor]:
    """Train with ordinary gradient accumulation."""
    losses = []
    for i in range(3):
        optimizer.zero_grad()
        x, y = problem.batch(i)
        total = torch.zeros(())
        for half in (slice(0, len(y) // 2), slice(len(y) // 2, len(y))):
            output = model(*(each[half] for each in x)) if isinstance(x, tuple) else model(x[half])
            loss = problem.loss(output, y[half]) / 2
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)
    return losses


@every_problem
def test_naive_engine_is_the_oracle(problem: Problem) -> None:
    ours = trained(problem, by(Backforward, micro_batches=2, engine="naive"))
    assert all(map(torch.equal, ours[:-1], trained(problem, by_oracle)[:-1]))


@every_problem
def test_replay_is_naive_bitwise(problem: Problem) -> None:
    ours = trained(problem, by(Backforward, micro_batches=2), "adam")
    assert all(map(torch.equal, ours, trained(problem, by(Backforward, micro_batches=2, engine="naive"), "adam")))


@every_problem
@pytest.mark.parametrize("train", [by(Backprop, micro_batches=2), by(Backforward, groups=1, micro_batches=2)])
def test_one_group_is_plain_gradient_accumulation_bitwise(problem: Problem, train: Train) -> None:
    assert all(map(torch.equal, trained(problem, train), trained(problem, by_accumulation)))


@pytest.mark.parametrize("groups", ["layer", 1])
@pytest.mark.parametrize("micro_batches", [2, 3, 6])
def test_a_mean_over_micro_batches_is_the_mean_over_the_batch(groups: Any, micro_batches: int) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    ends = []
    for count in (1, micro_batches):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
        rule = Backforward(twin, optimizer, nn.functional.cross_entropy, groups=groups, micro_batches=count)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
            loss = rule.step(x, torch.randint(3, (6,), generator=generator)).loss
        ends.append(torch.cat([loss.reshape(1), *(p.detach().flatten() for p in twin.parameters())]))
    assert not torch.equal(ends[0][1:], nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


class Chosen(nn.Module):
    """Each micro-batch uses its own branch, and none uses the third."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.branches = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.branches[int(x[0, 0] > 0)](self.stem(x).relu())


@pytest.mark.parametrize("engine", ["auto", "naive"])
def test_layers_that_only_some_micro_batches_use_are_updated(engine: str) -> None:
    model = Chosen()
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = Backforward(model, optimizer, nn.functional.cross_entropy, engine=engine, micro_batches=2)
    x = torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None].expand(4, 4).contiguous()
    with pytest.warns(UserWarning, match=r"branches\.2"):
        out = rule.step(x, torch.tensor([0, 1, 0, 1]))
    assert [group.name for group in rule.groups] == ["stem", "branches.0", "branches.1"]
    assert model.calls == 2  # as after one forward of each micro-batch
    assert [tuple(output.shape) for output in out.output] == [(2, 2), (2, 2)]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if not name.startswith("branches.2")}


class Graph(nn.Module):
    """The first micro-batch can be replayed; the second reads its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.dropout(self.two(self.one(x)), 0.5, True)
        assert x[0, 0] < 0 or h.grad_fn is not None
        return self.three(h)


def test_a_micro_batch_that_cannot_be_replayed_runs_in_full_with_those_before_it() -> None:
    ends = []
    for engine in ("auto", "naive"):
        torch.manual_seed(0)
        model = Graph()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rule = Backforward(model, optimizer, nn.functional.cross_entropy, engine=engine, micro_batches=2)
        x = torch.randn(8, 4)
        x[:4, 0], x[4:, 0] = -1, 1
        losses = [rule.step(x, torch.arange(8) % 2).loss for _ in range(3)]
        ends.append([*model.state_dict().values(), *losses, torch.get_rng_state()])
    assert all(map(torch.equal, *ends))


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("given", [0, -1, True, 2.0, "2"])
def test_refuses_a_bad_number_of_micro_batches(given: Any) -> None:
    with pytest.raises(ValueError, match="give an integer >= 1"):
        Backforward(*model_and_optimizer(), nn.functional.cross_entropy, micro_batches=given)
    with pytest.raises(ValueError, match="give an integer >= 1"):
        Backprop(*model_and_optimizer(), nn.functional.cross_entropy, micro_batches=given)


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (torch.zeros(5, 4), torch.zeros(5).long(), "multiple of 2, not 5"),
        (torch.zeros(6, 4), torch.zeros(4).long(), "multiple of 2, not 4, 6"),
        (torch.zeros(6, 4), torch.tensor(0), "multiple of 2, not 0, 6"),
        (torch.zeros(6, 4), [0, 1, 0, 1, 0, 1], "cannot split a int"),
        (["a text", "another"], None, "cannot split a str"),
        (torch.zeros(0, 4), torch.zeros(0).long(), "multiple of 2, not 0"),
    ],
)
def test_refuses_a_batch_that_cannot_be_split(x: Any, y: Any, match: str) -> None:
    rule = Backforward(*model_and_optimizer(), nn.functional.cross_entropy, micro_batches=2)
    with pytest.raises(ValueError, match=match):
        rule.step(x, y)


def test_the_shortcut_refuses_micro_batches() -> None:
    with pytest.raises(ValueError, match="needs micro_batches=1"):
        Backforward(*model_and_optimizer(), nn.functional.cross_entropy, engine="shortcut", micro_batches=2)


def test_splits_nested_inputs() -> None:
    seen = []

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, *, pair: list[Tensor], flag: bool) -> Tensor:
            seen.append((pair[0].shape, pair[1].shape, flag))
            return self.linear(pair[0]) + pair[1]

    model = Keyword()
    rule = Backprop(
        *(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda output, y: (output - y["goal"]).square().mean()),
        micro_batches=2,
    )
    out = rule.step({"pair": [torch.zeros(4, 2), torch.ones(4, 1)], "flag": True}, {"goal": torch.zeros(4, 1)})
    assert seen == [((2, 2), (2, 1), True)] * 2
    assert [t.shape for t in tensors_in(out.output)] == [(2, 1)] * 2
