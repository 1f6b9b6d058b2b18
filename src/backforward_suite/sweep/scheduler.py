"""What launchers have in common that hand their runs to other machines."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from backforward_suite import cli
from backforward_suite.errors import BadInput
from backforward_suite.runs import lifecycle, locks
from backforward_suite.sweep.jobs import Job, Outcome, conclude, not_started
from backforward_suite.sweep.launcher import JobLauncher
from backforward_suite.sweep.sweep import Sweep

POLL = 1.0  # seconds between two looks


class SchedulerLauncher(JobLauncher):
    """Gives each run to a scheduler, waits for all of them, and shows what became of each.

    A run that another sweep is training is not submitted until that has ended it; it is skipped if done then.

    Attributes:
        poll_seconds: Time between two looks at what is under way.
    """

    poll_seconds = POLL

    @abstractmethod
    def cluster(self) -> AbstractContextManager[None]:
        """Be connected to the scheduler.

        Raises:
            BadInput: What it needs is not here.
        """

    @abstractmethod
    def submit(self, jobs: list[Job], submitted: dict[Any, Job]) -> None:
        """Hand over jobs, and enter each under what the scheduler calls it; what is entered can be taken back.

        Raises:
            BadInput: The scheduler refuses them.
        """

    @abstractmethod
    def ended(self, submitted: Mapping[Any, Job]) -> dict[Any, int | str]:
        """Which of them have ended: each with the exit code of its process, or what the scheduler says became of it."""

    @abstractmethod
    def cancel(self, submitted: Sequence[Any]) -> None:
        """Take jobs back; those that run write a checkpoint first."""

    def get_data(self, name: str, root: Path) -> None:
        """Try: where the runs go, the data may be there, or a network that is not here."""
        with suppress(BadInput):
            super().get_data(name, root)

    def work(self, sweep: Sweep, jobs: list[Job]) -> None:
        """Have jobs done.

        Raises:
            BadInput: What the scheduler needs is not here, or it refuses the jobs.
            KeyboardInterrupt, Stopped: After all have been taken back.
        """
        todo = list(jobs)
        submitted: dict[Any, Job] = {}
        since: dict[Job, float] = {}  # when a job was seen to have started
        with self.cluster():
            try:
                while todo or submitted:
                    free = [job for job in todo if not locks.is_taken(job.folder)]
                    todo = [job for job in todo if job not in free]
                    if pending := [job for job in free if not sweep.settled(job) and _is_ready(sweep, job)]:
                        self.submit(pending, submitted)
                    time.sleep(self.poll_seconds)
                    for job in submitted.values():
                        if job not in since and locks.is_taken(job.folder):
                            since[job] = time.monotonic()
                            sweep.started(job)
                    sweep.view.tick(list(since))
                    for one, end in self.ended(submitted).items() if submitted else ():
                        job = submitted.pop(one)
                        seconds = time.monotonic() - since.pop(job, time.monotonic())
                        if end == cli.BUSY:  # someone was quicker
                            todo.append(job)
                        elif isinstance(end, str):
                            lifecycle.note_failure(job.folder, job.request, end)
                            sweep.ended(job, Outcome(cause=end, seconds=seconds))
                        else:
                            sweep.ended(job, conclude(job, end, seconds))
            except BaseException:
                if submitted:
                    self.cancel(list(submitted))
                raise


def _is_ready(sweep: Sweep, job: Job) -> bool:
    """Forget why a job failed before; one whose folder cannot be used has ended with that."""
    try:
        lifecycle.forget_failure(job.folder)
    except (BadInput, OSError) as error:
        sweep.ended(job, not_started(error))
        return False
    return True


def call_of(job: Job) -> tuple[str, tuple[str, ...], str, str]:
    """The arguments of `RemoteRun` for a job: script, arguments, log, folder to run in."""
    return str(job.script), job.arguments, str(job.log.absolute()), str(Path.cwd())


def imported(module: str, extra: str) -> Any:
    """Import what an optional launcher needs.

    Raises:
        BadInput: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        raise BadInput(f"hydra/launcher={extra}: {module} is not installed; pip install -e '.[{extra}]'") from None
