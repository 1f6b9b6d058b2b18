"""The arithmetic of the price of diagnostics; nothing here is timed against a bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backforward_suite.bench import diagnostics as bench


def result(start: float, batch: float, epoch: float, times: int = 2) -> dict[str, Any]:
    """Of a run of 100 steps of .01 s; measured so many times within its epoch, and once at the end."""
    return {
        "timing": {
            "diagnostics_seconds": {"start": start, "batch": times * batch, "epoch": epoch},
            "diagnostics_times": {"start": 1, "batch": times, "epoch": 1},
            "training_seconds": 1.0 + times * batch + epoch,
        },
        "final": {"step": 100},
        "data": {"name": "digits"},
        "settings": {"diagnostics": {"shift": ["epoch", "log"], "inputs": ["epoch"], "jacobian": [], "samples": 250}},
    }


def test_prices_are_carried_over_to_the_default_schedule() -> None:
    found = bench.added(result(start=0.5, batch=0.2, epoch=0.3), per_epoch=100)
    assert found["step_ms"] == pytest.approx(10)
    assert found["batch_ms"] == pytest.approx(200)
    assert found["epoch_ms"] == pytest.approx(300)
    # 1,000 batches: after 1, 4, 16, 64, 256 within an epoch, after 100, 200, ... at its end
    assert found["added"] == pytest.approx((0.5 + 5 * 0.2 + 10 * 0.3) / 10)
    assert found["added_first"] == pytest.approx((0.5 + 4 * 0.2 + 0.3) / 1)


def test_each_case_is_run_with_each_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def train(overrides: list[str]) -> dict[str, Any]:
        asked.append(overrides)
        return result(0.5, 0.25, 0.5)

    monkeypatch.setattr(bench, "train", train)
    rows = bench.run(tmp_path, ["nin"])
    assert [overrides[-1] for overrides in asked] == ["diagnostics=cheap", "diagnostics=full"]
    assert all("data=digits" in overrides for overrides in asked)  # that folder has no CIFAR-10
    assert [(row["case"], row["bundle"]) for row in rows] == [
        ("nin, digits, batch 50", "cheap"),
        ("nin, digits, batch 50", "full"),
    ]
    assert rows[0]["added"] == rows[0]["added_least"] == rows[0]["added_most"]


def test_every_case_names_a_data_set_of_known_size() -> None:
    assert {case.data for case in bench.CASES.values()} == set(bench.IMAGES)
