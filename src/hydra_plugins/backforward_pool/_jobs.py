"""What a sweep is made of: jobs, and what became of them; the same for every launcher."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from backforward import cli, runs
from backforward.errors import BadInput
from hydra_plugins.backforward_pool._view import View


@dataclass(frozen=True, eq=False)
class Job:
    """One run to do: a script, its arguments, and the folder where its result will lie."""

    script: Path
    arguments: tuple[str, ...]
    folder: Path
    cfg: DictConfig
    overrides: tuple[str, ...]
    composed: DictConfig  # cfg with Hydra's node, as the run's own process composes it

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
    skipped: bool = False  # it had been done before, or elsewhere meanwhile
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether there is a result to read."""
        return self.result is not None


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
            result = runs.finished_result(job.folder, job.cfg)
        except BadInput as error:
            self.ended(job, Outcome(cause=str(error)))
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


def conclude(job: Job, code: int, seconds: float) -> Outcome:
    """What a process that has ended leaves: its result, else the cause. Where it left no word, that is written down.

    Args:
        job: What it did.
        code: Its exit code, or minus the number of the signal that ended it.
        seconds: How long it ran.
    """
    try:
        result = runs.read_result(job.folder)
    except BadInput as error:
        return Outcome(cause=str(error), seconds=seconds)
    if code == 0 and result is not None and result["status"] in runs.DONE:
        return Outcome(result=result, seconds=seconds)
    if result is not None and result["status"] == "failed":
        return Outcome(cause=result["cause"], seconds=seconds)
    if code in (cli.STOPPED, -signal.SIGTERM):
        return Outcome(cause="stopped by SIGTERM; it goes on from its last checkpoint", seconds=seconds)
    if job.cfg.timeout_min is not None and seconds > 60 * job.cfg.timeout_min:
        cause = runs.overdue(job.cfg)
    elif code < 0:
        hint = " (out of memory, perhaps: the system's log would say so)" if code == -signal.SIGKILL else ""
        cause = f"killed by {signal.Signals(-code).name}{hint}"
    else:
        cause = next(iter(runs.last_lines(job.log, 1)), f"ended with exit code {code}")
    runs.note_failure(job.folder, job.cfg, cause)
    return Outcome(cause=cause, seconds=seconds)
