"""A part of `make faults`: some instants of real commands, and some damaged files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.commands import REPOSITORY, environment
from tests.helpers.faults.instants import kind_of
from tests.helpers.sweeps import WITH_TESTS


def test_faults() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.helpers.faults", "--stride", "75"],
        cwd=REPOSITORY, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "silently wrong or stuck: 0; tracebacks: 0" in ended.stdout


# In a process of its own, which nothing but this forks.
TURNS_READ_ONLY = """
import backforward_suite.sweep.preload
from pathlib import Path
from tests.helpers.faults.instants import RUN, runs_below
from tests.helpers.faults.trials import difference, trained
three = ("-m", "seed=0,1,2", "hydra.launcher.slots=1", *RUN)
whole, cut = Path("whole").absolute(), Path("cut").absolute()
whole.mkdir(), cut.mkdir()
operations = trained(whole, *three).operations
at = next(n for n, name in enumerate(operations, start=1) if name.startswith("mkdir") and "seed1" in name)
ended = trained(cut, *three, inject=("readonly", at))
again = trained(cut, *three)
print(ended.code, ended.out, "AGAIN", again.out, "DIFFERENCE", difference(runs_below, cut, runs_below(whole)))
"""


def test_a_disk_that_turns_read_only_in_the_middle_of_a_sweep(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", TURNS_READ_ONLY],
        cwd=tmp_path, env=environment(PYTHONPATH=WITH_TESTS), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    cut, _, rest = ended.stdout.partition("AGAIN")
    again, _, difference = rest.partition("DIFFERENCE")
    assert cut.startswith("1 ")  # the exit code
    assert "3 runs: 1 finished, 2 failed" in cut
    summary = cut.partition("3 runs:")[2].splitlines()[1:3]
    for line, seed in zip(summary, "12", strict=True):
        assert line.startswith("failed ")
        assert f"seed{seed}: cannot be written (Read-only file system)" in line
    assert "Traceback" not in cut
    assert "3 runs: 2 finished, 1 done before, skipped" in again
    assert difference.strip() == ""


def test_kinds_of_operations() -> None:
    assert kind_of("write .last.ckpt.abcd_123.tmp") == kind_of("write .last.ckpt.zzzzzzzz.tmp")
    assert kind_of("open events.out.tfevents.1.host.2.0") == kind_of("open events.out.tfevents.9.host.7.1")
    assert kind_of("write .last.ckpt.abcd_123.tmp") != kind_of("fsync .last.ckpt.abcd_123.tmp")
