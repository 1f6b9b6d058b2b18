"""The benchmarks' own arithmetic and output; nothing here is timed against a bound."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from backforward_suite.commands import bench
from backforward_suite.errors import BadInput


def test_the_table_and_the_file_hold_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"case": "a", "ratio": 1.2345, "note": None}, {"case": "b", "steps_per_second": 1234.5}]
    monkeypatch.setattr(bench, "BENCHMARKS", {"some": lambda: rows})
    monkeypatch.setattr(sys, "argv", ["bench.py", "--out", str(tmp_path / "new" / "bench.json")])
    bench.main()
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert written["some"] == rows
    assert written["machine"]["cores"] >= 1
    shown = capsys.readouterr().out
    assert "1.23" in shown
    assert "1234" in shown


def test_an_unknown_benchmark_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "rulse"])
    with pytest.raises(BadInput, match="no such benchmark: rulse; there are training, sweep, rules, normprop"):
        bench.main()


def test_columns_are_those_of_all_rows() -> None:
    console = Console(width=120, record=True)
    console.print(bench.table("t", [{"a": 1}, {"b_c": 2}]))
    text = console.export_text()
    assert "b c" in text
    assert "-" in text
