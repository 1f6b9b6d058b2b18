"""The jobs of one command and their outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from backforward_suite.errors import BadInput
from backforward_suite.runs import lifecycle
from backforward_suite.sweep.jobs import Job, Outcome, not_started
from backforward_suite.sweep.view import View


class Sweep:
    """The jobs of one command, and the outcomes of those that have ended, shown as they end.

    Args:
        jobs: All jobs; two spellings of the same settings are one run.

    Attributes:
        jobs: By folder.
        outcomes: By folder.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = {job.folder: job for job in jobs}
        self.outcomes: dict[Path, Outcome] = {}
        self.view = View(list(self.jobs.values()))

    def run(self, work: Callable[[list[Job]], None]) -> dict[Path, Outcome]:
        """Do the jobs that are not done yet; a job that fails raises nothing.

        Args:
            work: Does jobs; calls `started` and `ended` for each.

        Returns:
            The outcomes, by folder.
        """
        with self.view:
            pending = [job for job in self.jobs.values() if not self.settled(job)]
            if pending:
                work(pending)
            self.view.summary({job: self.outcomes[folder] for folder, job in self.jobs.items()})
        return self.outcomes

    def settled(self, job: Job) -> bool:
        """Whether a job needs no start: it is done, or its folder cannot be used."""
        try:
            result = lifecycle.finished_result(job.folder, job.request)
        except (BadInput, OSError) as error:
            self.ended(job, not_started(error))
            return True
        if result is not None:
            self.ended(job, Outcome(result=result, skipped=True))
        return result is not None

    def started(self, job: Job) -> None:
        """Note that a job has started."""
        self.view.started(job)

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Note how a job has ended."""
        self.outcomes[job.folder] = outcome
        self.view.ended(job, outcome)
