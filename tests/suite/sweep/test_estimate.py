"""Estimates of a sweep's time from known times."""

from __future__ import annotations

import pytest
from tests.helpers.commands import CONF

from backforward_suite.sweep.estimate import Planned, at_most, planned, seconds_an_epoch


def result(method: str, seconds: float, epochs: int, depth: int = 1) -> dict[str, object]:
    return {
        "choices": {"method": method},
        "settings": {"model": {"depth": depth}},
        "final": {"epoch": epochs},
        "timing": {"seconds": seconds},
    }


def test_seconds_per_epoch() -> None:
    results = [result("sgd", 20, 10), result("sgd", 8, 2), result("bfp", 30, 10, depth=4)]
    assert seconds_an_epoch(results) == {("sgd", 1): 3.0, ("bfp", 4): 3.0}


def test_a_sweep_takes_at_most_the_sum_of_its_epochs() -> None:
    runs = [Planned(("sgd", 1), 100), Planned(("bfp", 1), 10)]
    assert at_most(runs, {("sgd", 1): 2.0, ("bfp", 1): 3.0}) == 230
    assert at_most(runs, {("sgd", 1): 2.0}) == 220, "an unknown kind is as slow as the slowest known"
    assert at_most(runs, {}) is None


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_the_runs_of_an_experiment_are_those_of_its_grids(scale: str) -> None:
    runs = planned(CONF, "bfp_learning_rates", scale)
    assert len(runs) == 4 * 6 * 5 + 3 * 5
    assert {run.epochs for run in runs} == {20 if scale == "small" else 1000}
    assert {run.kind for run in runs} == {(method, 1) for method in ("sgd", "bfp", "bfp_poster", "sgd_repeat")}
    assert {run.kind[1] for run in planned(CONF, "bfp_depth", scale)} >= {1, 2, 4, 8}
