"""Train one network, or sweep over many settings; or make a study instead.

    python src/train.py method=bfp lr=0.05
    python src/train.py -m method=bfp,sgd lr=0.1,0.05,0.01
    python src/train.py -m method=bfp,sgd lr=1 study=one_step

`conf/train.yaml` lists what can be set.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig

from backforward_suite import arguments, cli, processes
from backforward_suite.errors import BadInput
from backforward_suite.run import run
from backforward_suite.runs import files, lifecycle, names

CONF = Path(__file__).resolve().parents[3] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train in the run's folder, unless that run is done; return its accuracy on the validation set."""
    with cli.past_hydra():
        _refuse_shared_process(cfg)
        request = names.request_of(cfg)
        processes.settle_rank(request.settings.trainer.devices)
        folder = Path(HydraConfig.get().runtime.output_dir)
        result = lifecycle.finished_result(folder, request)
        if result is not None:
            files.check_complete(folder, result)
            finished = str(result.get("timing", {}).get("finished_at", "an unknown date")).replace("T", " ")
            print(f"skipped, finished on {finished.removesuffix('+00:00')} UTC", flush=True)
        else:
            with lifecycle.claimed(folder, request) as record:
                # Again, now that nobody else can be at it: another sweep may have been quicker.
                result = lifecycle.finished_result(folder, request) or record(run(request, folder))
        if processes.rank(cfg.trainer.devices) == 0:
            cli.show(result, folder)
            cli.hint_at_sweep()
        return files.objective(result)


def _refuse_shared_process(cfg: DictConfig) -> None:
    """In a process that has trained before, Lightning takes what that left for its own: half of the data, silently."""
    if cfg.trainer.devices > 1 and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise BadInput(
            f"trainer.devices={cfg.trainer.devices} in a sweep needs a launcher that gives each run processes of its "
            "own: hydra/launcher=pool, slurm or ray"
        )


def command() -> int:
    """The command line; returns its exit code."""
    processes.end_with_parent()
    names.register_resolvers()
    _sweep_by_grids()
    return cli.run(_main, CONF)


def _sweep_by_grids() -> None:
    """Let grids be the sweeper of those who choose none, here alone.

    Hydra's own composes each run twice, and refuses keys that only some of the choices of a swept group have. An entry
    of `conf/train.yaml` would win over an experiment that chooses a sweeper.
    """
    Plugins.instance()  # registers Hydra's own
    grids = {"_target_": "hydra_plugins.backforward.GridsSweeper", "params": {}, "grids": []}
    ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=grids)


def _main() -> None:
    given = sys.argv[1:]
    if arguments.wants_help(given):
        print(arguments.manual(given, CONF))
        return
    sys.argv[1:] = arguments.checked(given, CONF)
    main()
