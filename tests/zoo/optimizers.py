"""Optimizers from elsewhere: each bitwise equal to one optimizer object for each group, or refused at construction.

Needs the extra `zoo`. `check_all` serves `make zoo`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tests.oracles import one_per_group
from torch import Tensor, nn

from backforward.rules import Backforward

BATCHES = 14
PASSES = [["0.weight", "0.bias"], ["3.weight", "3.bias"], ["5.weight", "5.bias"]]

Make = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


class Row(NamedTuple):
    """What was found: `equal`, `refused` (with the reason) or `wrong`."""

    optimizer: str
    package: str
    verdict: str
    reason: str


@dataclass
class Case:
    """An optimizer and its settings.

    Attributes:
        package: On PyPI, with its version.
        name: The class, with what sets it apart.
        make: Makes one for some parameters.
        groups: The parameters that one is made for; by default all of a network's.
    """

    package: str
    name: str
    make: Make
    trained: Callable[[str, nn.Parameter], bool] = field(default=lambda name, parameter: True)


def network() -> nn.Module:
    """A small network with a convolution; weights that a constant seed decides."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 4))


def batches(count: int = BATCHES) -> Iterator[tuple[Tensor, Tensor]]:
    """Small random images and labels, the same each time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(6, 1, 5, 5, generator=generator), torch.randint(4, (6,), generator=generator)


def check(case: Case) -> Row:
    """Compare Backforward with one optimizer to the loop with one optimizer object for each group."""
    ours, theirs = network(), network()
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(case.trained(name, parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = case.make([p for p in ours.parameters() if p.requires_grad])
        _train_mode(optimizer)
        try:
            rule = Backforward(ours, optimizer, F.cross_entropy, engine="naive")
        except ValueError as refusal:
            return Row(case.name, case.package, "refused", str(refusal).removeprefix("Backforward: "))
        named = dict(theirs.named_parameters())
        groups = [[name for name in group if named[name].requires_grad] for group in PASSES]
        groups = [group for group in groups if group]
        each = [[case.make([named[name] for name in group])] for group in groups]
        for own in each:
            _train_mode(own[0])
        _seed()
        for x, y in batches():
            rule.step(x, y)
        _seed()
        one_per_group.train(theirs, each, groups, F.cross_entropy, batches())
    moved = not all(map(torch.equal, ours.state_dict().values(), network().state_dict().values()))
    finite = all(bool(p.isfinite().all()) for p in ours.parameters())
    apart = [name for name, value in ours.state_dict().items() if not torch.equal(value, theirs.state_dict()[name])]
    if apart:
        return Row(case.name, case.package, "wrong", f"{', '.join(apart)} differ")
    if not (moved and finite):
        return Row(case.name, case.package, "wrong", "weights did not move" if finite else "weights are not finite")
    return Row(case.name, case.package, "equal", "")


def _seed() -> None:
    torch.manual_seed(2)
    np.random.seed(2)


def _train_mode(optimizer: torch.optim.Optimizer) -> None:
    train = getattr(optimizer, "train", None)
    if callable(train):
        train()
