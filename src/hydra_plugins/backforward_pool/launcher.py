"""`hydra/launcher=pool`: one process a run, on this machine."""

# No `from __future__ import annotations`: Hydra executes this file without entering it in sys.modules, where a
# dataclass would look up annotations that are text.

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from backforward.errors import BadInput
from hydra_plugins.backforward_pool._jobs import Job, Sweep
from hydra_plugins.backforward_pool._launcher import JobLauncher
from hydra_plugins.backforward_pool._pool import Load, Pool


@dataclass
class PoolConf:
    """Settings of `hydra/launcher=pool`."""

    _target_: str = "hydra_plugins.backforward_pool.launcher.PoolLauncher"
    slots: int | None = None  # runs at a time; null: as many as there are GPUs, else cores


ConfigStore.instance().store(group="hydra/launcher", name="pool", node=PoolConf, provider="backforward")


class PoolLauncher(JobLauncher):
    """Runs jobs on this machine, a few at a time.

    Args:
        slots: Runs at a time; None: one a GPU, else one a core.
    """

    def __init__(self, slots: int | None = None) -> None:
        super().__init__()
        if slots is not None and slots < 1:
            raise BadInput(f"hydra.launcher.slots={slots}: give 1 or more, or null for one a GPU, else one a core")
        self.slots = slots

    def get_ready(self, job: Job) -> None:
        """Start the process that runs are forked from: it takes as long to import all as Hydra to compose 40 runs."""
        Pool(self.slots).get_ready(job)

    def work(self, sweep: Sweep, jobs: list[Job]) -> None:
        """Do jobs."""
        Pool(self.slots).run(sweep, [Load((job,)) for job in jobs])
