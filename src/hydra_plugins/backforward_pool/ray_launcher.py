"""`hydra/launcher=ray`: one Ray task a run. Its settings: conf/hydra/launcher/ray.yaml."""

# No `from __future__ import annotations`: see launcher.py.

from pathlib import Path
from typing import Any

from backforward.errors import BadInput
from hydra_plugins.backforward_pool import _remote
from hydra_plugins.backforward_pool._jobs import Job, Outcome, Sweep, outcome_of
from hydra_plugins.backforward_pool._launcher import JobLauncher, Watch, imported

GRACE = 30.0  # seconds to write checkpoints in, once the sweep is told to end


class RayLauncher(JobLauncher):
    """Gives each run to a Ray cluster as a task, waits for all of them, and shows what became of each.

    Args:
        init: Arguments of `ray.init`. `address`: of a cluster; null starts one on this machine alone.
        remote: Options of the task, for each device of a run: `num_gpus`, `num_cpus`, `max_retries`, ...
    """

    def __init__(self, init: dict[str, Any], remote: dict[str, Any]) -> None:
        super().__init__()
        self.init, self.remote = dict(init), dict(remote)

    def work(self, sweep: Sweep, jobs: list[Job]) -> None:
        """Run jobs as tasks.

        Raises:
            BadInput: Ray is not here, or no cluster answers.
        """
        ray = imported("ray", "ray")
        ray.cloudpickle.register_pickle_by_value(_remote)  # workers need not find this package before they start
        try:
            ray.init(**self.init)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BadInput(f"hydra.launcher.init: {str(error).splitlines()[0]}") from error
        waiting: dict[Any, Watch] = {}
        try:
            for job in jobs:
                devices = job.cfg.trainer.devices
                options = {
                    key: value * devices if key in ("num_gpus", "num_cpus") else value
                    for key, value in self.remote.items()
                }
                task = ray.remote(**options)(_run)
                waiting[task.remote(*_arguments(job))] = Watch(job, sweep)
            while waiting:
                ended, _ = ray.wait(list(waiting), timeout=1)
                for watch in waiting.values():
                    watch.look()
                for one in ended:
                    watch = waiting.pop(one)
                    try:
                        sweep.ended(watch.job, outcome_of(watch.job, ray.get(one), watch.seconds))
                    except ray.exceptions.RayError as error:
                        cause = f"Ray: {str(error).splitlines()[0]}"
                        sweep.ended(watch.job, Outcome(cause=cause, seconds=watch.seconds))
        except BaseException:
            for one in waiting:
                ray.cancel(one)
            ray.wait(list(waiting), num_returns=len(waiting), timeout=GRACE)
            raise
        finally:
            ray.shutdown()


def _run(script: str, arguments: tuple[str, ...], log: str, cwd: str) -> int:
    return _remote.RemoteRun()(script, arguments, log, cwd)


def _arguments(job: Job) -> tuple[str, tuple[str, ...], str, str]:
    return str(job.script), job.arguments, str(job.log.absolute()), str(Path.cwd())
