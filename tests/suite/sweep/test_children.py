"""Processes that tests start end with the tests and react to Ctrl-C, however the tests were started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.commands import REPOSITORY, as_by_hand, environment, on_sigint
from tests.helpers.sweeps import alive, until

STARTS_A_SWEEP = """\
import json
from pathlib import Path
from tests.helpers.sweeps import DIGITS, start, tree, until

def test_it(tmp_path):
    sweep = start(tmp_path, "-m", "seed=0,1", *DIGITS, "max_epochs=100000")
    until(lambda: list(tmp_path.rglob("last.ckpt")))
    Path("family.tmp").write_text(json.dumps(tree(sweep.pid)))
    Path("family.tmp").rename("family.json")
    sweep.communicate()
"""


def test_a_test_run_that_is_terminated_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(STARTS_A_SWEEP)
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(PYTHONPATH=path), stdout=subprocess.DEVNULL) as tests:
        until(lambda: (tmp_path / "family.json").exists() or tests.poll() is not None)
        tests.terminate()
    family = [int(pid) for pid in (tmp_path / "family.json").read_text().strip("[]").split(",")]
    assert len(family) >= 3  # the sweep, the fork server, a run
    until(lambda: not any(map(alive, family)), seconds=30)


def test_a_child_reacts_to_ctrl_c_although_its_parent_ignores_it() -> None:
    shows = [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)"]
    with on_sigint(signal.SIG_IGN):
        inherits, by_hand = (
            subprocess.run(shows, check=True, capture_output=True, text=True, preexec_fn=change).stdout.strip()
            for change in (None, as_by_hand)
        )
    assert (inherits, by_hand) == ("False", "True")
