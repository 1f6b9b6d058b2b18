"""`hydra/launcher=slurm`: one Slurm job a run. Its settings: conf/hydra/launcher/slurm.yaml."""

# No `from __future__ import annotations`: see launcher.py.

import os
import shutil
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from backforward import runs
from backforward.errors import BadInput
from hydra_plugins.backforward_pool._jobs import Job, Outcome, Sweep, outcome_of
from hydra_plugins.backforward_pool._launcher import JobLauncher, Watch, imported
from hydra_plugins.backforward_pool._remote import RemoteRun

GRACE = 10.0  # seconds until the result of a job that has left the queue is seen on a shared file system


class SlurmLauncher(JobLauncher):
    """Submits each run as a Slurm job, waits for all of them, and shows what became of each.

    A run on n devices is a job of n tasks on one node.

    Args:
        timeout_min: Slurm's time limit for a job; a run that reaches it is submitted again and goes on.
        max_num_timeout: How many times.
        gpus_per_device: GPUs that a device of a run is given; 0 on a cluster without.
        cpus_per_task: Cores that a device of a run is given.
        array_parallelism: Jobs at a time.
        poll_seconds: Time between two looks at the queue.
        parameters: What else to give to `submitit`, such as `slurm_partition`.
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
        self.max_num_timeout = max_num_timeout
        self.gpus_per_device = gpus_per_device
        self.poll_seconds = poll_seconds
        self.parameters = {
            "timeout_min": timeout_min,
            "cpus_per_task": cpus_per_task,
            "nodes": 1,
            "slurm_array_parallelism": array_parallelism,
            **parameters,
        }

    def work(self, sweep: Sweep, jobs: list[Job]) -> None:
        """Submit jobs and wait for them.

        Raises:
            BadInput: submitit or Slurm is not here.
        """
        submitit = imported("submitit", "slurm")
        if shutil.which("sbatch") is None:
            raise BadInput("hydra/launcher=slurm: there is no sbatch here; log in to the cluster, or use pool")
        by_devices: dict[int, list[Job]] = defaultdict(list)
        for job in jobs:
            by_devices[job.cfg.trainer.devices].append(job)
        waiting: list[tuple[Watch, Any]] = []
        try:
            for devices, group in by_devices.items():
                executor = submitit.AutoExecutor(
                    folder=group[0].folder.parent.absolute() / ".submitit" / "%j",
                    cluster="slurm",
                    slurm_max_num_timeout=self.max_num_timeout,
                )
                gpus = {"gpus_per_node": devices * self.gpus_per_device} if self.gpus_per_device else {}
                executor.update_parameters(name="backforward", **{**self.parameters, **gpus, "tasks_per_node": devices})
                with executor.batch():
                    submitted = [executor.submit(RemoteRun(), *_arguments(job)) for job in group]
                waiting += [(Watch(job, sweep), at_slurm) for job, at_slurm in zip(group, submitted, strict=True)]
            self._wait(sweep, waiting)
        except BaseException:
            for _, at_slurm in waiting:
                at_slurm.cancel()  # SIGTERM first: each keeps a checkpoint
            raise

    def _wait(self, sweep: Sweep, waiting: list[tuple[Watch, Any]]) -> None:
        gone: dict[str, float] = {}  # when a job was first seen to have left the queue
        while waiting:
            queue = _queue([at_slurm.job_id for _, at_slurm in waiting])
            for entry in list(waiting):
                watch, at_slurm = entry
                watch.look()
                codes = _exit_codes(at_slurm)
                if codes is None and at_slurm.job_id not in queue:
                    since = gone.setdefault(at_slurm.job_id, time.monotonic())
                    if time.monotonic() - since < GRACE:
                        continue
                    sweep.ended(watch.job, Outcome(cause=_fate(at_slurm.job_id, watch.job), seconds=watch.seconds))
                elif codes is not None:
                    code = next((code for code in codes if code != 0), 0)
                    sweep.ended(watch.job, outcome_of(watch.job, code, watch.seconds))
                else:
                    continue
                waiting.remove(entry)
            if waiting:
                time.sleep(self.poll_seconds)


def _arguments(job: Job) -> tuple[str, tuple[str, ...], str, str]:
    return str(job.script), job.arguments, str(job.log.absolute()), str(Path.cwd())


def _exit_codes(at_slurm: Any) -> list[int] | None:
    """What the tasks of a job returned; None while one of them has not."""
    count = at_slurm.num_tasks
    tasks = [at_slurm] if count == 1 else [at_slurm.task(n) for n in range(count)]
    if not all(task.paths.result_pickle.exists() for task in tasks):
        return None
    codes = []
    for task in tasks:
        kind, value = task._get_outcome_and_result()
        codes.append(value if kind == "success" else 1)
    return codes


def _queue(ids: list[str]) -> set[str]:
    """Those of the jobs that wait or run. Asked of the controller: accounting (`sacct`) is not everywhere."""
    asked = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i", "--me"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
    )
    return set(asked.stdout.split()) if asked.returncode == 0 else set(ids)  # no answer is no news


def _fate(job_id: str, job: Job) -> str:
    """What the controller remembers of a job whose worker ended without a word, and what its run said last."""
    shown = subprocess.run(  # noqa: S603
        ["scontrol", "--oneliner", "show", "job", job_id],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    state = fields.get("JobState", "gone")
    said = "".join(f"; {line}" for line in runs.last_lines(job.log, 1))
    return f"Slurm job {job_id}: {state}, exit code {fields.get('ExitCode', 'unknown')}{said}"
