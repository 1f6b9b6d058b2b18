"""`hydra/launcher=ray`: one Ray task per run. See conf/hydra/launcher/ray.yaml."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from backforward_suite.errors import BadInput
from backforward_suite.sweep import remote as run_elsewhere
from backforward_suite.sweep.jobs import Job
from backforward_suite.sweep.scheduler import SchedulerLauncher, call_of, imported

GRACE = 30.0  # seconds to write checkpoints before an interrupted sweep ends


class RayLauncher(SchedulerLauncher):
    """Runs each job as a task of a Ray cluster.

    Args:
        init: Arguments of `ray.init`; `address=None` starts a cluster on this machine alone.
        remote: Options of the task; `num_gpus` and `num_cpus` are for each device of a run.
    """

    def __init__(self, init: dict[str, Any], remote: dict[str, Any]) -> None:
        super().__init__()
        self.init, self.remote = init, remote

    @contextmanager
    def cluster(self) -> Iterator[None]:
        """Connect as a driver.

        Raises:
            BadInput: Ray is not installed, or no cluster answers.
        """
        self.ray = imported("ray", "ray")
        self.ray.cloudpickle.register_pickle_by_value(run_elsewhere)  # so that workers need not find this package
        try:
            self.ray.init(**self.init)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BadInput(f"hydra.launcher.init: {str(error).splitlines()[0]}") from error
        try:
            yield
        finally:
            self.ray.shutdown()

    def submit(self, jobs: list[Job], submitted: dict[Any, Job]) -> None:
        """Start a task for each job.

        Raises:
            BadInput: Ray does not know an option.
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
        """Get the results that are ready."""
        there, _ = self.ray.wait(list(submitted), num_returns=len(submitted), timeout=0)
        return {task: self._end(task) for task in there}

    def _end(self, task: Any) -> int | str:
        try:
            code: int = self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            return f"Ray: {str(error).splitlines()[0]}"
        return code

    def cancel(self, submitted: Sequence[Any]) -> None:
        """Interrupt the tasks and wait for their checkpoints, as Ray kills the workers when this process ends."""
        for task in submitted:
            self.ray.cancel(task)
        self.ray.wait(list(submitted), num_returns=len(submitted), timeout=GRACE)
