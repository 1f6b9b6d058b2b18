"""The state of a sweep, from what lies in its folders."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from backforward_suite.errors import BadInput
from backforward_suite.report.status import state_of, sweep_states, sweep_status
from backforward_suite.runs import files, lifecycle, locks


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    names = ("done", "blown", "failed", "halfway", "nothing-yet", "vanished")
    lifecycle.add_to_plan(tmp_path, {name: [f"seed={n}"] for n, name in enumerate(names)})
    for name in (*names[:4], "vanished", "by-hand"):
        (tmp_path / name).mkdir()
    accuracy = {"accuracy/validation": 0.975}
    files.write_result(tmp_path / "done", {"status": "finished", "final": accuracy})
    files.write_metrics(tmp_path / "done", [{"epoch": n} for n in range(4)])
    files.write_result(tmp_path / "blown", {"status": "diverged", "final": {"accuracy/validation": None}})
    files.write_result(tmp_path / "failed", {"status": "failed", "cause": "[red] out of memory"})
    (tmp_path / "failed" / "run.log").write_text("".join(f"line {n}\n\n" for n in range(9)))
    (tmp_path / "halfway" / "last.ckpt").write_bytes(b"")
    (tmp_path / "vanished" / locks.LOCK).touch()
    (tmp_path / "by-hand" / "run.log").touch()  # planned by no sweep
    return tmp_path


def test_every_state(sweep: Path) -> None:
    with FileLock(sweep / "by-hand" / locks.LOCK):
        states = {state.name: state for state in sweep_states(sweep)}
    assert {name: state.state for name, state in states.items()} == {
        "done": "finished",
        "blown": "diverged",
        "failed": "failed",
        "halfway": "stopped",
        "nothing-yet": "missing",
        "vanished": "failed",
        "by-hand": "running",
    }
    assert states["done"].epoch == 3
    assert states["done"].note == "validation accuracy 97.50%"
    assert states["failed"].lines == ("line 4", "line 5", "line 6", "line 7", "line 8")
    assert state_of(sweep / "by-hand").note == "ended before its first checkpoint"  # its lock goes with its process


def test_what_is_shown(sweep: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(sweep_status(sweep))
    shown = console.file.getvalue()
    assert "[red] out of memory" in shown  # what a log says is no markup
    assert "    line 8\n" in shown
    assert "7 runs: 1 finished, 1 diverged, 1 stopped, 2 failed, 2 missing" in shown


def test_a_damaged_result_is_a_failure_and_no_folder_an_error(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "result.json").write_text("{")
    assert "damaged" in state_of(tmp_path / "one").note
    with pytest.raises(BadInput, match="no sweep here"):
        sweep_states(tmp_path / "nowhere")
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(BadInput, match=r"sweep\.json is damaged"):
        sweep_states(tmp_path)


def test_a_plan_grows_and_stays(tmp_path: Path) -> None:
    lifecycle.add_to_plan(tmp_path, {"a": ["seed=0"]})
    before = (tmp_path / "sweep.json").stat().st_mtime_ns
    lifecycle.add_to_plan(tmp_path, {"a": ["seed=0"]})
    assert (tmp_path / "sweep.json").stat().st_mtime_ns == before
    lifecycle.add_to_plan(tmp_path, {"b": ["seed=1"]})
    assert files.read_plan(tmp_path) == {"a": ["seed=0"], "b": ["seed=1"]}


def test_failures_of_the_same_cause_are_one_line(tmp_path: Path) -> None:
    for n in range(5):
        (tmp_path / f"seed{n}").mkdir()
        cause = "out of memory" if n < 4 else "killed by SIGKILL"
        files.write_result(tmp_path / f"seed{n}", {"status": "failed", "cause": cause})
        (tmp_path / f"seed{n}" / "run.log").write_text(f"log of {n}\n")

    def text(everything: bool) -> str:
        console = Console(file=io.StringIO(), width=80)
        console.print(sweep_status(tmp_path, everything))
        return console.file.getvalue()  # type: ignore[attr-defined]

    folded, whole = text(False), text(True)
    assert "seed0 and 3 more" in folded
    assert folded.count("out of memory") == 1
    assert ("log of 0" in folded, "log of 1" in folded, "log of 4" in folded) == (True, False, True)
    assert whole.count("out of memory") == 4
    assert all(f"log of {n}" in whole for n in range(5))
    assert "5 runs: 5 failed" in folded
