"""What Hydra has to find of Backforward: three launchers and a sweeper, each a name for a class of the suite.

Hydra imports this file in every application of the environment, so it imports nothing but Hydra: the suite comes in
when one of these is chosen.
"""

# No `from __future__ import annotations`: Hydra executes this file without entering it in sys.modules.

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


def _made(path: str, settings: dict[str, Any]) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"backforward_suite.sweep.{module}"), name)(**settings)


class _SuiteLauncher(Launcher):
    """Stands for a launcher of the suite."""

    path = ""

    def __init__(self, **settings: Any) -> None:
        self.launcher: Launcher = _made(self.path, settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See `Launcher`."""
        self.launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """See `Launcher`."""
        return self.launcher.launch(job_overrides, initial_job_idx)


class PoolLauncher(_SuiteLauncher):
    """`hydra/launcher=pool`."""

    path = "pool.PoolLauncher"


class SlurmLauncher(_SuiteLauncher):
    """`hydra/launcher=slurm`."""

    path = "slurm.SlurmLauncher"


class RayLauncher(_SuiteLauncher):
    """`hydra/launcher=ray`."""

    path = "ray.RayLauncher"


class GridsSweeper(Sweeper):
    """`hydra/sweeper=grids`."""

    def __init__(self, **settings: Any) -> None:
        self.sweeper: Sweeper = _made("grids.GridsSweeper", settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See `Sweeper`."""
        self.sweeper.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """See `Sweeper`."""
        return self.sweeper.sweep(arguments)
