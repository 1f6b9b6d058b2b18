from __future__ import annotations

from pathlib import Path

from backforward_suite.runs.files import read_metrics
from backforward_suite.train.callbacks.record import RunRecord


def filled(folder: Path | None, *accuracies: float) -> RunRecord:
    record = RunRecord(folder)
    for epoch, accuracy in enumerate(accuracies):
        record.add({"accuracy/validation": accuracy}, epoch=epoch, step=10 * epoch, lr=0.1, logger=None)
    return record


def test_every_row_is_written_at_once(tmp_path: Path) -> None:
    record = filled(tmp_path, 0.1, 0.5)
    assert read_metrics(tmp_path) == record.rows
    assert record.rows[1] == {"epoch": 1, "step": 10, "lr": 0.1, "accuracy/validation": 0.5}


def test_the_best_row_is_the_earliest_of_equals() -> None:
    best = filled(None, 0.1, 0.5, 0.5, 0.3).best()
    assert best is not None
    assert best["epoch"] == 1
    assert RunRecord(None).best() is None


def test_an_epoch_that_is_done_again_replaces_its_row_and_those_after_it() -> None:
    record = filled(None, 0.1, 0.2, 0.3)
    record.add({"accuracy/validation": 0.9}, epoch=1, step=10, lr=0.1, logger=None)
    assert [row["accuracy/validation"] for row in record.rows] == [0.1, 0.9]


def test_rows_travel_with_the_checkpoint() -> None:
    record, resumed = filled(None, 0.1, 0.2), RunRecord(None)
    record.seconds, record.samples = 1.5, 20
    resumed.load_state_dict(record.state_dict())
    assert (resumed.rows, resumed.seconds, resumed.samples) == (record.rows, 1.5, 20)
