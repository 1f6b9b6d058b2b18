"""The referee's command: runs what is missing, goes on after an interruption, tells what cannot be run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.helpers.commands import REPOSITORY, as_by_hand, environment

from backforward_suite.commands.reproduce import _left

SCRIPT = str(REPOSITORY / "src" / "reproduce.py")
ONE = ("--scale", "smoke", "--only", "bfp_max_lr")


def reproduce(cwd: Path, *arguments: str, data: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        check=False,
        cwd=cwd,
        env=environment() | {"BACKFORWARD_DATA": str(data or cwd / "nothing")},
        capture_output=True,
        text=True,
    )


def results(root: Path) -> dict[str, int]:
    """By run, when its result was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in root.rglob("result.json")}


def test_an_interrupted_reproduce_goes_on_and_keeps_what_it_had(tmp_path: Path) -> None:
    """On digits, whose every figure and verdict says so."""
    folder = tmp_path / "outputs" / "stand_in" / "smoke" / "bfp_max_lr"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *ONE, "--stand-in"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=as_by_hand,  # noqa: PLW1509  (the tests that call this have one thread)
    )
    deadline = time.monotonic() + 120
    while not results(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # to this process alone: the sweep is told by its parent's end at the latest
    process.communicate()
    assert process.returncode == 130
    before = results(folder)
    assert before

    again = reproduce(tmp_path, *ONE, "--stand-in")
    assert again.returncode == 0, again.stderr
    after = results(folder)
    assert len(after) == 16
    assert before.items() <= after.items()
    page = (tmp_path / "outputs/stand_in/report/index.html").read_text()
    assert "stand-in data" in page
    assert (tmp_path / "outputs/stand_in/report/report.md").exists()


def test_without_data_nothing_is_trained_and_the_report_says_what_to_do(tmp_path: Path, monkeypatch: object) -> None:
    """A folder with a damaged set stands for a machine that cannot download: nothing else is tried then."""
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "mnist.npz").write_bytes(b"no data")
    ended = reproduce(tmp_path, *ONE)
    assert ended.returncode == 0, ended.stderr
    assert "not run: no mnist" in ended.stdout
    assert "--stand-in" in ended.stdout
    assert not results(tmp_path)
    assert "not run" in (tmp_path / "outputs/report/report.md").read_text()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("--only", "nonsense"), "error: nonsense: no such experiment; there are bfp_one_step, "),
        (("--scale", "smoke", "--go-on-from", "nowhere"), "no committed results here"),
    ],
)
def test_bad_input_costs_a_line(tmp_path: Path, given: tuple[str, ...], line: str) -> None:
    ended = reproduce(tmp_path, *given)
    assert ended.returncode == 2
    assert line in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_the_estimate_counts_the_runs_that_have_no_committed_time() -> None:
    kept = {"a": 10.0, "b": 20.0, "c": 60.0}
    assert _left(kept, {"b"}, untimed=0) == 70
    assert _left(kept, {"b"}, untimed=2) == 70 + 2 * 30
    assert _left(kept, set(kept), untimed=0) == 0
