"""The processes of one run: their ranks, and how they end together.

A run on n devices has n processes. The first (rank 0) writes the run's folder. The others are started by Lightning in
the first, or by `srun` or `torchrun`.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from backforward_suite.errors import BadInput

PARENT = "BACKFORWARD_PARENT"  # environment variable: the process to end with (`sweep/remote.py` sets it as well)
POLL = 0.5  # seconds between checks of the parent


def made_by_slurm(devices: int) -> bool:
    """Whether `srun` has started one process for each device of this run."""
    return devices > 1 and os.environ.get("SLURM_STEP_NUM_TASKS") == str(devices)


def settle_rank(devices: int) -> None:
    """Remove variables about ranks from the environment unless they describe this run, before Lightning reads them.

    A shell inside `srun -n 4`, or another program's launcher, leaves such variables behind.

    Raises:
        BadInput: `torchrun` has started another number of processes than the run has devices.
    """
    if made_by_slurm(devices):
        return
    given = os.environ.get("WORLD_SIZE")
    ours = devices > 1 and "LOCAL_RANK" in os.environ and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if ours and given == str(devices) and os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", "0")) == "0":
        return
    if ours and "TORCHELASTIC_RUN_ID" in os.environ:
        raise BadInput(f"trainer.devices={devices}: torchrun has started {given}; give --nproc_per_node={devices}")
    for key in _OF_RANKS:
        os.environ.pop(key, None)


# The variables from which Lightning takes a rank or the number of ranks.
_OF_RANKS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
    *("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE"),
    "TORCHELASTIC_RUN_ID",
)


def rank(devices: int) -> int:
    """This process's rank within its run, from 0; known before Lightning is loaded."""
    if devices == 1:
        return 0
    return int(os.environ.get("SLURM_PROCID" if made_by_slurm(devices) else "LOCAL_RANK", "0"))


def take_others_along() -> None:
    """Let the processes that this one starts end with it, however it ends."""
    os.environ[PARENT] = str(os.getpid())


def end_with_parent() -> None:
    """Kill this process once its parent is gone: a rank whose first process is gone waits forever.

    The parent is the process whose id `BACKFORWARD_PARENT` holds, as it may be gone already; under `torchrun`, the
    actual parent.
    """
    named = os.environ.pop(PARENT, None)
    if named is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid() if named is None else int(named)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
