"""Random small networks, for tests that want graphs that nobody thought of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

FEATURES = 4
LAYERS = (
    "linear",
    "norm",
    "batchnorm",
    "dropout",
    "held",
    "tanh",
)  # one module each; a later operation may use it again
JOINS = ("add", "multiply", "concatenate", "add_in_place")


class Operation(NamedTuple):
    """What one node of the network does, to which earlier values (0 is the input)."""

    kind: str
    sources: tuple[int, int]
    again: bool  # use the module of the last operation of this kind: tied weights


class RandomNetwork(nn.Module):
    """A directed graph of operations on values of shape [batch, 4]; the output is the sum of all unused values."""

    def __init__(self, operations: list[Operation]) -> None:
        super().__init__()
        self.operations = operations
        self.parts = nn.ModuleList()
        self.part_of: list[int | None] = []
        last: dict[str, int] = {}
        for kind, _, again in operations:
            if kind not in LAYERS and kind != "concatenate":
                self.part_of.append(None)
                continue
            if not again or kind not in last:
                last[kind] = len(self.parts)
                self.parts.append(_part(kind))
            self.part_of.append(last[kind])
        self.head = nn.Linear(FEATURES, FEATURES)

    def extra_repr(self) -> str:
        return f"{self.operations}"

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        used = set()
        for (kind, (a, b), _), index in zip(self.operations, self.part_of, strict=True):
            left, right = values[a], values[b]
            used |= {a, b} if kind in JOINS else {a}
            if kind == "concatenate":
                value = self.parts[index](torch.cat([left, right], dim=1))
            elif index is not None:
                value = self.parts[index](left)
            elif kind == "multiply":
                value = left * right
            else:
                value = left + right
                if kind == "add_in_place":
                    value.view(-1).mul_(0.5)
                    value += right
            values.append(value)
        total = torch.zeros_like(x)
        for i, value in enumerate(values):
            if i not in used:
                total = total + value
        return self.head(total)


class _Held(nn.Module):
    """A parameter held by a module that is no layer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _part(kind: str) -> nn.Module:
    return {
        "linear": lambda: nn.Linear(FEATURES, FEATURES),
        "concatenate": lambda: nn.Linear(2 * FEATURES, FEATURES),
        "norm": lambda: nn.LayerNorm(FEATURES),
        "batchnorm": lambda: nn.BatchNorm1d(FEATURES),
        "dropout": lambda: nn.Dropout(0.3),
        "held": _Held,
        "tanh": nn.Tanh,
    }[kind]()


@st.composite
def networks(draw: Any) -> RandomNetwork:
    """A network of one to nine operations, the same weights for the same graph."""
    operations = []
    for i in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(LAYERS + JOINS))
        sources = (draw(st.integers(max(0, i - 3), i)), draw(st.integers(0, i)))
        operations.append(Operation(kind, sources, draw(st.booleans())))
    with torch.random.fork_rng():
        torch.manual_seed(len(operations))
        return RandomNetwork(operations)
