"""The processes of one run: which of them this is, and how they end together.

A run on n devices is n processes. The first (rank 0) writes the run's folder. The others are started by Lightning out
of the first, or by `srun` or `torchrun` beside it.
"""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT = "BACKFORWARD_PARENT"  # in the environment of a process: whom it works for (`_remote.py` sets it as well)
POLL = 0.5  # seconds between two looks at the parent


def made_by_slurm(devices: int) -> bool:
    """Whether `srun` has started one process for each device of this run."""
    return devices > 1 and os.environ.get("SLURM_STEP_NUM_TASKS") == str(devices)


def rank(devices: int) -> int:
    """This process's number among those of its run, from 0; known before Lightning is loaded."""
    if devices == 1:
        return 0  # whatever a scheduler says of other processes
    return int(os.environ.get("SLURM_PROCID" if made_by_slurm(devices) else "LOCAL_RANK", "0"))


def take_others_along() -> None:
    """Have the processes that this one starts for its run end with it, however it ends."""
    os.environ[PARENT] = str(os.getpid())


def end_with_parent() -> None:
    """Kill this process once the one that it works for is gone: a rank without its first waits for ever.

    That is whoever is named in `BACKFORWARD_PARENT`, by its id, since it may be gone by now; under `torchrun`, which
    names nobody, whoever started this process.
    """
    named = os.environ.pop(PARENT, None)
    if named is None and "LOCAL_RANK" not in os.environ:
        return
    parent = os.getppid() if named is None else int(named)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
