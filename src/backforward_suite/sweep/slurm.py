"""`hydra/launcher=slurm`: one Slurm job per run. See conf/hydra/launcher/slurm.yaml."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

from backforward_suite.errors import BadInput
from backforward_suite.runs import files
from backforward_suite.sweep.jobs import Job
from backforward_suite.sweep.remote import RemoteRun
from backforward_suite.sweep.scheduler import SchedulerLauncher, call_of, imported

GRACE = 10.0  # seconds for the result of a job that has left the queue to appear on a shared file system


class SlurmLauncher(SchedulerLauncher):
    """Submits each run as a Slurm job; a run on n devices is a job of n tasks on one node.

    Args:
        timeout_min: Slurm's time limit for a job; a run that reaches it is submitted again and resumes.
        max_num_timeout: How many times.
        gpus_per_device: GPUs for each device of a run; 0 on a cluster without GPUs.
        cpus_per_task: Cores for each device of a run.
        array_parallelism: Jobs at a time.
        poll_seconds: Time between checks of the queue.
        parameters: Further parameters of `submitit`, such as `slurm_partition`.

    Raises:
        BadInput: A number is out of range.
    """

    def __init__(
        self,
        timeout_min: int,
        max_num_timeout: int,
        gpus_per_device: int,
        cpus_per_task: int,
        array_parallelism: int,
        poll_seconds: float,
        parameters: dict[str, Any],
    ) -> None:
        super().__init__()
        _check("timeout_min", timeout_min, 1)
        _check("max_num_timeout", max_num_timeout, 0)
        _check("gpus_per_device", gpus_per_device, 0)
        _check("cpus_per_task", cpus_per_task, 1)
        _check("array_parallelism", array_parallelism, 1)
        if not isinstance(poll_seconds, int | float) or poll_seconds <= 0:
            raise BadInput(f"hydra.launcher.poll_seconds={poll_seconds}: must be a number > 0")
        self.max_num_timeout = max_num_timeout
        self.gpus_per_device = gpus_per_device
        self.poll_seconds = poll_seconds
        self._gone: dict[Any, float] = {}  # when a job was first seen to have left the queue
        self.parameters = {
            "timeout_min": timeout_min,
            "cpus_per_task": cpus_per_task,
            "nodes": 1,
            "slurm_array_parallelism": array_parallelism,
            **parameters,
        }

    @contextmanager
    def cluster(self) -> Iterator[None]:
        """Raise BadInput if submitit or Slurm is missing; there is nothing to keep open."""
        imported("submitit", "slurm")
        if shutil.which("sbatch") is None:
            raise BadInput("hydra/launcher=slurm: no sbatch found; log in to the cluster, or give hydra/launcher=pool")
        yield

    def submit(self, jobs: list[Job], submitted: dict[Any, Job]) -> None:
        """Submit an array of jobs for each number of devices.

        Raises:
            BadInput: submitit does not know a parameter, or Slurm refuses the jobs.
        """
        submitit = imported("submitit", "slurm")
        by_devices: dict[int, list[Job]] = defaultdict(list)
        for job in jobs:
            by_devices[job.request.settings.trainer.devices].append(job)
        for devices, group in by_devices.items():
            executor = submitit.AutoExecutor(
                folder=group[0].folder.parent.absolute() / ".submitit" / "%j",
                cluster="slurm",
                slurm_max_num_timeout=self.max_num_timeout,
            )
            gpus = {"gpus_per_node": devices * self.gpus_per_device} if self.gpus_per_device else {}
            try:
                executor.update_parameters(name="backforward", **{**self.parameters, **gpus, "tasks_per_node": devices})
                with redirect_stderr(StringIO()), executor.batch():  # submitit prints what it raises
                    handed_over = [executor.submit(RemoteRun(), *call_of(job)) for job in group]
            except (TypeError, ValueError, NameError, submitit.core.utils.FailedJobError) as error:
                raise BadInput(f"hydra.launcher: {error}") from error
            submitted |= zip(handed_over, group, strict=True)

    def ended(self, submitted: Mapping[Any, Job]) -> dict[Any, int | str]:
        """Find the jobs that left a return value, and those that left the queue without one."""
        ends: dict[Any, int | str] = {}
        queue = _queue([at_slurm.job_id for at_slurm in submitted])
        for at_slurm, job in submitted.items():
            end = _end(at_slurm)
            if end == 0:
                ends[at_slurm] = end
            elif at_slurm.job_id in queue:  # perhaps requeued after a failed start
                self._gone.pop(at_slurm, None)
            elif end is not None:
                ends[at_slurm] = end
            elif time.monotonic() - self._gone.setdefault(at_slurm, time.monotonic()) > GRACE:
                ends[at_slurm] = _fate(at_slurm.job_id, job)
        return ends

    def cancel(self, submitted: Sequence[Any]) -> None:
        """Cancel the jobs; Slurm sends SIGTERM first, so each writes a checkpoint."""
        for at_slurm in submitted:
            at_slurm.cancel()


def _check(key: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise BadInput(f"hydra.launcher.{key}={value}: must be an integer >= {least}")


def _end(at_slurm: Any) -> int | str | None:
    """What the first task of a job, which writes the run's result, returned or raised; None if it has not yet."""
    first = at_slurm if at_slurm.num_tasks == 1 else at_slurm.task(0)
    if not first.paths.result_pickle.exists():
        return None
    kind, value = first._get_outcome_and_result()
    if kind == "success":
        code: int = value
        return code
    return f"Slurm job {at_slurm.job_id}: {value.strip().splitlines()[-1]}"


def _queue(ids: list[str]) -> set[str]:
    """The jobs that wait or run, by the controller: not every cluster has accounting (`sacct`)."""
    asked = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i", "--me"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
    )
    return set(asked.stdout.split()) if asked.returncode == 0 else set(ids)  # no answer: assume that nothing changed


def _fate(job_id: str, job: Job) -> str:
    """The controller's account of a job that returned nothing, and the last line of its run's log."""
    shown = subprocess.run(  # noqa: S603
        ["scontrol", "--oneliner", "show", "job", job_id],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    state = fields.get("JobState", "gone")
    last = "".join(f"; {line}" for line in files.last_lines(job.log, 1))
    return f"Slurm job {job_id}: {state}, exit code {fields.get('ExitCode', 'unknown')}{last}"
