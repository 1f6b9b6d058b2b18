"""The display of a running sweep."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tests.helpers.configs import requested

from backforward_suite.sweep.jobs import Job, Outcome
from backforward_suite.sweep.view import View, told_apart


def jobs(tmp_path: Path) -> list[Job]:
    request = requested("data=digits")
    long = "a_name_that_is_far_longer_than_any_terminal_is_wide_" * 3
    return [
        Job(Path("train.py"), (), tmp_path / f"{long}{method}-lr{lr}", request, (f"method={method}", f"lr={lr}"))
        for method in ("bfp", "sgd")
        for lr in ("0.1", "0.05")
    ]  # fmt: skip


def test_labels_show_what_varies() -> None:
    runs = {
        1: ["lr=0.1", "method=bfp", "seed=0", "optimizer.momentum=0.9"],
        2: ["lr=0.30000000000000004", "method=sgd", "seed=0"],
    }
    assert told_apart(runs) == {1: "bfp lr=0.1 momentum=0.9", 2: "sgd lr=0.3"}
    assert told_apart({1: ["lr=0.1"]}) == {1: ""}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bar_count_and_clock_are_never_cut(tmp_path: Path, width: int) -> None:
    first, *_ = jobs(tmp_path)
    view = View([first])  # nothing varies, so that its long name is shown
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    view.progress.live.console = view.console = console
    view.progress.disable = False
    view.started(first)
    view.progress.update(view.bars[first], completed=5)
    console.print(view.progress.get_renderable())
    (line,) = (line for line in console.file.getvalue().splitlines() if "a_name" in line)  # type: ignore[attr-defined]
    assert len(line) <= width
    assert "…" in line
    assert "5/10 epochs" in line
    assert "━" * 5 in line
    assert "0:00:0" in line


def test_a_line_of_a_run_says_what_varies(tmp_path: Path) -> None:
    these = jobs(tmp_path)
    view = View(these)
    view.console = Console(file=io.StringIO(), width=80)
    view.ended(these[1], Outcome(result={"status": "finished", "final": {"accuracy/validation": 0.975}}, seconds=2.0))
    text = view.console.file.getvalue()  # type: ignore[attr-defined]
    assert text == "[1/4] bfp lr=0.05: finished, validation accuracy 97.50% (2.0 s)\n"
