"""Networks that differ from batch to batch."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from tests.zoo.cases.modes import Two
from tests.zoo.entry import CLASSES, FEATURES, ROWS, Cases, generator, labels, vectors
from torch import Tensor, nn

VARYING = Cases()


def _one_sided() -> list[tuple[Any, Any]]:
    """Batches whose first feature is positive, then negative, then both."""
    batches = vectors(steps=4)
    for (x, _), sign in zip(batches, (1, -1, 1), strict=False):
        x[:, 0] = sign * x[:, 0].abs()
    return batches


@VARYING.add(batches=_one_sided)
class Experts(nn.Module):
    """A mixture of experts: the first batch uses one expert, the second the other, the last both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        out = torch.zeros_like(h)
        for chosen, expert in ((x[:, 0] > 0, self.experts[0]), (x[:, 0] <= 0, self.experts[1])):
            if chosen.any():
                out[chosen] = torch.tanh(expert(h[chosen]))
        return self.head(out)


@VARYING.add(batches=lambda: vectors(steps=5))
class RoutedExperts(nn.Module):
    """Top-2 of 8 experts by a learned router, gathered with index_add: routes change as weights move."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.router = nn.Linear(6, 8)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        weights, chosen = F.softmax(self.router(h), -1).topk(2)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            if len(rows):
                out.index_add_(0, rows, weights[rows, place, None] * torch.tanh(expert(h[rows])))
        return self.head(out)


class _Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, CLASSES)

    def used(self, i: int) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        for i, layer in enumerate(self.layers):
            if self.used(i):
                h = h + torch.tanh(layer(h))
        return self.head(h)


@VARYING.add(batches=lambda: vectors(steps=6))
class LayerDrop(_Deep):
    """Whole layers are dropped by torch's generator."""

    def used(self, i: int) -> bool:
        return bool(torch.rand(()) < 0.5)


@VARYING.add(batches=lambda: vectors(steps=6))
class LayerDropByPython(_Deep):
    """Whole layers are dropped by Python's generator."""

    def used(self, i: int) -> bool:
        return random.random() < 0.5


def _deeper(model: nn.Module, i: int) -> None:
    model.depth = i


@VARYING.add(batches=lambda: vectors(steps=5), between=_deeper)
class GrowingDepth(_Deep):
    """Each batch uses one layer more."""

    depth = 0

    def used(self, i: int) -> bool:
        return i < self.depth


@VARYING.add(batches=lambda: vectors(steps=5), between=lambda model, i: setattr(model, "depth", 4 - i))
class ShrinkingDepth(GrowingDepth):
    """Each batch uses one layer less."""

    depth = 4


@VARYING.add()
class DropPath(_Deep):
    """Stochastic depth by sample."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        for layer in self.layers:
            keep = torch.empty(len(h), 1).bernoulli_(0.7)
            h = h + keep.div_(0.7) * torch.tanh(layer(h))
        return self.head(h)


def _tasks() -> list[tuple[Any, Any]]:
    g = generator()
    names = ("one", "two", "one", "three", "two")
    return [((torch.randn(ROWS, FEATURES, generator=g), name), labels(ROWS, g)) for name in names]


@VARYING.add(batches=_tasks)
class HeadsPerTask(nn.Module):
    """A head for each task, chosen by name."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(FEATURES, 6)
        self.heads = nn.ModuleDict({name: nn.Linear(6, CLASSES) for name in ("one", "two", "three")})

    def forward(self, x: Tensor, task: str) -> Tensor:
        return self.heads[task](torch.tanh(self.trunk(x)))


def _masked_later() -> list[tuple[Any, Any]]:
    g = generator()
    batches: list[tuple[Any, Any]] = []
    for i in range(4):
        x, mask = torch.randn(ROWS, FEATURES, generator=g), torch.rand(ROWS, 6, generator=g) < 0.5
        batches.append(((x, mask) if i % 2 else (x,), labels(ROWS, g)))
    return batches


@VARYING.add(batches=_masked_later)
class OptionalMask(Two):
    """An optional mask, given in every second batch."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.first(x))
        if mask is not None:
            h = h.masked_fill(mask, 0)
        return self.head(torch.tanh(self.middle(h)))


def _extra_later() -> list[tuple[Any, Any]]:
    g = generator()
    batches: list[tuple[Any, Any]] = []
    for i in range(4):
        x = {"x": torch.randn(ROWS, FEATURES, generator=g)}
        if i >= 2:
            x["extra"] = torch.randn(ROWS, 3, generator=g)
        batches.append((x, labels(ROWS, g)))
    return batches


@VARYING.add(batches=_extra_later)
class OptionalInputWithLayer(Two):
    """An optional input with a layer of its own, first given in the third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(3, 6)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.first(x))
        if extra is not None:
            h = h + self.side(extra)
        return self.head(torch.tanh(self.middle(h)))


@VARYING.add()
class UnusedLayer(Two):
    """A layer that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(6, 6)


@VARYING.add()
class UsedWithoutEffect(Two):
    """A layer whose output the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(6, 6)

    def between(self, h: Tensor) -> Tensor:
        self.aside(h)
        return h


def _shapes() -> list[tuple[Any, Any]]:
    g = generator()
    shapes = ((6, 3), (2, 5), (6, 3), (4, 1))
    return [(torch.randn(rows, length, FEATURES, generator=g), labels(rows, g)) for rows, length in shapes]


@VARYING.add(batches=_shapes)
class VaryingShapes(nn.Module):
    """Batch size and length differ; a loop over the length."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 6)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(self.norm(h))


@VARYING.add()
class BranchOnWeights(Two):
    """A Python branch on a weight's value."""

    def between(self, h: Tensor) -> Tensor:
        return h.relu() if self.first.weight.sum() > self.middle.weight.sum() else h.sin()


@VARYING.add(batches=lambda: vectors(steps=5))
class BranchOnActivations(Two):
    """A Python branch on activations, which weights updated earlier in the batch may turn."""

    def __init__(self) -> None:
        super().__init__()
        self.either = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)

    def between(self, h: Tensor) -> Tensor:
        return self.either(h) if h.mean() > 0 else self.other(h)


@VARYING.add()
class LoopUntilSmall(Two):
    """A loop whose length depends on the data: while the norm is above 1."""

    def between(self, h: Tensor) -> Tensor:
        h = 4 * h
        while h.norm() > 1:
            h = 0.7 * torch.tanh(self.middle(h)) * h.abs()
        return h


@VARYING.add()
class FixedPoint(Two):
    """A deep equilibrium: iterate without a gradient until nothing moves, then one step with one."""

    def between(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros_like(h)
            for _ in range(50):
                new = torch.tanh(0.5 * self.middle(z) + h)
                done = (new - z).norm() < 1e-3
                z = new
                if done:
                    break
        return torch.tanh(0.5 * self.middle(z) + h)


@VARYING.add()
class EarlyExit(_Deep):
    """The forward stops where it is sure enough."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
            logits = self.head(h)
            if logits.softmax(-1).max() > 0.5:
                break
        return logits


@VARYING.add()
class TryAndExcept(Two):
    """The forward runs into an error and takes another way."""

    def between(self, h: Tensor) -> Tensor:
        try:
            return h @ h
        except RuntimeError:
            return h @ (h.t() @ h)


def _freeze(model: nn.Module, i: int) -> None:
    model.first.requires_grad_(i == 2)


@VARYING.add(batches=lambda: vectors(steps=4), between=_freeze)
class FrozenForAWhile(Two):
    """The first layer is frozen for one batch, thawed, and frozen again."""


def _dropout(model: nn.Module, i: int) -> None:
    model.drop.p = 0.1 * i


@VARYING.add(between=_dropout)
class DropoutAnnealed(Two):
    """The rate of a dropout changes between batches."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def between(self, h: Tensor) -> Tensor:
        return self.drop(h)


def _new_layer(model: nn.Module, i: int) -> None:
    model.act = (nn.ReLU(), nn.Sigmoid())[i - 1]


@VARYING.add(between=_new_layer)
class ActivationReplaced(Two):
    """An activation module is replaced between batches."""

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.Tanh()

    def between(self, h: Tensor) -> Tensor:
        return self.act(h)


def _reset(model: nn.Module, i: int) -> None:
    with torch.no_grad():
        model.middle.weight.copy_(torch.eye(6))


@VARYING.add(between=_reset)
class WeightsWrittenBetween(Two):
    """Weights are written between batches."""


def _swap_data(model: nn.Module, i: int) -> None:
    model.middle.weight.data = torch.eye(6) * i


@VARYING.add(between=_swap_data)
class StorageReplaced(Two):
    """A weight gets new storage between batches."""
