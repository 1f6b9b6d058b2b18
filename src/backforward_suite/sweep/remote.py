"""A run on another machine, as a child of a scheduler's worker. Standard library only: Ray ships this file."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

POLL = 0.2


class RemoteRun:
    """Runs `python <script> <arguments>` with its output in a file, and returns the exit code.

    The scheduler has set the worker's devices (CUDA_VISIBLE_DEVICES) and cores. The run ends with the worker; if the
    worker is asked to end, the run writes a checkpoint first.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, script: str, arguments: Sequence[str], log: str, cwd: str) -> int:
        """Run.

        Args:
            script: The script.
            arguments: Its command line.
            log: The file to append its output to.
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
        except BaseException:  # the scheduler cancels the job
            self.stop()
            raise
        return code

    def stop(self) -> None:
        """Let the run write a checkpoint and end."""
        if self.process is not None:
            self.process.terminate()
            while True:
                try:
                    # Without reaping it: a signal handler may call this during `poll`, and twice.
                    os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
                except ChildProcessError:
                    pass
                except KeyboardInterrupt:  # Ray repeats it every two seconds
                    continue
                break

    def checkpoint(self, *arguments: Any) -> Any:
        """End the run near Slurm's time limit; submitit submits the return value again."""
        import submitit

        self.stop()
        return submitit.helpers.DelayedSubmission(RemoteRun(), *arguments)


def run(script: str, arguments: Sequence[str], log: str, cwd: str) -> int:
    """Run as a Ray task."""
    return RemoteRun()(script, arguments, log, cwd)


def _ignore_warning() -> None:
    # Slurm sends SIGUSR2 to every process of the job; only submitit's shall answer.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
