"""`hydra/launcher=stacked`: runs that differ in seed and learning rate alone, trained as one network."""

# No `from __future__ import annotations`: see launcher.py.

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from backforward.errors import BadInput
from hydra_plugins.backforward_pool._jobs import Job, Sweep
from hydra_plugins.backforward_pool._pool import Pool
from hydra_plugins.backforward_pool._stacks import cut_off, loads_of
from hydra_plugins.backforward_pool.launcher import PoolConf, PoolLauncher


@dataclass
class StackedConf(PoolConf):
    """Settings of `hydra/launcher=stacked`."""

    _target_: str = "hydra_plugins.backforward_pool.stacked_launcher.StackedLauncher"
    size: int = 32  # runs in a stack at most


ConfigStore.instance().store(group="hydra/launcher", name="stacked", node=StackedConf, provider="backforward")


class StackedLauncher(PoolLauncher):
    """Runs jobs on this machine, many in a process; those that cannot be stacked one by one, as the pool does.

    Args:
        slots: Processes at a time; None: one a GPU, else one a core.
        size: Runs in a stack at most.
    """

    def __init__(self, slots: int | None = None, size: int = 32) -> None:
        super().__init__(slots)
        if size < 1:
            raise BadInput(f"hydra.launcher.size={size}: give 1 or more")
        self.size = size

    def work(self, sweep: Sweep, jobs: list[Job]) -> None:
        """Do jobs."""
        pool = Pool(self.slots)
        roots = {job.folder.parent for job in jobs}
        loads, alone = loads_of(jobs, self.size, pool.count(jobs)[0], cut_off(roots, sweep.view.note))
        for reason, count in alone.items():
            sweep.view.note(f"{count} run{'s' if count > 1 else ''} not stacked: {reason}")
        pool.run(sweep, loads)
        cut_off(roots, sweep.view.note)  # to delete the checkpoints that have served
