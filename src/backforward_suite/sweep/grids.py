"""`hydra/sweeper=grids`: the settings of one or several grids as one sweep."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from backforward_suite.errors import BadInput

Grid = Mapping[str, Any]


class GridsSweeper(Sweeper):
    """Launches the product of the keys of each grid.

    A key on the command line replaces that key in every grid; runs that become equal are merged.

    Args:
        params: Keys of every grid, with values as on the command line (`0.1,0.01`).
        grids: Further keys of each grid; they override those of `params`.
    """

    def __init__(self, params: Grid | None = None, grids: Sequence[Grid] | None = None) -> None:
        self.shared = dict(params or {})
        self.grids = [dict(grid) for grid in grids or [{}]]
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep Hydra's context; make the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch all runs.

        Args:
            arguments: Overrides from the command line.

        Returns:
            The launcher's return values.

        Raises:
            BadInput: A sweep is not over a list of values, or the launcher refuses it.
        """
        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs = products(self.shared, self.grids, arguments, parser)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        returned = self.launcher.launch(jobs, initial_job_idx=0)
        for job_return in returned:
            _ = job_return.return_value  # raises if the run failed
        return [returned]


def products(shared: Grid, grids: Sequence[Grid], arguments: Sequence[str], parser: OverridesParser) -> list[list[str]]:
    """The overrides of each run of the grids; the arguments are those of `GridsSweeper`.

    Raises:
        BadInput: A sweep is not over a list of values.
    """
    jobs: dict[frozenset[str], list[str]] = {}
    for grid in grids or [{}]:
        given = [f"{key}={value}" for key, value in {**grid, **shared, **grid}.items()]
        for job in _product(parser.parse_overrides([*given, *arguments])):
            jobs.setdefault(frozenset(job), job)
    return list(jobs.values())


def _product(overrides: list[Override]) -> list[list[str]]:
    values: dict[str, list[str]] = {}  # by key; a later override of a key replaces an earlier one
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            kind = override.value_type.name.lower().removesuffix("_sweep") if override.value_type else "that"
            raise BadInput(
                f"{override.input_line}: {kind} has no list of values; list them, or give hydra/sweeper=optuna"
            )
    return [list(job) for job in itertools.product(*values.values())]
