"""The processes of one run: which of them this is, and how they end together.

A run on n devices is n processes. The first (rank 0) writes the run's folder. The others are started by Lightning out
of the first, or by `srun` or `torchrun` beside it.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from backforward_suite.errors import BadInput

PARENT = "BACKFORWARD_PARENT"  # in the environment of a process: whom it works for (`_remote.py` sets it as well)
POLL = 0.5  # seconds between two looks at the parent


def made_by_slurm(devices: int) -> bool:
    """Whether `srun` has started one process for each device of this run."""
    return devices > 1 and os.environ.get("SLURM_STEP_NUM_TASKS") == str(devices)


def settle_rank(devices: int) -> None:
    """Forget what the environment says of ranks unless it speaks of this run, before Lightning reads it.

    A shell within `srun -n 4` or another program's launcher leaves such variables behind.

    Raises:
        BadInput: A launcher (`torchrun`) has started another number of processes than the run has devices.
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


# What Lightning takes a rank, or the number of ranks, from.
_OF_RANKS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
    *("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE"),
    "TORCHELASTIC_RUN_ID",
)


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
    if named is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid() if named is None else int(named)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
