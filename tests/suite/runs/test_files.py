from __future__ import annotations

import csv
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from backforward_suite.runs.files import natural, read_metrics, write_metrics


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
def test_metrics_keep_every_bit(values: list[float]) -> None:

    with tempfile.TemporaryDirectory() as folder:
        write_metrics(Path(folder), [{"epoch": n, "x": value} for n, value in enumerate(values)])
        assert [row["x"] for row in read_metrics(Path(folder))] == values


def test_a_metric_that_was_not_measured_is_an_empty_cell(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"epoch": 0, "a": 1.0}, {"epoch": 1, "a": 2.0, "b": 3.0}])
    with (tmp_path / "metrics.csv").open() as file:
        assert next(csv.DictReader(file)) == {"epoch": "0", "a": "1.0", "b": ""}
    assert read_metrics(tmp_path)[0]["b"] is None
    assert read_metrics(tmp_path / "nowhere") == []


def test_numbers_in_names_are_ordered_by_value() -> None:
    assert sorted(["lr0.1-seed10", "lr0.1-seed2", "lr0.05-seed3"], key=natural) == [
        "lr0.05-seed3",
        "lr0.1-seed2",
        "lr0.1-seed10",
    ]
