"""The part that speaks with Hydra: from overrides to jobs, and from results to what sweepers read."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.progress import track

from backforward_suite.cli import RunsFailed
from backforward_suite.config import Request
from backforward_suite.errors import BadInput, Stopped
from backforward_suite.runs import files, lifecycle
from backforward_suite.sweep.jobs import Job, Outcome
from backforward_suite.sweep.sweep import Sweep


class JobLauncher(Launcher):
    """Runs each job as a process of its own, in the way `python src/train.py <overrides>` would."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    @abstractmethod
    def work(self, sweep: Sweep, jobs: list[Job]) -> None:
        """Do jobs, and tell the sweep when each starts and ends."""

    def get_ready(self, job: Job) -> None:
        """Begin with what the work on jobs will need, as there is at least this one; the others are being composed."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take Hydra's context; the jobs are processes, so the task function is not called here."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run what is not done yet; show a summary.

        Returns:
            One for each job, in order. That of a failed one raises `RunsFailed` when its value is read.

        Raises:
            BadInput: There is no job, or its settings are out of range; then none is started.
        """
        if not job_overrides:
            raise BadInput("this sweep has no runs: one of its keys has no values")
        # Hydra takes a tenth of a second to compose a run's settings.
        numbered = list(enumerate(job_overrides, initial_job_idx))
        console = Console(stderr=True)
        jobs: list[Job] = []
        ready = False
        for number, overrides in track(
            numbered, "Composing settings", console=console, transient=True, disable=not console.is_terminal
        ):
            jobs.append(self._job(list(overrides), number))
            if not ready and not files.is_done(jobs[-1].folder):
                self.get_ready(jobs[-1])
                ready = True
        _write_plans(jobs)
        _share(jobs)
        sweep = Sweep(jobs)
        with _sigterm_raises():
            outcomes = sweep.run(lambda pending: self.work(sweep, pending))
        failed = sum(not outcome.done for outcome in outcomes.values())
        failure = RunsFailed(f"{failed} of {len(outcomes)} runs failed; the same command runs them again")
        return [self._returned(job, outcomes[job.folder], failure) for job in jobs]

    def _job(self, overrides: list[str], number: int) -> Job:
        assert self.config is not None
        assert self.hydra_context is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(cfg):
            cfg.hydra.job.num = number
            cfg.hydra.job.id = str(number)
        folder = Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir
        return Job(
            script=Path(sys.argv[0]).resolve(),
            arguments=(*self._where(cfg), *overrides, "hydra.mode=RUN", f"hydra.run.dir={_quoted(str(folder))}"),
            folder=folder,
            request=Request.of(cfg, cfg.hydra, here=False),  # its name has been made, and so this machine was looked at
            overrides=tuple(overrides),
        )

    @staticmethod
    def _where(cfg: DictConfig) -> list[str]:
        """The options by which a child finds the same configs."""
        options = ["--config-name", cfg.hydra.job.config_name]
        flags = {"main": "--config-path", "command-line": "--config-dir"}
        for source in cfg.hydra.runtime.config_sources:
            if source.schema == "file" and source.provider in flags:
                options += [flags[source.provider], source.path]
        return options

    @staticmethod
    def _returned(job: Job, outcome: Outcome, failure: RunsFailed) -> JobReturn:
        returned = _Returned(overrides=list(job.overrides), cfg=job.request.cfg, working_dir=os.fspath(job.folder))
        if outcome.result is not None:
            returned.status, returned.return_value = JobStatus.COMPLETED, files.objective(outcome.result)
        else:
            returned.status, returned.return_value = JobStatus.FAILED, failure
        return returned


class _Returned(JobReturn):
    """Hydra's own prints lines about a failure before it raises; the summary has said it all."""

    @property
    def return_value(self) -> Any:
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def _write_plans(jobs: Sequence[Job]) -> None:
    planned: dict[Path, dict[str, list[str]]] = defaultdict(dict)
    for job in jobs:
        planned[job.folder.parent][job.name] = list(job.overrides)
    for root, names in planned.items():
        lifecycle.add_to_plan(root, names)


def _share(jobs: Sequence[Job]) -> None:
    """Experiments that judge claims share runs of equal settings: what one has trained, another takes over."""
    pending = [job for job in jobs if job.request.settings.scale is not None and not files.is_done(job.folder)]
    for root in {job.folder.parent.parent for job in pending}:
        done = files.done_below(root)
        for job in pending:
            source = done.get(job.request.hash)
            if source is not None and job.folder.parent.parent == root:
                lifecycle.take_over(source, job.folder)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let a sweep that is told to end (by Slurm, by a supervisor) end its runs first."""

    def stop(*_: Any) -> None:
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quoted(text: str) -> str:
    """A value in Hydra's grammar, whatever characters are in it."""
    if re.fullmatch(r"[\w./+-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
