"""Buffers and attributes that a forward computes with, and what a forward leaves behind."""

from __future__ import annotations

import copy
import math
import random
from collections import deque
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.zoo.cases.modes import Two
from tests.zoo.entry import CLASSES, FEATURES, Cases, sequences, tokens, vectors
from torch import Tensor, nn
from torch.nn.utils import prune

STATE = Cases()


# --- Constants that are none -----------------------------------------------------------------------------------------


def _cool(model: nn.Module, i: int) -> None:
    model.log_t.sub_(0.5)


@STATE.add(between=_cool)
class Temperature(Two):
    """Arithmetic on a buffer that changes between batches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_t", torch.tensor(0.3))

    def between(self, h: Tensor) -> Tensor:
        return h / self.log_t.exp()


def _prune(model: nn.Module, i: int) -> None:
    prune.l1_unstructured(model.middle, "weight", 0.2)


@STATE.add(between=_prune, oracle=False)  # its weight is no leaf and cannot be copied
def pruned() -> nn.Module:
    """torch.nn.utils.prune: a mask that grows between batches."""
    model = Two()
    prune.random_unstructured(model.first, "weight", 0.3)
    prune.l1_unstructured(model.middle, "weight", 0.2)
    return model


@STATE.add()
class OwnMask(Two):
    """A mask kept as a buffer, made from the weights in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.middle.weight
        self.mask = (weight.detach().abs() > 0.1).float()
        return self.head(torch.tanh(F.linear(torch.tanh(self.first(x)), weight * self.mask)))


def _replace_tensor(model: nn.Module, i: int) -> None:
    model.offset = torch.full((6,), float(i))


@STATE.add(between=_replace_tensor)
class TensorAttributeReplaced(Two):
    """A plain tensor attribute is replaced between batches."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.zeros(6)

    def between(self, h: Tensor) -> Tensor:
        return torch.tanh(h + self.offset)


def _anneal(model: nn.Module, i: int) -> None:
    model.temperature = 1 / (1 + i)


@STATE.add(between=_anneal)
class NumberAnnealed(Two):
    """A Python number on the module is annealed between batches."""

    temperature = 1.0

    def between(self, h: Tensor) -> Tensor:
        return h * self.temperature


def _move_buffer_in_place(model: nn.Module, i: int) -> None:
    model.positions[0] += 1


@STATE.add(batches=tokens, between=_move_buffer_in_place)
class PositionTable(nn.Module):
    """A table of positions as a buffer, edited between batches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.register_buffer("positions", torch.randn(7, 6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x) + self.positions[: x.shape[1]] * math.sqrt(2)).mean(1))


@STATE.add(batches=sequences)
class CachedPositions(nn.Module):
    """A table made in the first forward and kept as an attribute (rotary embeddings)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.head = nn.Linear(6, CLASSES)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.cache is None:
            self.cache = torch.outer(torch.arange(x.shape[1]), torch.arange(1, 7)).float().cos()
        return self.head((h * self.cache).mean(1))


# --- Weights and codebooks that a forward moves ----------------------------------------------------------------------


@STATE.add()
class MomentumEncoder(Two):
    """A frozen copy of a layer follows it: moved at the start of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = copy.deepcopy(self.first).requires_grad_(False)

    @torch.no_grad()
    def follow(self) -> None:
        for slow, fast in zip(self.slow.parameters(), self.first.parameters(), strict=True):
            slow.mul_(0.9).add_(fast, alpha=0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.follow()
        h = torch.tanh(self.first(x)) + torch.tanh(self.slow(x))
        return self.head(torch.tanh(self.middle(h)))


@STATE.add()
class MomentumEncoderData(MomentumEncoder):
    """The same through .data, after the forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.tanh(self.slow(x))
        h = torch.tanh(self.first(x)) * target
        out = self.head(torch.tanh(self.middle(h)))
        for slow, fast in zip(self.slow.parameters(), self.first.parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1
        return out


@STATE.add(batches=tokens, oracle=False)
class EmbeddingMaxNorm(nn.Module):
    """Embedding(max_norm=...) rescales the rows it reads, in place, in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, max_norm=1.0)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(x).mean(1))))


@STATE.add()
class VectorQuantiser(Two):
    """A codebook of buffers moved by exponential averages in the forward, straight-through to the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(8, 6))
        self.register_buffer("counts", torch.ones(8))
        self.register_buffer("sums", self.codes.clone())

    def between(self, h: Tensor) -> Tensor:
        nearest = torch.cdist(h.detach(), self.codes).argmin(1)
        quantised = self.codes[nearest]
        with torch.no_grad():
            hot = F.one_hot(nearest, 8).float()
            self.counts.mul_(0.9).add_(hot.sum(0), alpha=0.1)
            self.sums.mul_(0.9).add_(hot.t() @ h, alpha=0.1)
            self.codes.copy_(self.sums / self.counts.clamp(min=1e-3)[:, None])
        return h + (quantised - h).detach()


@STATE.add()
class Queue(Two):
    """A queue of past features as buffers, with a pointer (MoCo)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(18, 6))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def between(self, h: Tensor) -> Tensor:
        near = F.softmax(h @ self.queue.clone().detach().t(), -1) @ self.queue.clone().detach()
        start = int(self.pointer)
        self.queue[start : start + len(h)] = h.detach()
        self.pointer[0] = (start + len(h)) % 18
        return h + near


@STATE.add(oracle=False)
class ClampedWeights(Two):
    """Weights are clamped through .data in the forward (BinaryConnect)."""

    def between(self, h: Tensor) -> Tensor:
        self.middle.weight.data.clamp_(-0.3, 0.3)
        return h


@STATE.add(oracle=False, refused="")
class DataDependentInit(Two):
    """ActNorm: the first forward sets scale and shift from the data, by a flag kept as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("ready", torch.tensor(False))

    def between(self, h: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.scale.copy_(1 / (h.std(0) + 0.1))
                self.ready.fill_(True)
        return h * self.scale


# --- Attributes that a forward sets ----------------------------------------------------------------------------------


def _regularised(model: nn.Module) -> Any:
    return lambda output, y: F.cross_entropy(output, y) + 0.1 * model.hidden.square().mean()


@STATE.add(loss_of=_regularised)
class AttributeReadByLoss(Two):
    """The forward keeps its hidden values as an attribute, and the loss reads it."""

    def between(self, h: Tensor) -> Tensor:
        self.hidden = h
        return h


def _with_extras(model: nn.Module) -> Any:
    return lambda output, y: F.cross_entropy(output, y) + sum(model.extras)


@STATE.add(loss_of=_with_extras)
class ListReadByLoss(Two):
    """The forward fills a list of extra losses, emptied at its start."""

    def forward(self, x: Tensor) -> Tensor:
        self.extras: list[Tensor] = []
        h = torch.tanh(self.first(x))
        self.extras.append(h.abs().mean())
        h = torch.tanh(self.middle(h))
        self.extras.append(0.1 * h.abs().mean())
        return self.head(h)


@STATE.add(batches=lambda: vectors(steps=4))
class CallsCounted(Two):
    """A Python counter: the n-th forward differs from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def between(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * min(1.0, 0.3 * self.calls)


@STATE.add(batches=lambda: vectors(steps=4))
class CallsCountedInBuffer(Two):
    """A counter kept as a buffer and read as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def between(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h if int(self.calls) % 2 else h.relu()


@STATE.add()
class NumbersLogged(Two):
    """The forward logs Python numbers into a dictionary and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.log: dict[str, float] = {}
        self.history: list[float] = []

    def between(self, h: Tensor) -> Tensor:
        self.log["norm"] = h.norm().item()
        self.history.append(h.mean().item())
        return h


@STATE.add()
class Carried(Two):
    """A hidden state is carried from batch to batch as an attribute, detached."""

    def __init__(self) -> None:
        super().__init__()
        self.carried: Tensor | None = None

    def between(self, h: Tensor) -> Tensor:
        out = h if self.carried is None else h + 0.5 * self.carried
        self.carried = out.detach()
        return out


@STATE.add(batches=lambda: vectors(steps=4))
class Memory(Two):
    """A deque of the last outputs takes part in the forward (a segment memory)."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: deque[Tensor] = deque(maxlen=2)

    def between(self, h: Tensor) -> Tensor:
        out = torch.stack([h, *self.memory]).mean(0)
        self.memory.append(h.detach())
        return out


@STATE.add(batches=lambda: vectors(steps=4))
class ObjectWithState(Two):
    """The state lives in an object that is no module."""

    class Meter:
        def __init__(self) -> None:
            self.total, self.count = torch.zeros(6), 0

        def add(self, h: Tensor) -> Tensor:
            self.total += h.detach().sum(0)
            self.count += len(h)
            return self.total / self.count

    def __init__(self) -> None:
        super().__init__()
        self.meter = self.Meter()

    def between(self, h: Tensor) -> Tensor:
        return h - self.meter.add(h)


@STATE.add()
class CachedByKey(Two):
    """Results of a pure function of the shape are cached in a dictionary during the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[Any, Tensor] = {}

    def between(self, h: Tensor) -> Tensor:
        if h.shape not in self.cache:
            self.cache[h.shape] = torch.linspace(0, 1, h.shape[1])
        return h * self.cache[h.shape]


# --- Chance that torch's global generator does not hold --------------------------------------------------------------


@STATE.add()
class NumpyNoise(Two):
    """Noise from numpy's global generator."""

    def between(self, h: Tensor) -> Tensor:
        return h + torch.from_numpy(np.random.normal(size=h.shape)).float()


@STATE.add()
class PythonNoise(Two):
    """A factor from Python's random, and a choice of activation."""

    def between(self, h: Tensor) -> Tensor:
        return random.choice([torch.relu, torch.sin, torch.sigmoid])(h * random.random())


@STATE.add()
class OwnGenerator(Two):
    """Noise from a torch.Generator that the module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = torch.Generator().manual_seed(5)

    def between(self, h: Tensor) -> Tensor:
        return h + torch.randn(h.shape, generator=self.chance)


@STATE.add()
class OwnNumpyGenerator(Two):
    """Noise from a numpy Generator that the module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = np.random.default_rng(5)

    def between(self, h: Tensor) -> Tensor:
        return h + torch.from_numpy(self.chance.normal(size=h.shape)).float()


@STATE.add()
class OwnPythonGenerator(Two):
    """A drop decided by a random.Random that the module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = random.Random(5)

    def between(self, h: Tensor) -> Tensor:
        return h * 0.5 if self.chance.random() < 0.5 else h.sin()


@STATE.add()
class Seeded(Two):
    """The forward seeds the global generator itself, under fork_rng."""

    def between(self, h: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            noise = torch.randn_like(h)
        return F.dropout(h + noise, 0.2)
