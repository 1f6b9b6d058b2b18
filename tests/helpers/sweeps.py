"""Start sweeps as processes, watch them, and compare their results bitwise."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.helpers.commands import REPOSITORY, TRAIN, as_by_hand, environment

from backforward_suite.config import deciding
from backforward_suite.runs import files

DIGITS = ("data=digits", "model.hidden=8", "batch_size=64", "trainer.accelerator=cpu")
WITH_TESTS = f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}"  # PYTHONPATH of runs that use tests/helpers/misbehaving.py


def start(cwd: Path, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    """Start `python src/train.py <arguments>` with a pipe for its output and changes to the environment."""
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *arguments],
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=as_by_hand,  # noqa: PLW1509  (the tests that call this have one thread)
    )


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def left_by(folder: Path) -> dict[str, Any]:
    """What a finished run leaves that does not depend on when, where and with how many interruptions it was trained."""
    result = files.read_result(folder)
    assert result is not None
    del result["timing"], result["code"]
    result["settings"] = deciding(result["settings"])
    weights = {name: torch.load(folder / name, weights_only=True)["state_dict"] for name in ("last.ckpt", "best.ckpt")}
    return {"result": result, "metrics": (folder / "metrics.csv").read_bytes(), **weights}


def assert_same(ours: Path, theirs: Path) -> None:
    """Check that two folders have the same runs: weights, running sums, metrics.csv and result.json bitwise."""
    one, other = (sorted(path.parent for path in root.rglob("result.json")) for root in (ours, theirs))
    assert [folder.name for folder in one] == [folder.name for folder in other]
    for pair in zip(one, other, strict=True):
        here, there = map(left_by, pair)
        for name in ("last.ckpt", "best.ckpt"):
            state, expected = here.pop(name), there.pop(name)
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key]) for key in state), pair[0] / name
        assert here == there, pair[0]
