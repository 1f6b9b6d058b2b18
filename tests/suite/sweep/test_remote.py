"""A run under a scheduler's worker."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.commands import as_by_hand, environment
from tests.helpers.sweeps import until

# Takes its time to end, as a run does that writes a large checkpoint.
ENDS_SLOWLY = """
import signal, sys, time
from pathlib import Path
def end(*_):
    Path("told").touch()
    while not Path("may_end").exists():
        time.sleep(0.01)
    print("wrote a checkpoint", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
Path("runs").touch()
while True:
    time.sleep(0.01)
"""
WORKER = """
from backforward_suite.sweep.remote import run
try:
    run("ends_slowly.py", [], "logs/run.log", ".")
except KeyboardInterrupt:
    with open("logs/run.log", "a") as log:
        print("worker interrupted", file=log)
"""


def test_a_worker_that_is_interrupted_twice_waits_for_its_run(tmp_path: Path) -> None:
    (tmp_path / "ends_slowly.py").write_text(ENDS_SLOWLY)
    worker = subprocess.Popen([sys.executable, "-c", WORKER], cwd=tmp_path, env=environment(), preexec_fn=as_by_hand)  # noqa: PLW1509
    until((tmp_path / "runs").exists)
    worker.send_signal(signal.SIGINT)
    until((tmp_path / "told").exists)
    worker.send_signal(signal.SIGINT)  # as Ray does while the task has not ended
    time.sleep(0.3)  # enough to end a worker that does not wait
    (tmp_path / "may_end").touch()
    assert worker.wait(60) == 0
    assert (tmp_path / "logs" / "run.log").read_text().endswith("wrote a checkpoint\nworker interrupted\n")
