"""The process of one run in the pool."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path


def work(script: Path, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Run a script as `python script arguments` would, with its output in a file.

    Args:
        script: The script.
        arguments: Its command line.
        log: The file to append its standard output and error to.
        environment: Variables to set, before CUDA is touched.
    """
    _begin(log, environment)
    sys.argv = [str(script), *arguments]
    print("$", shlex.join(["python", *sys.argv]), flush=True)
    runpy.run_path(str(script), run_name="__main__")


def _begin(log: Path, environment: Mapping[str, str]) -> None:
    os.setsid()  # Ctrl-C in the terminal reaches only the parent, which ends its children
    with log.open("ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    loaded_for, threads = os.environ.get("OMP_NUM_THREADS"), environment["OMP_NUM_THREADS"]
    os.environ.update(environment)
    if loaded_for != threads and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Kill this run once its sweep is gone, so that the next sweep does not meet it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(os.getpgrp(), signal.SIGKILL)
