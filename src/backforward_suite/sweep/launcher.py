"""Hydra's side of all launchers: from overrides to jobs, and from outcomes to what sweepers read."""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
import threading
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import ConfigCompositionException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.progress import track

from backforward_suite.cli import RunsFailed, refusing
from backforward_suite.config import Request, differing
from backforward_suite.datafiles import is_lacking
from backforward_suite.errors import BadInput, Stopped
from backforward_suite.runs import files, lifecycle
from backforward_suite.sweep.jobs import Job, Outcome
from backforward_suite.sweep.sweep import Sweep


class JobLauncher(Launcher):
    """Runs each job in its own process, as `python src/train.py <overrides>` would."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    @abstractmethod
    def work(self, sweep: Sweep, jobs: list[Job]) -> None:
        """Do jobs, calling `sweep.started` and `sweep.ended` for each."""

    def get_ready(self, job: Job) -> None:
        """Warm up workers for the first job while the remaining jobs are composed."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep Hydra's context. Jobs are processes, so the task function is not called."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs that are not done yet; print a summary.

        Returns:
            One for each job, in order. Reading the value of a failed one raises `RunsFailed`.

        Raises:
            BadInput: There is no job, or a setting is out of range. No job is started then.
        """
        if not job_overrides:
            raise BadInput("this sweep has no runs: one of its keys has no values")
        console = Console(stderr=True)
        jobs: list[Job] = []
        unreached: dict[str, list[Job]] = defaultdict(list)
        swept = self._swept_groups(job_overrides)
        ready = False
        # Hydra needs a tenth of a second for each run.
        numbered = list(enumerate(job_overrides, initial_job_idx))
        for number, overrides in track(
            numbered, "Composing settings", console=console, transient=True, disable=not console.is_terminal
        ):
            job, left_out = self._job(list(overrides), number, swept)
            jobs.append(job)
            for override in left_out:
                unreached[override].append(job)
            if not ready and not files.is_done(job.folder):
                self.get_ready(job)
                ready = True
        notes = [_left_out(override, runs, jobs) for override, runs in unreached.items()]
        _refuse_shared_folders(jobs)
        _write_plans(jobs)
        _share(jobs)
        sweep = Sweep(jobs)
        for note in notes:
            sweep.view.note(note)
        with _sigterm_raises():
            outcomes = sweep.run(lambda pending: self._work(sweep, pending))
        failure = RunsFailed(_failure(list(outcomes.values())))
        return [self._returned(job, outcomes[job.folder], failure) for job in jobs]

    def _work(self, sweep: Sweep, pending: list[Job]) -> None:
        """Download missing data once, before the runs do so all at a time; then do the jobs.

        Raises:
            BadInput: A download failed.
        """
        lacking = {(job.request.settings.data.name, Path(job.request.settings.data.root)) for job in pending}
        for name, root in sorted(lacking):
            if is_lacking(name, root):
                sweep.view.note(f"Downloading {name} to {root}, once for all runs")
                self.get_data(name, root)
        self.work(sweep, pending)

    def get_data(self, name: str, root: Path) -> None:
        """Download a data set; raise BadInput if that fails."""
        from backforward_suite.data.sources import read  # slow: it imports torch

        with refusing():
            read(name, root)

    def _swept_groups(self, job_overrides: Sequence[Sequence[str]]) -> set[str]:
        """The keys without a dot that have several values in these jobs or in the whole sweep."""
        assert self.config is not None
        values = defaultdict(set)
        for override in itertools.chain(*job_overrides):
            key, _, value = override.partition("=")
            values[key].add(value)
        asked = [*self.config.hydra.overrides.task]
        asked += [f"{key}={value}" for key, value in (self.config.hydra.sweeper.get("params") or {}).items()]
        for parsed in OverridesParser.create().parse_overrides(asked):
            if parsed.is_sweep_override():
                values[parsed.get_key_element()] |= {"one", "another"}
        return {key for key, found in values.items() if len(found) > 1 and "." not in key}

    def _composed(self, overrides: list[str], swept: set[str]) -> tuple[DictConfig, list[str]]:
        """Compose a run's settings; also return the overrides of keys that its choice of a swept group lacks."""
        assert self.config is not None
        assert self.hydra_context is not None
        left_out: list[str] = []
        while True:
            given = [override for override in overrides if override not in left_out]
            try:
                return self.hydra_context.config_loader.load_sweep_config(self.config, given), left_out
            except ConfigCompositionException as error:
                found = re.match(r"Could not override '(([^'.]+)\.[^']+)'", str(error))
                stray = [override for override in given if found and override.startswith(f"{found[1]}=")]
                if not found or not stray or found[2] not in swept:
                    raise
                left_out += stray

    def _job(self, overrides: list[str], number: int, swept: set[str]) -> tuple[Job, list[str]]:
        cfg, left_out = self._composed(overrides, swept)
        overrides = [override for override in overrides if override not in left_out]
        with open_dict(cfg):
            cfg.hydra.job.num = number
            cfg.hydra.job.id = str(number)
        folder = Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir
        job = Job(
            script=Path(sys.argv[0]).resolve(),
            arguments=(*self._where(cfg), *overrides, "hydra.mode=RUN", f"hydra.run.dir={_quoted(str(folder))}"),
            folder=folder,
            request=Request.of(cfg, cfg.hydra, here=False),  # `run_name` has checked this machine's devices
            overrides=tuple(overrides),
        )
        return job, left_out

    @staticmethod
    def _where(cfg: DictConfig) -> list[str]:
        """The options that let a child find the same configs."""
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
    """A `JobReturn` that raises without Hydra's own lines about the failure; the summary has named the cause."""

    @property
    def return_value(self) -> Any:
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def _left_out(override: str, runs: Sequence[Job], jobs: Sequence[Job]) -> str:
    """Say which runs an override does not reach; raise BadInput if it reaches none."""
    key, _, _ = override.partition("=")
    group = key.partition(".")[0]
    lacking = ", ".join(f"{group}={choice}" for choice in dict.fromkeys(job.request.choices[group] for job in runs))
    if len(runs) == len(jobs):
        raise BadInput(f"{key}: no such key with {lacking}")
    return f"{override} does not reach {len(runs)} of {len(jobs)} runs: no such key with {lacking}"


def _failure(outcomes: Sequence[Outcome]) -> str:
    """Say how many runs failed, and what to do."""
    failed = sum(not outcome.done for outcome in outcomes)
    refused = sum(outcome.refused for outcome in outcomes)
    if not refused:
        return f"{failed} of {len(outcomes)} runs failed; the same command runs them again"
    again = "" if failed == refused else f", {failed - refused} failed and are run again by the same command"
    return f"{refused} of {len(outcomes)} runs: their folders hold other runs; {lifecycle.KEEP_BOTH}{again}"


def _refuse_shared_folders(jobs: Sequence[Job]) -> None:
    """Raise BadInput if two jobs of different settings have the same folder."""
    first: dict[Path, Job] = {}
    for job in jobs:
        other = first.setdefault(Path(os.path.abspath(job.folder)), job)  # noqa: PTH100
        if keys := differing(job.request.values, other.request.values):
            raise BadInput(
                f"two runs of this sweep have the folder {job.folder}: {keys}; "
                "name what differs in hydra.sweep.subdir, or leave out that override"
            )


def _write_plans(jobs: Sequence[Job]) -> None:
    planned: dict[Path, dict[str, list[str]]] = defaultdict(dict)
    for job in jobs:
        planned[job.folder.parent][job.name] = list(job.overrides)
    for root, names in planned.items():
        lifecycle.add_to_plan(root, names)


def _share(jobs: Sequence[Job]) -> None:
    """Copy finished runs of equal settings from other experiments of the same scale."""
    done_below = cache(files.done_below)
    for job in jobs:
        if job.request.settings.scale is None or files.is_done(job.folder):
            continue
        source = done_below(job.folder.parent.parent).get(job.request.hash)
        if source is not None:
            with suppress(BadInput, OSError):  # the run itself will report what is wrong with its folder
                if lifecycle.finished_result(source, job.request) is not None:
                    lifecycle.take_over(source, job.folder)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM, so that the sweep ends its runs first."""

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
    """Quote a value for Hydra's grammar."""
    if re.fullmatch(r"[\w./+-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
