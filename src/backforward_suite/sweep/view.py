"""The display of a sweep: live bars in a terminal, a line per run that ended, a summary."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from backforward_suite.runs import files
from backforward_suite.runs.names import rounded
from backforward_suite.sweep.jobs import Job, Outcome


def told_apart(runs: Mapping[Any, Sequence[str]]) -> dict[Any, str]:
    """Label each run by the overrides in which the runs differ, such as `bfp lr=0.1 seed=2`; empty for a single run.

    Args:
        runs: The overrides of each run.
    """
    given = {run: dict(text.lstrip("+").partition("=")[::2] for text in overrides) for run, overrides in runs.items()}
    keys = dict.fromkeys(key for values in given.values() for key in values)
    varying = [key for key in keys if len({values.get(key) for values in given.values()}) > 1]
    return {
        run: " ".join(
            values[key] if key == "method" else f"{key.rpartition('.')[2]}={rounded(values[key])}"
            for key in sorted(varying, key=lambda key: key != "method")
            if key in values
        )
        for run, values in given.items()
    }


class View:
    """Shows the progress of a sweep's jobs."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.console = Console()
        self.total = len(jobs)
        self.count = 0
        self.began = time.monotonic()
        self.bars: dict[Job, TaskID] = {}
        self.labels = told_apart({job: job.overrides for job in jobs})
        self.progress = Progress(
            # The first column is cut if the terminal is narrow.
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=24, table_column=Column(min_width=10, no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[unit]}", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            expand=True,
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.all = self.progress.add_task("[bold]sweep", total=self.total, unit="runs")

    def __enter__(self) -> View:
        """Start drawing."""
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Restore the terminal."""
        self.progress.stop()

    def started(self, job: Job) -> None:
        """Draw a job's bar."""
        if job in self.bars:  # it was started before, and another sweep was quicker
            self.progress.remove_task(self.bars.pop(job))
        self.bars[job] = self.progress.add_task(
            escape(self._label(job)), total=job.request.settings.max_epochs, unit="epochs"
        )

    def _label(self, job: Job) -> str:
        return self.labels.get(job) or job.name

    def tick(self, running: Sequence[Job]) -> None:
        """Update the bars of running jobs."""
        if self.progress.disable:
            return
        for job in running:
            self.progress.update(self.bars[job], completed=files.epochs_done(job.folder))

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Remove a job's bar; print a line about it unless it was skipped."""
        self.count += 1
        self.progress.update(self.all, completed=self.count)
        if job in self.bars:
            self.progress.remove_task(self.bars.pop(job))
        if outcome.skipped:
            return
        if outcome.result is not None:
            accuracy = files.objective(outcome.result)
            what = outcome.result["status"] + (f", validation accuracy {accuracy:.2%}" if accuracy is not None else "")
        else:
            what = f"[bold]failed[/]: {escape(outcome.cause or '')}"
        self._print(f"\\[{self.count}/{self.total}] {escape(self._label(job))}: {what} [dim]({outcome.seconds:.1f} s)")

    def summary(self, outcomes: Mapping[Job, Outcome]) -> None:
        """Print the number of runs by outcome, and the cause and log of each failed one."""
        self.progress.stop()
        kinds = Counter(
            "skipped" if outcome.skipped else outcome.result["status"] if outcome.result else "failed"
            for outcome in outcomes.values()
        )
        labels = {"finished": "finished", "diverged": "diverged", "failed": "failed", "skipped": "done before, skipped"}
        parts = [f"{kinds[kind]} {label}" for kind, label in labels.items() if kinds[kind]]
        runs_ = "run" if self.total == 1 else "runs"
        self._print(f"{self.total} {runs_}: {', '.join(parts)}, in {time.monotonic() - self.began:.1f} s")
        for job, outcome in outcomes.items():
            if not outcome.done:
                log = f"\n    log: {escape(str(job.log))}" if os.access(job.log, os.F_OK) else ""
                self._print(f"[bold]failed[/] {escape(job.name)}: {escape(outcome.cause or '')}{log}")

    def note(self, text: str) -> None:
        """Print a line about the whole sweep."""
        self._print(escape(text))

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
