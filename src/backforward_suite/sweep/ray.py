"""`hydra/launcher=ray`: one Ray task a run. Its settings: conf/hydra/launcher/ray.yaml."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from backforward_suite.errors import BadInput
from backforward_suite.sweep import remote as run_elsewhere
from backforward_suite.sweep.jobs import Job
from backforward_suite.sweep.scheduler import SchedulerLauncher, call_of, imported

GRACE = 30.0  # seconds to write checkpoints in, once the sweep is told to end


class RayLauncher(SchedulerLauncher):
    """Gives each run to a Ray cluster as a task.

    Args:
        init: Arguments of `ray.init`. `address`: of a cluster; null starts one on this machine alone.
        remote: Options of the task, for each device of a run: `num_gpus`, `num_cpus`, `max_retries`, ...
    """

    def __init__(self, init: dict[str, Any], remote: dict[str, Any]) -> None:
        super().__init__()
        self.init, self.remote = init, remote

    @contextmanager
    def cluster(self) -> Iterator[None]:
        """Be a driver of the cluster.

        Raises:
            BadInput: Ray is not here, or no cluster answers.
        """
        self.ray = imported("ray", "ray")
        self.ray.cloudpickle.register_pickle_by_value(
            run_elsewhere
        )  # workers need not find this package before they start
        try:
            self.ray.init(**self.init)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BadInput(f"hydra.launcher.init: {str(error).splitlines()[0]}") from error
        try:
            yield
        finally:
            self.ray.shutdown()

    def submit(self, jobs: list[Job], submitted: dict[Any, Job]) -> None:
        """Make each a task.

        Raises:
            BadInput: An option is none of Ray's.
        """
        try:
            for job in jobs:
                submitted[self._task(job.request.settings.trainer.devices).remote(*call_of(job))] = job
        except (TypeError, ValueError) as error:
            raise BadInput(f"hydra.launcher.remote: {str(error).splitlines()[0]}") from error

    def _task(self, devices: int) -> Any:
        options = {
            key: value * devices if key in ("num_gpus", "num_cpus") else value for key, value in self.remote.items()
        }
        return self.ray.remote(**options)(run_elsewhere.run)

    def ended(self, submitted: Mapping[Any, Job]) -> dict[Any, int | str]:
        """Ask for results that are there."""
        there, _ = self.ray.wait(list(submitted), num_returns=len(submitted), timeout=0)
        return {task: self._end(task) for task in there}

    def _end(self, task: Any) -> int | str:
        try:
            code: int = self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            return f"Ray: {str(error).splitlines()[0]}"
        return code

    def cancel(self, submitted: Sequence[Any]) -> None:
        """Interrupt the tasks, and wait for their checkpoints: Ray ends the workers when this process leaves."""
        for task in submitted:
            self.ray.cancel(task)
        self.ray.wait(list(submitted), num_returns=len(submitted), timeout=GRACE)
