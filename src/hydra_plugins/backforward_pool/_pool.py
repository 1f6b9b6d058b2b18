"""Runs jobs in processes of this machine, a few at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from backforward import cli, runs
from backforward.hardware import cpu_count, gpu_names
from hydra_plugins.backforward_pool._jobs import Job, Outcome, Sweep, outcome_of
from hydra_plugins.backforward_pool._worker import work

GRACE = 30.0  # seconds to write a checkpoint, between asking a process to end and ending it
LATE = 5.0  # seconds after timeout_min until a run whose own watchdog does not end it is ended from here
POLL = 0.5  # seconds between two looks at the clock and at the runs' progress


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    slots: list[str]
    started: float = field(default_factory=time.monotonic)
    overdue: bool = False

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

    def run(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        """Do jobs.

        Raises:
            KeyboardInterrupt, Stopped: After the running ones have been ended, each with a checkpoint.
        """
        uses_gpus = any(job.cfg.trainer.accelerator != "cpu" for job in jobs)
        gpus = gpu_names() if uses_gpus else []
        count = self.slots or len(gpus) or cpu_count()
        free = [gpus[n % len(gpus)] if gpus else "" for n in range(count)]
        threads = str(max(1, cpu_count() // count))
        queue: deque[Job] = deque()
        for job in jobs:
            devices = job.cfg.trainer.devices
            if devices > count:
                sweep.ended(job, Outcome(cause=f"trainer.devices={devices}: there are {count} slots"))
            else:
                queue.append(job)
        running: list[_Running] = []
        with _forkserver(threads) as context:
            try:
                while queue or running:
                    for job in _startable(queue, sweep, free):
                        slots = _taken(free, job.cfg.trainer.devices)
                        running.append(_start(context, job, slots, threads))
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
                        code = entry.process.exitcode
                        assert code is not None
                        _signal(entry, signal.SIGKILL)  # what it may have left of its process group
                        if code == cli.BUSY:  # someone was quicker
                            queue.append(entry.job)
                        else:
                            sweep.ended(entry.job, outcome_of(entry.job, code, entry.seconds, entry.overdue))
                    sweep.view.tick([entry.job for entry in running])
            except BaseException:
                _end(running)
                raise


def _startable(queue: deque[Job], sweep: Sweep, free: list[str]) -> Iterator[Job]:
    """Jobs from the front of the queue for which there are slots, those left out that others are doing."""
    for _ in range(len(queue)):
        if queue[0].cfg.trainer.devices > len(free):
            return
        job = queue.popleft()
        if runs.is_taken(job.folder):
            queue.append(job)
        elif not sweep.settled(job):
            yield job


def _taken(free: list[str], count: int) -> list[str]:
    """Take slots, of different GPUs as far as there are any."""
    slots: list[str] = []
    for _ in range(count):
        slot = next((slot for slot in free if slot not in slots), free[0])
        free.remove(slot)
        slots.append(slot)
    return slots


def _start(context: multiprocessing.context.BaseContext, job: Job, slots: list[str], threads: str) -> _Running:
    job.folder.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ",".join(slot for slot in slots if slot)}
    process = context.Process(  # type: ignore[attr-defined]
        target=work, args=(job.script, job.arguments, job.log, environment), name=job.name
    )
    process.start()
    return _Running(job, process, slots)


def _signal(entry: _Running, number: signal.Signals) -> None:
    """Send a signal to a run's processes."""
    assert entry.process.pid is not None
    with suppress(ProcessLookupError):  # not yet the head of a group, or nothing left of it
        os.killpg(entry.process.pid, number)


def _end_if_overdue(entry: _Running) -> None:
    """A run has a watchdog of its own; this one also ends what is stopped, or stuck before it began."""
    minutes = entry.job.cfg.timeout_min
    if minutes is not None and entry.seconds > 60 * minutes + LATE and not entry.overdue:
        entry.overdue = True
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

    OMP_NUM_THREADS is read when torch is loaded, so it must stand in the server's environment.
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
