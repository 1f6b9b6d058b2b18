"""The common part of launchers that submit runs to a scheduler."""

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


class SchedulerLauncher(JobLauncher):
    """Submits each run to a scheduler and waits for all of them.

    A run that another sweep is training is submitted only if that sweep ends without finishing it.

    Attributes:
        poll_seconds: Time between checks of the submitted jobs.
    """

    poll_seconds = 1.0

    @abstractmethod
    def cluster(self) -> AbstractContextManager[None]:
        """Connect to the scheduler.

        Raises:
            BadInput: Its client is not installed, or nothing answers.
        """

    @abstractmethod
    def submit(self, jobs: list[Job], submitted: dict[Any, Job]) -> None:
        """Submit jobs; add each to `submitted`, under the scheduler's handle, as soon as it can be cancelled.

        Raises:
            BadInput: The scheduler refuses them.
        """

    @abstractmethod
    def ended(self, submitted: Mapping[Any, Job]) -> dict[Any, int | str]:
        """The jobs that have ended, each with the exit code of its process, or the scheduler's account of its end."""

    @abstractmethod
    def cancel(self, submitted: Sequence[Any]) -> None:
        """Cancel jobs; those that run write a checkpoint first."""

    def get_data(self, name: str, root: Path) -> None:
        """Try to get a data set; the nodes that runs go to may have it, or a network, if this machine has not."""
        with suppress(BadInput):
            super().get_data(name, root)

    def work(self, sweep: Sweep, jobs: list[Job]) -> None:
        """Run jobs.

        Raises:
            BadInput: As `cluster` and `submit`.
            KeyboardInterrupt, Stopped: After all jobs have been cancelled.
        """
        todo = list(jobs)
        submitted: dict[Any, Job] = {}
        since: dict[Job, float] = {}  # when a job was first seen running
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
                        if end == cli.BUSY:  # another sweep was quicker
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
    """Forget why a job failed before; return False if its folder cannot be used."""
    try:
        lifecycle.forget_failure(job.folder)
    except (BadInput, OSError) as error:
        sweep.ended(job, not_started(error))
        return False
    return True


def call_of(job: Job) -> tuple[str, tuple[str, ...], str, str]:
    """The arguments of `RemoteRun` for a job."""
    return str(job.script), job.arguments, str(job.log.absolute()), str(Path.cwd())


def imported(module: str, extra: str) -> Any:
    """Import a launcher's client; raise BadInput if it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise BadInput(f"hydra/launcher={extra}: {module} is not installed; pip install -e '.[{extra}]'") from None
