"""Runs made before the library and the suite were split: a finished one is skipped, a half-done one resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.helpers.commands import REPOSITORY, TRAIN, environment

OLD = "6858223"
RUN = ("data=digits", "method=bfp", "batch_size=32", "trainer.progress_bar=false")
FINISHED, LONG = ("max_epochs=2",), ("max_epochs=60",)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of that version."""
    git = shutil.which("git")
    known = git and (REPOSITORY / ".git").exists()
    if (
        not known
        or subprocess.run(
            [git, "cat-file", "-e", f"{OLD}^{{commit}}"], check=False, cwd=REPOSITORY, capture_output=True
        ).returncode
    ):
        pytest.skip(f"commit {OLD} is not in this clone")
    folder = tmp_path_factory.mktemp("old") / "checkout"
    subprocess.run([git, "clone", "-q", "--no-checkout", str(REPOSITORY), str(folder)], check=True)
    subprocess.run([git, "checkout", "-q", OLD], check=True, cwd=folder)
    return folder


def started(script: Path, source: Path, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), *RUN, *overrides],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(source)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


@pytest.mark.slow
def test_runs_of_an_older_checkout_are_reused_and_resumed(old: Path, tmp_path: Path) -> None:
    before = ended(started(old / "src" / "train.py", old / "src", tmp_path, *FINISHED))
    assert "finished" in before
    (done,) = tmp_path.glob("outputs/train/*max_epochs2*/result.json")
    content = done.read_bytes()

    half_done = started(old / "src" / "train.py", old / "src", tmp_path, *LONG)
    until = time.monotonic() + 240
    while time.monotonic() < until and half_done.poll() is None:
        rows = list(tmp_path.glob("outputs/train/*max_epochs60*/metrics.csv"))
        if rows and len(rows[0].read_text().splitlines()) > 4:
            break
        time.sleep(0.05)
    os.kill(half_done.pid, signal.SIGKILL)
    half_done.communicate()
    (folder,) = tmp_path.glob("outputs/train/*max_epochs60*")
    assert not (folder / "result.json").exists(), "it was done before it could be killed"

    again = ended(started(TRAIN, REPOSITORY / "src", tmp_path, *FINISHED))
    assert "skipped" in again or "finished" in again
    assert done.read_bytes() == content  # nothing was trained
    on = ended(started(TRAIN, REPOSITORY / "src", tmp_path, *LONG))
    assert "goes on from step" in on

    whole = tmp_path / "whole"
    whole.mkdir()
    ended(started(TRAIN, REPOSITORY / "src", whole, *LONG))
    (straight,) = whole.glob("outputs/train/*max_epochs60*/result.json")
    final = [json.loads(path.read_text())["final"] for path in (folder / "result.json", straight)]
    assert final[0] == final[1]  # bitwise equal to an undisturbed run
