"""The plugins that Hydra finds: three launchers and a sweeper, each a thin name for a class of the suite.

Every Hydra application in the environment imports this file, so it imports only Hydra; the suite is imported when a
plugin is chosen.
"""

# No `from __future__ import annotations`: Hydra executes this file without adding it to sys.modules.

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _Delegate:
    """Passes on to a plugin of the suite."""

    path = ""  # in `backforward_suite.sweep`

    def __init__(self, **settings: Any) -> None:
        module, _, name = self.path.rpartition(".")
        self.plugin: Any = getattr(import_module(f"backforward_suite.sweep.{module}"), name)(**settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See `Launcher` and `Sweeper`."""
        self.plugin.setup(hydra_context=hydra_context, task_function=task_function, config=config)


class _Launcher(_Delegate, Launcher):
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """See `Launcher`."""
        returned: Sequence[JobReturn] = self.plugin.launch(job_overrides, initial_job_idx)
        return returned


class PoolLauncher(_Launcher):
    """`hydra/launcher=pool`."""

    path = "pool.PoolLauncher"


class SlurmLauncher(_Launcher):
    """`hydra/launcher=slurm`."""

    path = "slurm.SlurmLauncher"


class RayLauncher(_Launcher):
    """`hydra/launcher=ray`."""

    path = "ray.RayLauncher"


class GridsSweeper(_Delegate, Sweeper):
    """`hydra/sweeper=grids`."""

    path = "grids.GridsSweeper"

    def sweep(self, arguments: list[str]) -> Any:
        """See `Sweeper`."""
        return self.plugin.sweep(arguments)
