"""The state that the passes of a batch share: generators, buffers and attributes."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backforward.batch import Generators, Inputs, World, detached, is_compiled, may_draw, storage_of, tensors_in
from backforward.data_norm import DataNorm
from backforward.models import MLP, NIN
from backforward.models.norms import NoisyBatchNorm


class Pair(NamedTuple):
    one: Tensor
    other: Tensor


def test_inputs_are_positional_or_keyword_arguments_or_a_single_one() -> None:
    a, b = torch.ones(1), torch.zeros(1)
    assert Inputs.of(a) == ((a,), {})
    assert Inputs.of((a, b)) == ((a, b), {})
    assert Inputs.of([a, b]) == (([a, b],), {})
    assert Inputs.of({"x": a}) == ((), {"x": a})
    assert Inputs.of(Pair(a, b)).args[0] == Pair(a, b)


def test_finds_tensors_in_nested_containers() -> None:
    a, b = torch.ones(1), torch.zeros(1)
    assert [id(t) for t in tensors_in({"x": [a, (b, 3)], "y": None, "z": a})] == [id(a), id(b), id(a)]


def test_detaching_keeps_the_classes_of_containers() -> None:
    x = torch.ones(1, requires_grad=True) * 2
    found = detached({"pair": Pair(x, x), "list": [x, 3]})
    assert type(found["pair"]) is Pair
    assert all(not t.requires_grad for t in tensors_in(found))
    assert found["list"][1] == 3


def test_restores_every_global_generator() -> None:
    generators = Generators([torch.device("cpu")])
    states = generators.save()
    draws = [(torch.rand(3), random.random(), np.random.rand()) for _ in range(2) if not generators.restore(states)]  # type: ignore[func-returns-value]
    assert torch.equal(draws[0][0], draws[1][0])
    assert draws[0][1:] == draws[1][1:]


@pytest.mark.parametrize(
    ("called", "draws"),
    [
        (nn.Dropout(0.0), True),
        (nn.MultiheadAttention(2, 1), True),
        (nn.LSTM(2, 2), True),
        (nn.RReLU(), True),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d(2)), False),
        (nn.CrossEntropyLoss(), False),
        (NIN((3, 32, 32), 10, 0.02, "prop"), False),
        (nn.Sequential(DataNorm("batch", shape=(1, 4, 4)), MLP((1, 4, 4), 3, hidden=2)), False),
        (MLP((1, 4, 4), 3, hidden=2, dropout=0.5), True),
        (NoisyBatchNorm(3), True),
        (F.dropout, True),
        (F.cross_entropy, False),
        (lambda output, target: output, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else getattr(value, "__name__", str(value)),
)
def test_what_may_draw(called: Any, draws: bool) -> None:
    assert may_draw(called) is draws


class Counter(nn.Module):
    """Counts, appends to a list, and changes a buffer and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.trained = nn.Parameter(torch.ones(2))
        self.alias = self.trained.detach()  # shares its memory
        self.calls, self.log = 0, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.mean.mul_(0.5).add_(x.mean(0))
        with torch.no_grad():
            self.frozen.add_(1)
        return x * self.trained


def test_the_world_restores_the_start_and_ends_in_the_kept_state() -> None:
    model, x = Counter(), torch.ones(3, 2)
    world = World(model, {id(model.trained)})
    model(x)
    world.keep([0])
    world.restore()
    assert (model.calls, model.log) == (0, [0])
    assert torch.equal(model.mean, torch.zeros(2))
    with torch.no_grad():
        model.trained.add_(1)  # an update by the rule
    model(x)
    model(x)
    world.end()
    assert (model.calls, model.log) == (1, [0, 1])
    assert torch.equal(model.mean, torch.ones(2))
    assert torch.equal(model.frozen, torch.ones(2))
    assert torch.equal(model.trained, torch.full((2,), 2.0))


def test_detects_compiled_modules() -> None:
    assert not is_compiled(nn.Sequential(nn.Linear(2, 2)))
    assert is_compiled(torch.compile(nn.Linear(2, 2), backend="eager"))  # type: ignore[arg-type]
    part = nn.Sequential(nn.Linear(2, 2))
    part[0].compile(backend="eager")
    assert is_compiled(part)


def test_storage_of_identifies_memory() -> None:
    x = torch.ones(4)
    assert storage_of(x) == storage_of(x.view(2, 2)) == storage_of(x.data)
    assert storage_of(x) != storage_of(x.clone())
    sparse = torch.eye(2).to_sparse()
    assert storage_of(sparse) == -id(sparse)
