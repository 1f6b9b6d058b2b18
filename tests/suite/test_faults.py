"""A short part of `make faults`: some instants of real commands, and some damaged files."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.commands import REPOSITORY, environment
from tests.helpers.faults.instants import kind_of


def test_faults() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.helpers.faults", "--stride", "75"],
        cwd=REPOSITORY, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "silently wrong or stuck: 0; tracebacks: 0" in ended.stdout


def test_operations_are_told_apart_by_what_they_do() -> None:
    assert kind_of("write .last.ckpt.abcd_123.tmp") == kind_of("write .last.ckpt.zzzzzzzz.tmp")
    assert kind_of("open events.out.tfevents.1.host.2.0") == kind_of("open events.out.tfevents.9.host.7.1")
    assert kind_of("write .last.ckpt.abcd_123.tmp") != kind_of("fsync .last.ckpt.abcd_123.tmp")
