"""Benchmarks that start runs: their overrides are accepted and their rows are complete; no time is judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from backforward.models import MLP
from backforward_suite.bench import common, normprop, sweep, training


def test_training_has_a_row_for_each_method(tmp_path: Path) -> None:
    case = training.TrainingCase("mlp", MLP, ("diagnostics=off",), "mnist", 256, rounds=1)
    rows = training.run(tmp_path, [case])
    assert [(row["case"], row["method"], row["steps"]) for row in rows] == [
        ("mlp, batch 256, digits", method, 5) for method in ("sgd", "bfp")
    ]
    assert all(row["ratio"] == pytest.approx(row["bare_ms"] / row["lightning_ms"]) for row in rows)


def test_normprop_has_the_times_and_ratios_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normprop, "WIDTHS", (0.05,))
    monkeypatch.setattr(normprop, "BATCHES", (2,))
    asked: list[list[str]] = []

    def train(overrides: list[str]) -> common.Row:
        asked.append(overrides)
        return common.train([*overrides, "study.rounds=2", "study.seconds_a_turn=0"])

    monkeypatch.setattr(normprop, "train", train)
    (row,) = normprop.run(tmp_path)
    assert row["case"] == "nin, width 0.05, batch 2"
    assert all(row[key] > 0 for key in ("none_ms", "batch_ms", "prop_ms", "prop/none", "prop/batch"))


def test_a_sweep_is_timed_against_bare_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are recorded instead of run."""
    asked: list[list[str]] = []

    def command(arguments: list[str], folder: str, root: Path) -> float:
        asked.append(arguments)
        return 6.0

    monkeypatch.setattr(sweep, "_command", command)
    monkeypatch.setattr(sweep, "_starts", lambda _: [0.5, 0.25, 1.5])
    monkeypatch.setattr(sweep, "_bare", lambda *_: 1.0)
    monkeypatch.setattr(sweep, "SLOTS", 2)
    monkeypatch.setattr(sweep, "CASES", (sweep.SweepCase("digits", 32, 4), sweep.SweepCase("mnist", 128, 60)))
    (row,) = sweep.run(tmp_path)  # that folder has no MNIST
    assert [arguments[0] for arguments in asked] == [*(f"seed={n}" for n in range(5)), "-m"]
    assert "seed=0,1,2,3" in asked[-1]
    assert row["pool/bare"] == 6.0 / (2 * 1.0 * 4 / (2 * 1 * 2))
    assert (row["start_s"], row["start_alone_s"], row["single_s"]) == (0.5, 0.5, None)
