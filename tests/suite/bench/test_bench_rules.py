"""The counted floors against formulas and against what the engines really execute; the shape of the table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backforward.flops import FlopCounter
from backforward.models.mlp import MLP
from backforward.models.nin import NIN
from backforward.models.residual import Residual
from backforward.rules import Backforward, Backprop
from backforward_suite.bench.rules import LR, RulesCase, _plain_loop, _sgd_by_hand, counted, measure
from backforward_suite.timing import peak_memory

NETWORKS = {
    "mlp": lambda: MLP((1, 8, 8), 10, hidden=16, depth=3, seed=0),
    "nin": lambda: NIN((3, 32, 32), 10, width=0.05, norm="none", seed=0),
    "nin-normprop": lambda: NIN((3, 32, 32), 10, width=0.05, norm="prop", seed=0),
    "residual": lambda: Residual((3, 8, 8), 10, width=0.25, norm="batch", seed=0),
}


def batch(name: str, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    shape = {"mlp": (1, 8, 8), "residual": (3, 8, 8)}.get(name, (3, 32, 32))
    return torch.randn(size, *shape), torch.randint(10, (size,))


def addmm_in_place(_: object, a: tuple[int, int], b: tuple[int, int], **__: object) -> int:
    """Twice the multiply-accumulates of a product of matrices of these shapes; torch's counter does not know it."""
    return 2 * a[0] * a[1] * b[1]


def executed(rule: Backforward | Backprop, x: torch.Tensor, y: torch.Tensor) -> int:
    """Multiply-accumulates of a step, as the kernels' shapes tell."""
    rule.step(x, y)
    with FlopCounter({torch.ops.aten.addmm_: addmm_in_place}) as counter:
        rule.step(x, y)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for name in NETWORKS for engine in ("replay", "naive")] + [("mlp", "shortcut")],
)
def test_the_engines_execute_no_more_than_what_is_counted(name: str, engine: str) -> None:
    model, (x, y) = NETWORKS[name](), batch(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = Backforward(model, optimizer, F.cross_entropy, engine=engine)
    ours = executed(rule, x, y) / executed(Backprop(model, optimizer, F.cross_entropy), x, y)
    assert ours == pytest.approx(counted(model, x, rule.groups)[engine])


def test_the_count_of_a_chain_is_the_formula() -> None:
    model, (x, _) = NETWORKS["mlp"](), batch("mlp")
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.01), F.cross_entropy)
    rule.prepare(x)
    c = [m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    sgd = 3 * sum(c) - c[0]
    bfp = sum((2 * j + 1) * macs for j, macs in enumerate(c, start=1)) - c[-1]
    assert counted(model, x, rule.groups)["replay"] == pytest.approx(bfp / sgd)


@pytest.mark.parametrize(
    ("model", "shape", "size", "engine", "expected"),
    [
        (lambda: MLP((1, 28, 28), 10, seed=0), (1, 28, 28), 64, "replay", 1.50),
        (lambda: MLP((1, 28, 28), 10, seed=0), (1, 28, 28), 64, "shortcut", 1.17),
        (lambda: NIN((3, 32, 32), 10, norm="none", seed=0), (3, 32, 32), 1, "replay", 2.93),
    ],
    ids=["mlp", "mlp-shortcut", "nin"],
)
def test_published_sizes(model: object, shape: tuple[int, ...], size: int, engine: str, expected: float) -> None:
    network = model()  # type: ignore[operator]
    x = torch.randn(size, *shape)
    rule = Backforward(network, torch.optim.SGD(network.parameters(), lr=0.01), F.cross_entropy)
    rule.prepare(x)
    assert counted(network, x, rule.groups)[engine] == pytest.approx(expected, abs=0.005)


def test_a_case_gives_a_row_for_the_fastest_loop_and_for_each_engine() -> None:
    engines = ("naive", "replay", "shortcut")
    case = RulesCase("tiny", lambda: MLP((1, 4, 4), 10, hidden=4, seed=0), (1, 4, 4), 2, 2, engines, by_hand=True)
    rows = measure(case)
    assert [row["engine"] for row in rows][1:] == ["sgd by hand", "Backprop", *engines]
    assert rows[0]["engine"].startswith("plain loop")
    assert rows[0]["ratio_to_sgd"] == 1.0
    assert all(row["median_ms"] > 0 and row["peak_mb"] > 0 for row in rows)
    assert [row["counted_floor"] is not None for row in rows] == [False, False, True, True, True, True]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("engine", ["replay", "naive"])
def test_no_engine_holds_more_than_a_plain_loop_and_a_few_outputs(name: str, engine: str) -> None:
    model, (x, y) = NETWORKS[name](), batch(name, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = Backforward(model, optimizer, F.cross_entropy, engine=engine)
    plain = peak_memory(_plain_loop(model, optimizer, x, y))
    # The tape keeps results that a later pass may return again: up to a quarter more, with skip connections.
    most = 1.3 if engine == "replay" else 1.1
    assert peak_memory(lambda: rule.step(x, y)) <= most * plain + 3 * model(x).nbytes


def test_sgd_by_hand_is_sgd() -> None:
    x, y = batch("mlp")
    hand, autograd = NETWORKS["mlp"](), NETWORKS["mlp"]()
    _sgd_by_hand(hand, x, y)()
    Backprop(autograd, torch.optim.SGD(autograd.parameters(), lr=LR), F.cross_entropy).step(x, y)
    for ours, theirs in zip(hand.parameters(), autograd.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
