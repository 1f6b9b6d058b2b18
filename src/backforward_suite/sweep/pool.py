"""Runs jobs in processes of this machine, a few at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import backforward_suite
from backforward_suite import cli
from backforward_suite.errors import BadInput
from backforward_suite.hardware import cpu_count, gpu_names
from backforward_suite.runs import lifecycle, locks
from backforward_suite.sweep.jobs import Job, Outcome, conclude, not_started
from backforward_suite.sweep.sweep import Sweep
from backforward_suite.sweep.worker import work

GRACE = 30.0  # seconds to write a checkpoint, between asking a process to end and ending it
SERVER_GONE = 255  # what multiprocessing takes for the exit code of a process whose server was killed
SOCKET_PATH = 75  # characters of TMPDIR that leave room for the name of a socket in it
POLL = 0.5  # seconds between two looks at the clock and at the runs' progress


@dataclass
class _Running:
    job: Job
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
        uses_gpus = any(job.request.settings.trainer.accelerator != "cpu" for job in jobs)
        gpus = gpu_names() if uses_gpus else []
        return self.slots or len(gpus) or cpu_count(), gpus

    def get_ready(self, job: Job) -> None:
        """Start the process that runs are forked from, and return while it imports what they need."""
        count, _ = self.count([job])
        with _forkserver(_threads(count)):
            forkserver.ensure_running()

    def run(self, sweep: Sweep, jobs: Sequence[Job]) -> None:  # noqa: PLR0912 (one loop, each event a line)
        """Do jobs.

        Raises:
            KeyboardInterrupt, Stopped: After the running ones have been ended, each with a checkpoint.
        """
        count, gpus = self.count(jobs)
        free = [gpus[n % len(gpus)] if gpus else "" for n in range(count)]
        threads = _threads(count)
        queue: deque[Job] = deque()
        for job in jobs:
            devices = job.request.settings.trainer.devices
            if devices > count:
                sweep.ended(job, Outcome(cause=f"trainer.devices={devices}: there are {count} slots"))
            else:
                queue.append(job)
        running: list[_Running] = []
        begun_again: set[Job] = set()

        def again(job: Job) -> bool:
            """Begin a job once more, as the server that runs are forked from was killed; another one is started."""
            if job in begun_again:
                return False
            begun_again.add(job)
            queue.append(job)
            return True

        with _forkserver(threads) as context:
            try:
                while queue or running:
                    for job in _startable(queue, sweep, free):
                        slots = _taken(free, job.request.settings.trainer.devices)
                        try:
                            running.append(_start(context, job, slots, threads))
                        except (BadInput, OSError, EOFError) as error:  # its folder, or the server that starts runs
                            free += slots
                            if not (isinstance(error, EOFError | ConnectionError) and again(job)):
                                sweep.ended(job, not_started(error))
                        else:
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
                        code = entry.process.exitcode
                        assert code is not None
                        if code == cli.BUSY:  # someone was quicker
                            queue.append(entry.job)
                        elif not (code == SERVER_GONE and again(entry.job)):
                            sweep.ended(entry.job, conclude(entry.job, code, entry.seconds))
                    sweep.view.tick([entry.job for entry in running])
            except BaseException:
                _end(running)
                raise


def _threads(count: int) -> str:
    """Of each of so many runs at a time."""
    return str(max(1, cpu_count() // count))


def _startable(queue: deque[Job], sweep: Sweep, free: list[str]) -> Iterator[Job]:
    """Jobs from the front of the queue for which there are slots, without those that others are doing."""
    for _ in range(len(queue)):
        if queue[0].request.settings.trainer.devices > len(free):
            return
        job = queue.popleft()
        if locks.is_taken(job.folder):
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
    lifecycle.refuse_foreign(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    lifecycle.forget_failure(job.folder)
    job.log.open("ab").close()  # where it cannot be written, this process says so
    environment = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ",".join(slot for slot in slots if slot)}
    arguments = (job.script, job.arguments, job.log, environment)
    process = context.Process(target=work, args=arguments, name=job.name)  # type: ignore[attr-defined]
    process.start()
    return _Running(job, process, slots)


def _signal(entry: _Running, number: signal.Signals) -> None:
    """Send a signal to a run's processes."""
    assert entry.process.pid is not None
    with suppress(ProcessLookupError):  # not yet the head of a group, or nothing left of it
        os.killpg(entry.process.pid, number)


def _end_if_overdue(entry: _Running) -> None:
    """A run has watchdogs of its own; this one also ends what is stopped, or stuck before it began."""
    minutes = entry.job.request.settings.timeout_min
    if minutes is not None and entry.seconds > 60 * minutes + 2 * lifecycle.LATE:
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
    server: where it was started for another number of threads, each run sets its own (see `worker`).
    """
    if len(tempfile.gettempdir()) > SOCKET_PATH:
        raise BadInput(
            f"TMPDIR={tempfile.gettempdir()}: too long for the name of a socket in it; "
            f"give one of at most {SOCKET_PATH} characters, such as TMPDIR=/tmp"
        )
    source = str(Path(backforward_suite.__file__).resolve().parent.parent)
    changes = {
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
    }
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["backforward_suite.sweep.preload"])
        yield context
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
