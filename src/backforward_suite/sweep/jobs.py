"""Jobs and their outcomes, for every launcher."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from backforward_suite import cli
from backforward_suite.config import Request
from backforward_suite.errors import BadInput, Refused, cause_of
from backforward_suite.explain import explain
from backforward_suite.runs import files, lifecycle


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a sweep: a script, its arguments, and the folder of its result."""

    script: Path
    arguments: tuple[str, ...]
    folder: Path
    request: Request
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """The file that its output goes to."""
        return self.folder / "run.log"


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    result: files.Result | None = None  # of a run that is done
    cause: str | None = None  # of a run that is not
    skipped: bool = False  # the run was done before, or meanwhile by another sweep
    refused: bool = False  # the folder holds another run: the same command would be refused again
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether there is a result to read."""
        return self.result is not None


_HINTS: dict[int, str] = {
    signal.SIGKILL: " (possibly by the out-of-memory killer: see the system's log)",
    signal.SIGBUS: " (a file became shorter while it was read, or a disk is full)",
}


def not_started(error: Exception) -> Outcome:
    """The outcome of a job whose folder cannot be used."""
    return Outcome(cause=explain(error, Path(), ()) or cause_of(error), refused=isinstance(error, Refused))


def conclude(job: Job, code: int, seconds: float) -> Outcome:
    """Find how a job ended: its result, else the cause. Writes the cause down if the run could not.

    Args:
        job: The job.
        code: The exit code of its process, or minus the number of the signal that ended it.
        seconds: How long it ran.
    """
    try:
        result = files.read_result(job.folder)
    except BadInput as error:
        return Outcome(cause=str(error), seconds=seconds)
    if code == 0 and result is not None and result["status"] in files.DONE:
        return Outcome(result=result, seconds=seconds)
    if result is not None and result["status"] == "failed":
        return Outcome(cause=result["cause"], seconds=seconds)
    if code in (cli.STOPPED, -signal.SIGTERM):
        return Outcome(cause="stopped by SIGTERM; it resumes from its last checkpoint", seconds=seconds)
    minutes = job.request.settings.timeout_min
    if minutes is not None and seconds > 60 * minutes:
        cause = lifecycle.overdue(job.request)
    elif code < 0:
        cause = f"killed by {signal.Signals(-code).name}{_HINTS.get(-code, '')}"
    else:
        cause = next(iter(files.last_lines(job.log, 1)), f"ended with exit code {code}")
    lifecycle.note_failure(job.folder, job.request, cause)
    return Outcome(cause=cause, seconds=seconds)
