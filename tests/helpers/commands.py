"""Call the command line from tests."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "src" / "train.py"
CONF = REPOSITORY / "conf"

PR_SET_PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent ends


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with the library on the path, one thread, and no data set unless a test names it."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("HYDRA_", "BACKFORWARD_", "COLUMNS"))
    }
    path = os.pathsep.join(filter(None, [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH")]))
    return clean | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "160", **changes}


def as_by_hand() -> None:
    """In a new child: react to Ctrl-C even if the tests were started to ignore it; end when the tests end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def on_sigint(handler: Any) -> Iterator[None]:
    """Handle SIGINT this way for a while; by default it is ignored if the tests run in the background."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after some code."""
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        check=True,
        env=environment(),
        capture_output=True,
        text=True,
    )
    return set(ended.stdout.split())


def assert_one_line(ended: Ended, *parts: str, code: int = 2) -> None:
    """Check that a command printed one line of error with these parts, and nothing else."""
    lines = [line for line in ended.err.splitlines() if line.strip()]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    assert "Traceback" not in ended.out + ended.err
    assert ended.code == code
