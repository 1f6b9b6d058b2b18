"""Runs jobs in processes of this machine, a few at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from backforward import cli, runs
from backforward.errors import BadInput
from backforward.hardware import cpu_count, gpu_names
from hydra_plugins.backforward_pool._jobs import Job, Outcome, Sweep, conclude
from hydra_plugins.backforward_pool._worker import work, work_together

GRACE = 30.0  # seconds to write a checkpoint, between asking a process to end and ending it
POLL = 0.5  # seconds between two looks at the clock and at the runs' progress


@dataclass(frozen=True)
class Load:
    """What one process does.

    Attributes:
        jobs: A run; or those of a stack, one perhaps, where the others are done.
        checkpoint: Of a stack: where it goes on if it was cut off.
        again: Whether the stack's process was killed once before in this sweep.
    """

    jobs: tuple[Job, ...]
    checkpoint: Path | None = None
    again: bool = False


@dataclass
class _Running:
    load: Load
    process: BaseProcess
    slots: list[str]
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Pool:
    """As many runs at a time as there are slots: GPUs where runs use them, else cores.

    A run takes as many slots as it has devices. It sees its own GPUs alone, and its share of the cores. A run that
    another sweep is training waits at the end of the queue: it is skipped when done there, and taken up when that
    sweep has been killed.

    Args:
        slots: Runs at a time; None: one a GPU, else one a core.
    """

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots

    def count(self, jobs: Sequence[Job]) -> tuple[int, list[str]]:
        """How many slots there are for jobs, and the GPUs that they share."""
        uses_gpus = any(job.cfg.trainer.accelerator != "cpu" for job in jobs)
        gpus = gpu_names() if uses_gpus else []
        return self.slots or len(gpus) or cpu_count(), gpus

    def get_ready(self, job: Job) -> None:
        """Start the process that runs are forked from, and return while it imports what they need."""
        count, _ = self.count([job])
        with _forkserver(_threads(count)):
            forkserver.ensure_running()

    def run(self, sweep: Sweep, loads: Sequence[Load]) -> None:
        """Do jobs; what a stack leaves undone is done one by one. One that was killed is first tried once more.

        Raises:
            KeyboardInterrupt, Stopped: After the running ones have been ended, each with a checkpoint.
        """
        count, gpus = self.count([job for load in loads for job in load.jobs])
        free = [gpus[n % len(gpus)] if gpus else "" for n in range(count)]
        threads = _threads(count)
        queue: deque[Load] = deque()
        for load in loads:
            devices = load.jobs[0].cfg.trainer.devices  # a stack is of one device each
            if devices > count:
                sweep.ended(load.jobs[0], Outcome(cause=f"trainer.devices={devices}: there are {count} slots"))
            else:
                queue.append(load)
        running: list[_Running] = []
        with _forkserver(threads) as context:
            try:
                while queue or running:
                    for load in _startable(queue, sweep, free):
                        slots = _taken(free, load.jobs[0].cfg.trainer.devices)
                        running.append(_start(context, load, slots, threads))
                        for job in load.jobs:
                            sweep.started(job)
                    if running:
                        wait([entry.process.sentinel for entry in running], timeout=POLL)
                    elif queue:
                        time.sleep(POLL)  # all that is left is being done elsewhere
                    for entry in running:
                        _end_if_overdue(entry)
                    for entry in [entry for entry in running if entry.process.exitcode is not None]:
                        running.remove(entry)
                        free += entry.slots
                        _signal(entry, signal.SIGKILL)  # what it may have left of its process group
                        queue.extend(_left_by(entry, sweep))
                    sweep.view.tick([job for entry in running for job in entry.load.jobs])
            except BaseException:
                _end(running)
                raise


def _threads(count: int) -> str:
    """Of each of so many runs at a time."""
    return str(max(1, cpu_count() // count))


def _startable(queue: deque[Load], sweep: Sweep, free: list[str]) -> Iterator[Load]:
    """Loads from the front of the queue for which there are slots, without the jobs that others are doing."""
    for _ in range(len(queue)):
        if queue[0].jobs[0].cfg.trainer.devices > len(free):
            return
        load = queue.popleft()
        taken = [job for job in load.jobs if runs.is_taken(job.folder)]
        if load.checkpoint is not None and len(taken) == len(load.jobs):  # a stack of another sweep
            queue.append(load)
            continue
        queue.extend(Load((job,)) for job in taken)
        if own := tuple(job for job in load.jobs if job not in taken and not sweep.settled(job)):
            yield replace(load, jobs=own)


def _left_by(entry: _Running, sweep: Sweep) -> list[Load]:
    """Tell what became of the jobs of a process that has ended; return those that are to be begun again."""
    code, load, again = entry.process.exitcode, entry.load, []
    assert code is not None
    stacked = load.checkpoint is not None
    for job in load.jobs:
        done = stacked and _is_done(job)  # of a stack that failed, some runs may have ended before
        busy = code == cli.BUSY  # someone was quicker
        left = stacked and not done and code not in (cli.STOPPED, -signal.SIGTERM)
        if busy or left:
            again.append(job)
        else:
            sweep.ended(job, conclude(job, 0 if done else code, entry.seconds))
    if again and stacked and code < 0 and not load.again:  # the fault may lie elsewhere: another's hunger for memory
        cause = signal.Signals(-code).name
        count = f"{len(load.jobs)} run{'s' if len(load.jobs) > 1 else ''}"
        sweep.view.note(f"a stack of {count} was killed by {cause}; it goes on from its last checkpoint")
        return [replace(load, jobs=tuple(again), again=True)]
    if again and load.checkpoint is not None:  # alone they begin anew
        load.checkpoint.unlink(missing_ok=True)
    return [Load((job,)) for job in again]


def _is_done(job: Job) -> bool:
    with suppress(BadInput):
        result = runs.read_result(job.folder)
        return result is not None and result["status"] in runs.DONE
    return False


def _taken(free: list[str], count: int) -> list[str]:
    """Take slots, of different GPUs as far as there are any."""
    slots: list[str] = []
    for _ in range(count):
        slot = next((slot for slot in free if slot not in slots), free[0])
        free.remove(slot)
        slots.append(slot)
    return slots


def _start(context: multiprocessing.context.BaseContext, load: Load, slots: list[str], threads: str) -> _Running:
    for job in load.jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        runs.forget_failure(job.folder)
    environment = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ",".join(slot for slot in slots if slot)}
    first = load.jobs[0]
    target: Callable[..., None] = work
    arguments: tuple[Any, ...] = (first.script, first.arguments, first.log, environment)
    if load.checkpoint is not None:
        target = work_together
        arguments = (
            [(job.composed, job.cfg, job.folder) for job in load.jobs],
            load.checkpoint,
            first.log,
            environment,
        )
    process = context.Process(target=target, args=arguments, name=first.name)  # type: ignore[attr-defined]
    process.start()
    return _Running(load, process, slots)


def _signal(entry: _Running, number: signal.Signals) -> None:
    """Send a signal to a run's processes."""
    assert entry.process.pid is not None
    with suppress(ProcessLookupError):  # not yet the head of a group, or nothing left of it
        os.killpg(entry.process.pid, number)


def _end_if_overdue(entry: _Running) -> None:
    """A run has watchdogs of its own; this one also ends what is stopped, or stuck before it began."""
    minutes = entry.load.jobs[0].cfg.timeout_min  # a stack has none
    if minutes is not None and entry.seconds > 60 * minutes + 2 * runs.LATE:
        _signal(entry, signal.SIGKILL)


def _end(running: Sequence[_Running]) -> None:
    """Ask each run to end; end it if it does not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for entry in running:
            if entry.process.exitcode is None:
                _signal(entry, number)
        deadline = time.monotonic() + GRACE
        for entry in running:
            entry.process.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def _forkserver(threads: str) -> Iterator[multiprocessing.context.BaseContext]:
    """A server process that has imported torch and Lightning, and forks a child for each run.

    OMP_NUM_THREADS is read when torch is loaded, so it must stand in the server's environment. A process has one such
    server: where it was started for another number of threads, each run sets its own (see `_worker`).
    """
    source = str(Path(runs.__file__).resolve().parent.parent)
    changes = {
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
    }
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hydra_plugins.backforward_pool._preload"])
        yield context
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
