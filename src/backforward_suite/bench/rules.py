"""Cost of an update rule per batch: its time and its multiply-accumulates against those of plain SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backforward.flops import FlopCounter
from backforward.models import MLP, NIN, Residual
from backforward.rules import Backforward, Backprop
from backforward_suite.bench.common import Row
from backforward_suite.timing import Arm, interleaved, peak_memory


class RulesCase(NamedTuple):
    """A network (always with the same initial weights), and the engines of Backforward to measure on it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one input
    batch_size: int
    rounds: int = 15
    engines: tuple[str, ...] = ("naive", "replay")


def _mlp(batch_size: int, depth: int = 1) -> RulesCase:
    name, shape = f"mlp of {depth} hidden layer{'s' * (depth > 1)}", (1, 28, 28)
    engines = ("naive", "replay", "shortcut")
    return RulesCase(name, lambda: MLP(shape, 10, depth=depth, seed=0), shape, batch_size, engines=engines)


CASES = (
    _mlp(32),
    _mlp(64),
    _mlp(256),
    _mlp(64, depth=8),
    RulesCase("nin", lambda: NIN((3, 32, 32), 10, seed=0), (3, 32, 32), 50, rounds=5),
    RulesCase("resnet-20", lambda: Residual((3, 32, 32), 10, norm="batch", seed=0), (3, 32, 32), 50, rounds=5),
)


def run(cases: Iterable[RulesCase] = CASES) -> list[Row]:
    """Measure all cases.

    Returns:
        One row per case and engine: `median_ms` and `spread_ms` per batch; `ratio_to_sgd`, the time against the fastest
        plain loop, measured in turn with it; `arithmetic`, the multiply-accumulates as a multiple of SGD's;
        `peak_mb`, the most memory in tensors that a step uses at one time (10^6 bytes).
    """
    return [row for case in cases for row in measure(case)]


def measure(case: RulesCase) -> list[Row]:
    """Return the rows of one case."""
    arms = _arms(case)
    timings = interleaved(arms, case.rounds)
    loops = [name for name in arms if name.startswith("plain loop")]
    sgd = min(loops, key=lambda name: timings[name].median)
    macs = multiply_accumulates(arms[sgd])
    return [
        {
            "case": f"{case.name}, batch {case.batch_size}",
            "engine": name,
            "median_ms": timings[name].median,
            "spread_ms": timings[name].spread,
            "ratio_to_sgd": timings[name].ratio(timings[sgd]),
            "arithmetic": multiply_accumulates(arms[name]) / macs,
            "peak_mb": peak_memory(arms[name]) / 1e6,
            "threads": torch.get_num_threads(),
        }
        for name in [sgd, *(name for name in arms if name not in loops)]
    ]


def _arms(case: RulesCase) -> dict[str, Arm]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch_size, *case.shape, generator=generator)
    y = torch.randint(10, (case.batch_size,), generator=generator)

    def fresh(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = case.build()
        return model, torch.optim.SGD(model.parameters(), lr=0.01, **options)

    arms: dict[str, Arm] = {}
    for kind in ("", "foreach", "fused"):
        arms[f"plain loop {kind}".strip()] = plain_loop(*fresh(**({kind: True} if kind else {})), x, y)
    backprop = Backprop(*fresh(), F.cross_entropy)
    arms["Backprop"] = lambda: backprop.step(x, y)
    for engine in case.engines:
        rule = Backforward(*fresh(), F.cross_entropy, engine=engine)
        arms[engine] = lambda rule=rule: rule.step(x, y)  # type: ignore[misc]
    return arms


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Arm:
    """Return a step of an ordinary training loop."""

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()  # last, so that no arm keeps gradients between steps

    return step


def multiply_accumulates(step: Arm) -> int:
    """Count those of the products and convolutions that a step computes."""
    with FlopCounter({torch.ops.aten.addmm_: _addmm_in_place}) as counter:  # torch's counter does not know it
        step()
    return int(counter.get_total_flops()) // 2


def _addmm_in_place(_: object, a: tuple[int, int], b: tuple[int, int], **__: object) -> int:
    return 2 * a[0] * a[1] * b[1]
