"""`hydra/launcher=pool`: runs jobs in processes of this machine, a few at a time. See conf/hydra/launcher/pool.yaml."""

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
from backforward_suite.sweep.launcher import JobLauncher
from backforward_suite.sweep.sweep import Sweep
from backforward_suite.sweep.worker import work

GRACE = 30.0  # seconds between SIGTERM and SIGKILL, to write a checkpoint
SERVER_GONE = 255  # multiprocessing's exit code of a process whose fork server was killed
SOCKET_PATH = 75  # characters of TMPDIR that leave room for the name of a socket in it
POLL = 0.5  # seconds between checks of time limits and progress


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    slots: list[str]
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class PoolLauncher(JobLauncher):
    """Runs as many jobs at a time as there are slots: GPUs if any run uses them, else cores.

    A run takes one slot per device. It sees only its own GPUs and uses its share of the cores. A run that another sweep
    is training waits at the end of the queue: it is skipped once done, and trained here if that sweep is killed.

    Args:
        slots: Runs at a time; None: one per GPU, else one per core.
    """

    def __init__(self, slots: int | None = None) -> None:
        super().__init__()
        if slots is not None and slots < 1:
            raise BadInput(f"hydra.launcher.slots={slots}: must be an integer >= 1, or null for one per GPU or core")
        self.slots = slots

    def _count(self, jobs: Sequence[Job]) -> tuple[int, list[str]]:
        """The number of slots, and the GPUs that share them."""
        uses_gpus = any(job.request.settings.trainer.accelerator != "cpu" for job in jobs)
        gpus = gpu_names() if uses_gpus else []
        return self.slots or len(gpus) or cpu_count(), gpus

    def get_ready(self, job: Job) -> None:
        """Start the fork server: its imports take as long as Hydra needs to compose 40 runs."""
        count, _ = self._count([job])
        with _forkserver(_threads(count)):
            forkserver.ensure_running()

    def work(self, sweep: Sweep, jobs: Sequence[Job]) -> None:  # noqa: PLR0912 (one loop, a line for each event)
        """Run jobs.

        Raises:
            KeyboardInterrupt, Stopped: After the running jobs have been ended, each with a checkpoint.
        """
        count, gpus = self._count(jobs)
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
        retried: set[Job] = set()

        def retry(job: Job) -> bool:
            """Queue a job once more, as the fork server was killed; another one is started."""
            if job in retried:
                return False
            retried.add(job)
            queue.append(job)
            return True

        with _forkserver(threads) as context:
            try:
                while queue or running:
                    for job in _startable(queue, sweep, free):
                        slots = _taken(free, job.request.settings.trainer.devices)
                        try:
                            running.append(_start(context, job, slots, threads))
                        except (BadInput, OSError, EOFError) as error:  # from its folder or the fork server
                            free += slots
                            if not (isinstance(error, EOFError | ConnectionError) and retry(job)):
                                sweep.ended(job, not_started(error))
                        else:
                            sweep.started(job)
                    if running:
                        wait([entry.process.sentinel for entry in running], timeout=POLL)
                    elif queue:
                        time.sleep(POLL)  # other sweeps are training all that is left
                    for entry in running:
                        _end_if_overdue(entry)
                    for entry in [entry for entry in running if entry.process.exitcode is not None]:
                        running.remove(entry)
                        free += entry.slots
                        _signal(entry, signal.SIGKILL)  # whatever is left of its process group
                        code = entry.process.exitcode
                        assert code is not None
                        if code == cli.BUSY:  # another sweep was quicker
                            queue.append(entry.job)
                        elif not (code == SERVER_GONE and retry(entry.job)):
                            sweep.ended(entry.job, conclude(entry.job, code, entry.seconds))
                    sweep.view.tick([entry.job for entry in running])
            except BaseException:
                _end(running)
                raise


def _threads(count: int) -> str:
    """OMP_NUM_THREADS of each of `count` runs at a time."""
    return str(max(1, cpu_count() // count))


def _startable(queue: deque[Job], sweep: Sweep, free: list[str]) -> Iterator[Job]:
    """Take jobs from the front of the queue while there are slots, except those that other sweeps are training."""
    for _ in range(len(queue)):
        if queue[0].request.settings.trainer.devices > len(free):
            return
        job = queue.popleft()
        if locks.is_taken(job.folder):
            queue.append(job)
        elif not sweep.settled(job):
            yield job


def _taken(free: list[str], count: int) -> list[str]:
    """Take slots, of different GPUs as far as possible."""
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
    job.log.open("ab").close()  # raises here if the log cannot be written
    environment = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ",".join(slot for slot in slots if slot)}
    arguments = (job.script, job.arguments, job.log, environment)
    process = context.Process(target=work, args=arguments, name=job.name)  # type: ignore[attr-defined]
    process.start()
    return _Running(job, process, slots)


def _signal(entry: _Running, number: signal.Signals) -> None:
    assert entry.process.pid is not None
    with suppress(ProcessLookupError):  # it does not lead its process group yet, or nothing is left of it
        os.killpg(entry.process.pid, number)


def _end_if_overdue(entry: _Running) -> None:
    """Kill a run that its own watchdogs cannot end: it was stopped, or hung before it started them."""
    minutes = entry.job.request.settings.timeout_min
    if minutes is not None and entry.seconds > 60 * minutes + 2 * lifecycle.LATE:
        _signal(entry, signal.SIGKILL)


def _end(running: Sequence[_Running]) -> None:
    """End all runs: SIGTERM, then SIGKILL."""
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

    torch reads OMP_NUM_THREADS when it is loaded, so the server's environment sets it. A process has one such server:
    if it was started for another number of threads, each run sets its own (see `worker`).
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
