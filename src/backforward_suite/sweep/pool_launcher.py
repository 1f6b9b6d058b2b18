"""`hydra/launcher=pool`: one process a run, on this machine. Its settings: conf/hydra/launcher/pool.yaml."""

from __future__ import annotations

from backforward_suite.errors import BadInput
from backforward_suite.sweep.jobs import Job
from backforward_suite.sweep.launcher import JobLauncher
from backforward_suite.sweep.pool import Pool
from backforward_suite.sweep.sweep import Sweep


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
        Pool(self.slots).run(sweep, jobs)
