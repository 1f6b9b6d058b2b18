"""What an update rule costs per batch: time against the plainest loop, beside the arithmetic that cannot be avoided."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from backforward.flops import FlopCounter
from backforward.models.mlp import MLP
from backforward.models.nin import NIN
from backforward.models.residual import Residual
from backforward.rules import Backforward, Backprop, Group
from backforward_suite.timing import Arm, interleaved, peak_memory

LR = 0.01


@dataclass(frozen=True)
class RulesCase:
    """A network and a batch size.

    Attributes:
        name: As the table shows it.
        build: The network, always with the same initial weights.
        shape: Of one input.
        batch: Samples in a batch.
        rounds: Rounds of timing.
        engines: Engines of Backforward that it is measured with.
        by_hand: Whether SGD written out by hand stands beside it (for chains of linear layers and ReLU).
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    rounds: int = 15
    engines: tuple[str, ...] = ("naive", "replay")
    by_hand: bool = False


def _mlp(batch: int, depth: int = 1) -> RulesCase:
    def build() -> nn.Module:
        return MLP((1, 28, 28), 10, hidden=256, depth=depth, seed=0)

    name = f"mlp 784-256-10, batch {batch}" if depth == 1 else f"mlp of {depth} hidden layers, batch {batch}"
    return RulesCase(name, build, (1, 28, 28), batch, engines=("naive", "replay", "shortcut"), by_hand=True)


CASES = (
    _mlp(32),
    _mlp(64),
    _mlp(256),
    _mlp(64, depth=8),
    RulesCase("nin, batch 50", lambda: NIN((3, 32, 32), 10, norm="none", seed=0), (3, 32, 32), 50, rounds=5),
    RulesCase(
        "resnet-20, batch 50", lambda: Residual((3, 32, 32), 10, norm="batch", seed=0), (3, 32, 32), 50, rounds=5
    ),
)


def run(cases: Iterable[RulesCase] = CASES, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """Measure all cases; one row for each case and engine, each case timed in one go.

    Returns:
        Rows of `case`, `engine`, `median_ms` and `spread_ms` per batch, `ratio_to_sgd` (time against the fastest plain
        loop, measured in turn with it), `counted_floor` (multiply-accumulates against SGD's; None where the engine is
        not bound by them), `ratio_to_floor`, `peak_mb` (10^6 bytes of tensors that a step holds at a time), `threads`.
    """
    return [row for case in cases for row in measure(case, device)]


def measure(case: RulesCase, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """The rows of one case."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, *case.shape, generator=generator).to(device)
    y = torch.randint(10, (case.batch,), generator=generator).to(device)
    arms, floors = _arms(case, x, y)
    timings = interleaved(arms, case.rounds, device=device)
    loops = [name for name in arms if name.startswith("plain loop")]
    sgd = min(loops, key=lambda name: timings[name].median)
    rows = []
    for name in [sgd, *(name for name in arms if name not in loops)]:
        ratio, floor = timings[name].ratio(timings[sgd]), floors.get(name)
        rows.append(
            {
                "case": case.name,
                "engine": name,
                "median_ms": timings[name].median,
                "spread_ms": timings[name].spread,
                "ratio_to_sgd": ratio,
                "counted_floor": floor,
                "ratio_to_floor": ratio / floor if floor else None,
                "peak_mb": peak_memory(arms[name], device) / 1e6,
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def _arms(case: RulesCase, x: Tensor, y: Tensor) -> tuple[dict[str, Arm], dict[str, float]]:
    """What is timed, and what each must cost at least, as a multiple of SGD's multiply-accumulates."""

    def fresh(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = case.build().to(x.device)
        return model, torch.optim.SGD(model.parameters(), lr=LR, **options)

    arms: dict[str, Arm] = {}
    for kind in ("", "foreach", "fused"):
        arms[f"plain loop {kind}".strip()] = _plain_loop(*fresh(**({kind: True} if kind else {})), x, y)
    if case.by_hand:
        arms["sgd by hand"] = _sgd_by_hand(fresh()[0], x, y)
    backprop = Backprop(*fresh(), F.cross_entropy)
    arms["Backprop"] = lambda: backprop.step(x, y)
    floors = {"Backprop": 1.0}
    for engine in case.engines:
        model, optimizer = fresh()
        rule = Backforward(model, optimizer, F.cross_entropy, engine=engine)
        rule.prepare(x)
        arms[engine] = lambda rule=rule: rule.step(x, y)  # type: ignore[misc]
        floors[engine] = counted(model, x, rule.groups)[engine]
    return arms, floors


def _plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Arm:
    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()  # last, so that no arm holds gradients between steps

    return step


def _sgd_by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Arm:
    """SGD on linear layers with ReLU between them, without autograd and without an optimizer."""
    layers = [(m.weight.detach(), m.bias.detach()) for m in model.modules() if isinstance(m, nn.Linear)]
    rows = torch.arange(len(y), device=x.device)

    def step() -> None:
        inputs = [x.flatten(1)]
        for weight, bias in layers[:-1]:
            inputs.append(F.linear(inputs[-1], weight, bias).relu_())
        d = F.linear(inputs[-1], *layers[-1]).softmax(1)
        d[rows, y] -= 1
        d /= len(y)
        for (weight, bias), h in zip(layers[::-1], inputs[::-1], strict=True):
            below = None if h is inputs[0] else torch.ops.aten.threshold_backward(d @ weight, h, 0)
            weight.addmm_(d.t(), h, alpha=-LR)
            bias.add_(d.sum(0), alpha=-LR)
            d = d if below is None else below

    return step


def counted(model: nn.Module, x: Tensor, groups: Sequence[Group]) -> dict[str, float]:
    """Multiply-accumulates of a batch of Backforward as a multiple of SGD's, counted on the network's graph.

    SGD's are each operation's forward, and as many again for each operand (an input or a weight) whose gradient is
    needed. A sub-step's are the forward of each operation that the last update concerns, and as many again for
    each operand between the group and the loss. For a chain of layers with c_j multiply-accumulates that makes
    3 sum(c) - c_1 for SGD and sum((2 j + 1) c_j) - c_L for replay. What has no multiply-accumulates (normalisation,
    activations, the update) is not counted.

    Returns:
        `replay`, `naive`, and, for linear layers in a row, `shortcut` (see `rules.Shortcut`).
    """
    nodes = _count_nodes(model, x, groups)
    every = -1  # all bits
    sgd = sum(macs * (1 + sum(bool(o & every) for o in operands)) for macs, _, operands in nodes)
    replay = 0
    for k in range(len(groups)):
        for macs, depends, operands in nodes:
            stale = k == 0 or depends & 1 << (k - 1)
            replay += macs * (bool(stale) + sum(bool(o & 1 << k) for o in operands))
    found = {"replay": replay / sgd, "naive": float(len(groups))}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if len(linears) == len(groups) == len(nodes):
        n = len(x)
        costs = [macs for macs, _, _ in nodes]
        moved = [
            min(n * n * (m.in_features + m.out_features), cost)
            for m, cost in zip(linears[:-1], costs[:-1], strict=True)
        ]
        passes = sum(cost + 2 * sum(costs[k + 1 :]) for k, cost in enumerate(costs))
        found["shortcut"] = (sum(costs) + passes + sum(moved)) / sgd
    return found


def _count_nodes(model: nn.Module, x: Tensor, groups: Sequence[Group]) -> list[tuple[int, int, list[int]]]:
    """For each operation with multiply-accumulates: how many, the groups it depends on, those of each operand.

    Groups are sets of bits. Operands are inputs with at least two dimensions, and the weight of a layer.
    """
    bit = {id(p): 1 << k for k, group in enumerate(groups) for p in group.parameters}
    graph = fx.symbolic_trace(model)
    depends: dict[fx.Node, int] = {}
    found = []

    class Counter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with FlopCounter() as counter:
                value = super().run_node(n)
            held: list[Tensor] = []
            if n.op == "call_module":
                held = list(model.get_submodule(str(n.target)).parameters())
            elif n.op == "get_attr":
                held = [value]
            operands = [
                depends[s] for s in n.all_input_nodes if isinstance(self.env[s], Tensor) and self.env[s].dim() > 1
            ]
            operands += [bit.get(id(p), 0) for p in held if p.dim() > 1 and n.op == "call_module"]
            depends[n] = 0
            for mask in [bit.get(id(p), 0) for p in held] + [depends[s] for s in n.all_input_nodes]:
                depends[n] |= mask
            if counter.get_total_flops():
                found.append((counter.get_total_flops() // 2, depends[n], operands))
            return value

    with torch.no_grad():
        Counter(graph, garbage_collect_values=False).run(x)
    return found
