"""The jobs of one command, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from backforward_suite.errors import BadInput
from backforward_suite.runs import lifecycle
from backforward_suite.sweep.jobs import Job, Outcome, not_started
from backforward_suite.sweep.view import View


class Sweep:
    """The jobs of one command: which are still to do, and what became of the others, shown as it happens.

    Args:
        jobs: All of them; two spellings of the same settings are one run.

    Attributes:
        jobs: By folder.
        outcomes: By folder, of the jobs that have ended.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = {job.folder: job for job in jobs}
        self.outcomes: dict[Path, Outcome] = {}
        self.view = View(list(self.jobs.values()))

    def run(self, work: Callable[[list[Job]], None]) -> dict[Path, Outcome]:
        """Have the jobs done that are not done yet; never raises for what happens in one of them.

        Args:
            work: Does jobs, and tells `started` and `ended`.

        Returns:
            By folder, what became of each.
        """
        with self.view:
            pending = [job for job in self.jobs.values() if not self.settled(job)]
            if pending:
                work(pending)
            self.view.summary({job: self.outcomes[folder] for folder, job in self.jobs.items()})
        return self.outcomes

    def settled(self, job: Job) -> bool:
        """Whether a job needs no start: done before, or its folder holds something that forbids it."""
        try:
            result = lifecycle.finished_result(job.folder, job.request)
        except (BadInput, OSError) as error:
            self.ended(job, not_started(error))
            return True
        if result is not None:
            self.ended(job, Outcome(result=result, skipped=True))
        return result is not None

    def started(self, job: Job) -> None:
        """A job has begun."""
        self.view.started(job)

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A job has ended."""
        self.outcomes[job.folder] = outcome
        self.view.ended(job, outcome)
