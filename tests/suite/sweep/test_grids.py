"""`hydra/sweeper=grids`: the runs of a sweep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from backforward_suite.errors import BadInput
from backforward_suite.sweep.grids import GridsSweeper


class Launched:
    """A launcher that only records its jobs."""

    jobs: list[list[str]]

    def launch(self, jobs: list[list[str]], initial_job_idx: int) -> list[Any]:
        self.jobs = jobs
        return []


def sweep(tmp_path: Any, *arguments: str, **grids: Any) -> list[list[str]]:
    sweeper = GridsSweeper(**grids)
    launcher = Launched()
    sweeper.launcher = launcher  # type: ignore[assignment]
    sweeper.hydra_context = SimpleNamespace(config_loader=None)  # type: ignore[assignment]
    sweeper.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    sweeper.sweep(list(arguments))
    return launcher.jobs


def test_the_product_of_each_grid_with_what_all_share(tmp_path: Any) -> None:
    grids = [{"method": "bfp,sgd", "lr": 0.1}, {"method": "sgd", "lr": 0.2, "seed": 7}]
    assert sweep(tmp_path, params={"seed": "range(2)"}, grids=grids) == [
        ["method=bfp", "lr=0.1", "seed=0"],
        ["method=bfp", "lr=0.1", "seed=1"],
        ["method=sgd", "lr=0.1", "seed=0"],
        ["method=sgd", "lr=0.1", "seed=1"],
        ["method=sgd", "lr=0.2", "seed=7"],
    ]


def test_the_command_line_replaces_a_key_in_every_grid(tmp_path: Any) -> None:
    grids = [{"method": "bfp,sgd", "lr": 0.1}, {"method": "sgd", "lr": 0.2}]
    jobs = sweep(tmp_path, "lr=0.5", "max_epochs=3", params={"seed": 0}, grids=grids)
    assert jobs == [[f"method={m}", "lr=0.5", "seed=0", "max_epochs=3"] for m in ("bfp", "sgd")]


def test_without_grids_it_is_the_plain_product(tmp_path: Any) -> None:
    assert len(sweep(tmp_path, "a=1,2", "b=x,y,z")) == 6


def test_a_sweep_without_a_list_of_values_is_refused(tmp_path: Any) -> None:
    with pytest.raises(BadInput, match="interval has no list of values"):
        sweep(tmp_path, "lr=interval(0,1)")
