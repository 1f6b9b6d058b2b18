"""The tape saves work and returns only results that are still valid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backforward import Backforward


class _Ran(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[name-defined]
    """Counts matrix products, below all Python code."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def products(depth: int, engine: str) -> int:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss, engine=engine)
    x = torch.randn(3, 4)
    rule.step(x, x)
    with _Ran() as ran:
        rule.step(x, x)
    return ran.products


def test_skips_forward_and_backward_below_the_group() -> None:
    """With c_j = 1 for each layer of a chain, Backforward costs sum(2j + 1) - 1, naive L (3 L - 1)."""
    for depth in (2, 3, 5):
        assert products(depth, "auto") == sum(2 * j + 1 for j in range(1, depth + 1)) - 1
        assert products(depth, "naive") == depth * (3 * depth - 1)


def test_frees_everything_at_the_end_of_a_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss)
    x = torch.randn(3, 4)
    out = rule.step(x, x)
    assert out.output.grad_fn is None
    assert not vars(x)
    assert all(not vars(p) for p in model.parameters())


class Trunk(nn.Module):
    """Two branches in a row: passes of the last groups can replay all of the first branch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("steps", torch.zeros(1, 4, dtype=torch.long))
        self.start = 0.0  # the sum of the first weights before the batch

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.between(self.one(x))).tanh())

    def between(self, h: Tensor) -> Tensor:
        return h


class ReadsShape(Trunk):
    """Reads the shape of a copy, then changes the copy in place."""

    def between(self, h: Tensor) -> Tensor:
        h = h.clone()
        h[: len(h) // 2, : h.shape[1] // 2].zero_()
        return h * h.size(0) / h.numel()


class Transposes(Trunk):
    """Transposes in place between two reads of the shape."""

    def between(self, h: Tensor) -> Tensor:
        y = h[:2].clone()
        rows = y.shape[0]
        y.t_()
        return h * (10 * rows + y.shape[0]) / 64


class WritesOut(Trunk):
    """Reshapes an empty tensor by `out=`."""

    def between(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            y = torch.empty(0)
            before = y.numel()
            torch.add(h, 1, out=y)
        return h * (1 + before) + y.numel() * y / 16


class GathersExpanded(Trunk):
    """Calls a function that is not in `READERS` on an expanded buffer."""

    def between(self, h: Tensor) -> Tensor:
        return h + torch.gather(self.steps.expand(len(h), 4), 1, torch.zeros(len(h), 4, dtype=torch.long))


class CastsByValue(Trunk):
    """Enables autocast for the second branch depending on the first branch's weights, which change between passes."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(4, 2)

    def moved(self) -> bool:
        return self.one.weight.sum().item() != self.start

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.moved()):
            side = self.side(x)
        return self.last(self.two(h)).tanh() + side


class CastsToAnotherType(CastsByValue):
    """The same, but autocast is always on and its type changes."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        with torch.autocast("cpu", torch.float16 if self.moved() else torch.bfloat16):
            side = self.side(x)
        return self.last(self.two(h)).tanh() + side


@pytest.mark.parametrize(
    "network",
    [ReadsShape, Transposes, WritesOut, GathersExpanded, CastsByValue, CastsToAnotherType],
    ids=lambda network: network.__name__,
)
def test_replays_and_equals_the_naive_engine_bitwise(network: type[Trunk]) -> None:
    ends = []
    for engine in ("auto", "naive"):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        layers = [name for name in ("one", "two", "last", "side") if hasattr(model, name)]
        rule = Backforward(model, optimizer, F.cross_entropy, engine=engine, groups=layers)
        shown = []
        for _ in range(3):
            model.start = model.one.weight.sum().item()
            shown.append(rule.step(torch.randn(4, 4), torch.tensor([0, 1, 0, 1])))
        assert not rule.engine_reason
        ends.append([*model.state_dict().values(), *(out.loss for out in shown), *(out.output for out in shown)])
    assert all(map(torch.equal, *ends))
