"""What normalisation costs: a training step of the Network in Network without norm, with BatchNorm, with NormProp."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F

from backforward.models import NIN, weight_decay_groups
from backforward.normprop import unit_norm_projection

WIDTHS = (1.0, 0.25)
BATCHES = (50, 100)
SECONDS_PER_CASE = 60.0
MIN_ROUNDS = 7

Step = Callable[[], None]


def run() -> dict[str, Any]:
    """Time one training step on CIFAR-sized images, in memory and normalised: forward, cross-entropy, backward, SGD.

    SGD has momentum 0.9 and weight decay. ``prop`` includes the projection to unit norm after it, ``prop_unprojected``
    does not; ``none_contiguous`` is ``none`` with PyTorch's default memory layout, all others have channels innermost.
    The arms take turns, so that what else the machine does falls on all alike.

    Returns:
        ``conditions``, and ``cases``: width, batch, rounds, ``milliseconds`` per step of each arm (median), and
        ``ratios``, each the median over rounds with its quartiles. The paper's ratio of NormProp to BatchNorm is .875.
    """
    return {
        "conditions": {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": "float32",
            "device": "cpu",
        },
        "cases": [_case(width, batch) for width, batch in product(WIDTHS, BATCHES)],
    }


def _case(width: float, batch: int) -> dict[str, Any]:
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.arange(batch) % 10
    steps = {
        "none": _step(NIN((3, 32, 32), 10, width, "none", seed=0), x, y),
        "batch": _step(NIN((3, 32, 32), 10, width, "batch", seed=0), x, y),
        "prop": _step(NIN((3, 32, 32), 10, width, "prop", seed=0), x, y),
        "prop_unprojected": _step(NIN((3, 32, 32), 10, width, "prop", seed=0), x, y, project=False),
        "none_contiguous": _step(_contiguous(NIN((3, 32, 32), 10, width, "none", seed=0)), x, y),
    }
    seconds = _take_turns(steps)
    pairs = [("prop", "none"), ("prop", "batch"), ("prop_unprojected", "none"), ("none", "none_contiguous")]
    return {
        "case": f"NIN, width {width:g}, batch {batch}",
        "width": width,
        "batch": batch,
        "rounds": len(seconds["none"]),
        "milliseconds": {arm: 1e3 * median(times) for arm, times in seconds.items()},
        "ratios": {f"{a}/{b}": _ratio(seconds[a], seconds[b]) for a, b in pairs},
    }


def _contiguous(network: NIN) -> NIN:
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


def _step(network: NIN, x: torch.Tensor, y: torch.Tensor, *, project: bool = True) -> Step:
    optimizer = torch.optim.SGD(weight_decay_groups(network), lr=0.01, momentum=0.9, weight_decay=5e-4)
    parameters = list(network.parameters())
    after_update = unit_norm_projection(network)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        if project:
            with torch.no_grad():
                after_update(parameters)

    return step


def _take_turns(steps: dict[str, Step]) -> dict[str, list[float]]:
    """Seconds of each step in each round, after two rounds to warm up; every round starts with another arm."""
    for step in [*steps.values()] * 2:
        step()
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    arms = list(steps)
    started = time.perf_counter()
    while len(seconds[arms[0]]) < MIN_ROUNDS or time.perf_counter() - started < SECONDS_PER_CASE:
        arms = [*arms[1:], arms[0]]
        for arm in arms:
            begun = time.perf_counter()
            steps[arm]()
            seconds[arm].append(time.perf_counter() - begun)
    return seconds


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    low, middle, high = quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return {"lower_quartile": low, "median": middle, "upper_quartile": high}
