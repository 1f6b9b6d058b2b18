"""A run on another machine: a process under a scheduler's worker. Standard library alone: Ray sends this text along."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

POLL = 0.2


class RemoteRun:
    """Runs `python <script> <arguments>`, its output in a file, and returns the exit code.

    Called by a worker that the scheduler has given its devices (CUDA_VISIBLE_DEVICES) and cores. The run ends with
    the worker; a worker that is asked to end has the run write a checkpoint first.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, script: str, arguments: Sequence[str], log: str, cwd: str) -> int:
        """Run.

        Args:
            script: What to run.
            arguments: Its command line.
            log: Where its output goes, appended.
            cwd: The folder to run in.
        """
        os.makedirs(os.path.dirname(log), exist_ok=True)  # noqa: PTH103, PTH120
        threads = os.environ.get("OMP_NUM_THREADS") or os.environ.get("SLURM_CPUS_PER_TASK") or "1"
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "BACKFORWARD_PARENT": str(os.getpid())}
        with open(log, "ab", buffering=0) as file:  # noqa: PTH123
            file.write(f"$ {shlex.join(['python', script, *arguments])}\n".encode())
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, script, *arguments],
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=_ignore_warning,  # noqa: PLW1509
            )
        try:
            while (code := self.process.poll()) is None:
                time.sleep(POLL)
        except BaseException:  # the scheduler takes the job back
            self.stop()
            raise
        return code

    def stop(self) -> None:
        """Have the run write a checkpoint and end."""
        if self.process is not None:
            self.process.terminate()
            # Without reaping it: this may be called by a signal handler in the midst of `poll`, and twice.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def checkpoint(self, *arguments: Any) -> Any:
        """Slurm's time limit is near: submitit submits again what this returns."""
        import submitit

        self.stop()
        return submitit.helpers.DelayedSubmission(RemoteRun(), *arguments)


def run(script: str, arguments: Sequence[str], log: str, cwd: str) -> int:
    """Run, as a task of Ray."""
    return RemoteRun()(script, arguments, log, cwd)


def _ignore_warning() -> None:
    # Slurm sends it to every process of the job; only submitit's is to answer.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
