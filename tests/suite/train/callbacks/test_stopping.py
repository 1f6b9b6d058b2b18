"""Trainings that end before their last epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.helpers.training import CutOff, trained

from backforward_suite.runs import files
from backforward_suite.train.callbacks.checkpoint import Checkpoints
from backforward_suite.train.callbacks.stopping import why_stop


@pytest.mark.parametrize(
    ("losses", "stop_loss", "patience", "min_delta", "ends"),
    [
        ([], 0.1, 1, 0.0, None),
        ([0.5, 0.2], 0.1, None, 0.0, None),
        ([0.5, 0.1], 0.1, None, 0.0, (2, "stop_loss")),
        ([0.5, 0.4, 0.4, 0.41], None, 2, 0.0, (4, "patience")),
        ([0.5, 0.4, 0.4, 0.39], None, 2, 0.0, None),
        ([0.5, 0.4, 0.395, 0.392], None, 2, 0.01, (4, "patience")),
        # Slow progress is measured from the lowest loss that counted as progress, not from the last.
        ([0.5, 0.496, 0.492, 0.488], None, 3, 0.01, None),
        ([0.5, 0.6, 0.09], 0.1, 2, 0.0, (3, "stop_loss")),
        ([0.5, float("nan"), float("nan")], 0.1, 2, 0.0, (3, "patience")),
    ],
)
def test_when_training_ends_early(
    losses: list[float], stop_loss: float | None, patience: int | None, min_delta: float, ends: tuple[int, str] | None
) -> None:
    first = next(
        ((n, why) for n in range(len(losses) + 1) if (why := why_stop(losses[:n], stop_loss, patience, min_delta))),
        None,
    )
    assert first == ends


def test_a_run_ends_after_the_epoch_that_reaches_the_loss(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", "max_epochs=5")
    losses = [row["loss/train"] for row in files.read_metrics(tmp_path / "whole")[1:]]
    assert losses == sorted(losses, reverse=True), "this test needs a loss that falls"
    ended = trained(tmp_path / "ended", "max_epochs=5", f"stop_loss={losses[2]}")
    assert "stopped_at" not in whole
    assert (ended["status"], ended["stopped_by"], ended["stopped_at"]) == ("finished", "stop_loss", 3)
    assert ended["final"]["epoch"] == 3
    assert ended["final"]["accuracy/test"] is not None
    curve = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    assert (tmp_path / "ended" / "metrics.csv").read_text().splitlines() == curve[:5]
    on = trained(tmp_path / "on", "max_epochs=2", f"stop_loss={losses[2]}")
    assert (on["stopped_by"], on["stopped_at"]) == (None, None)


def test_a_run_ended_early_and_killed_before_its_result_trains_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise CutOff

    overrides = ("lr=0.5", "patience=1", "min_delta=10", "max_epochs=9")
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Checkpoints, "on_train_end", killed)
        trained(tmp_path, *overrides)
    rows = (tmp_path / "metrics.csv").read_bytes()
    result = trained(tmp_path, *overrides)
    assert (result["stopped_by"], result["stopped_at"]) == ("patience", 2)
    assert (tmp_path / "metrics.csv").read_bytes() == rows
