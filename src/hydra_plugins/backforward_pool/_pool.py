"""Runs jobs in processes, a few at a time, and tells what became of each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from omegaconf import DictConfig

from backforward import runs
from backforward.errors import BadInput
from backforward.hardware import cpu_count, gpu_names
from hydra_plugins.backforward_pool._view import View
from hydra_plugins.backforward_pool._worker import work

GRACE = 5.0  # seconds between asking a process to end and ending it
POLL = 0.5  # seconds between two looks at the clock and at the runs' progress


@dataclass(frozen=True, eq=False)
class Job:
    """One run to do: a script, its arguments, and the folder where its result will lie."""

    script: Path
    arguments: tuple[str, ...]
    folder: Path
    cfg: DictConfig
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.folder / "run.log"


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    result: runs.Result | None = None  # where the run is done
    cause: str | None = None  # where it is not
    skipped: bool = False  # it had been done before
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether there is a result to read."""
        return self.result is not None


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

    A run takes as many slots as it has devices. It sees its own GPUs alone, and its share of the cores.

    Args:
        slots: Runs at a time; None: one a GPU, else one a core.
    """

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots

    def run(self, jobs: Sequence[Job]) -> dict[Path, Outcome]:
        """Run the jobs that are not done; never raises for what happens in one of them.

        Returns:
            By folder, what became of each.

        Raises:
            KeyboardInterrupt: After the running ones have been ended.
        """
        outcomes: dict[Path, Outcome] = {}
        unique = {job.folder: job for job in jobs}  # two spellings of the same settings are one run
        pending: deque[Job] = deque()
        for folder, job in unique.items():
            try:
                result = runs.finished_result(folder, job.cfg)
            except BadInput as error:
                outcomes[folder] = Outcome(cause=str(error))
                continue
            if result is None:
                pending.append(job)
            else:
                outcomes[folder] = Outcome(result=result, skipped=True)
        with View(list(unique.values())) as view:
            for folder, outcome in outcomes.items():
                view.ended(unique[folder], outcome)
            if pending:
                self._work_off(pending, outcomes, view)
            view.summary({job: outcomes[folder] for folder, job in unique.items()})
        return outcomes

    def _work_off(self, pending: deque[Job], outcomes: dict[Path, Outcome], view: View) -> None:
        uses_gpus = any(job.cfg.trainer.accelerator != "cpu" for job in pending)
        gpus = gpu_names() if uses_gpus else []
        count = self.slots or len(gpus) or cpu_count()
        free = [gpus[n % len(gpus)] if gpus else "" for n in range(count)]
        threads = str(max(1, cpu_count() // count))
        with _forkserver(threads) as context:
            running: list[_Running] = []
            try:
                while pending or running:
                    while pending and pending[0].cfg.trainer.devices <= len(free):
                        job = pending.popleft()
                        slots = [free.pop(0) for _ in range(job.cfg.trainer.devices)]
                        running.append(_start(context, job, slots, threads))
                        view.started(job)
                    if not running:
                        job = pending.popleft()
                        wanted = job.cfg.trainer.devices
                        outcomes[job.folder] = Outcome(cause=f"trainer.devices={wanted}: there are {count} slots")
                        view.ended(job, outcomes[job.folder])
                        continue
                    wait([entry.process.sentinel for entry in running], timeout=POLL)
                    for entry in [entry for entry in running if entry.process.exitcode is not None]:
                        running.remove(entry)
                        free += entry.slots
                        outcomes[entry.job.folder] = _outcome(entry)
                        view.ended(entry.job, outcomes[entry.job.folder])
                    view.tick([entry.job for entry in running])
            except BaseException:
                _end(running)
                raise


def _start(context: multiprocessing.context.BaseContext, job: Job, slots: list[str], threads: str) -> _Running:
    job.folder.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ",".join(slot for slot in slots if slot)}
    process = context.Process(  # type: ignore[attr-defined]
        target=work, args=(job.script, job.arguments, job.log, environment), name=job.name
    )
    process.start()
    return _Running(job, process, slots)


def _outcome(entry: _Running) -> Outcome:
    """What a process that has ended leaves: its result, else the cause."""
    code, job = entry.process.exitcode, entry.job
    assert code is not None
    try:
        result = runs.read_result(job.folder)
    except BadInput as error:
        return Outcome(cause=str(error), seconds=entry.seconds)
    if code == 0 and result is not None and result["status"] in runs.DONE:
        return Outcome(result=result, seconds=entry.seconds)
    minutes = job.cfg.timeout_min
    if minutes is not None and entry.seconds > 60 * minutes:
        cause = f"ran longer than timeout_min={minutes}"
    elif code < 0:
        hint = " (out of memory, perhaps)" if code == -signal.SIGKILL else ""
        cause = f"killed by {signal.Signals(-code).name}{hint}"
    elif result is not None and result["status"] == "failed":
        cause = result["cause"]
    else:
        cause = _last_line(job.log) or f"ended with exit code {code}"
    return Outcome(cause=cause, seconds=entry.seconds)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _end(running: Sequence[_Running]) -> None:
    """Ask each process group to end; end it if it does not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for entry in running:
            if entry.process.exitcode is None and entry.process.pid is not None:
                try:
                    os.killpg(entry.process.pid, number)
                except ProcessLookupError:
                    entry.process.kill()  # not yet the head of its group
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
