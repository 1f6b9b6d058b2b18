"""Train one network, or sweep over many settings; or conduct a study instead.

    python src/train.py method=bfp lr=0.05
    python src/train.py -m method=bfp,sgd lr=0.1,0.05,0.01
    python src/train.py -m method=bfp,sgd lr=1 study=one_step

`conf/train.yaml` lists the settings.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig

from backforward_suite import arguments, cli, processes
from backforward_suite.config import Request, differing
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
            _offer_going_on(folder, request)
            with lifecycle.claimed(folder, request) as record:
                # Again, now that this process alone has the folder: another sweep may have finished the run.
                result = lifecycle.finished_result(folder, request) or record(run(request, folder))
        if processes.rank(cfg.trainer.devices) == 0:
            cli.show(result, folder)
            cli.hint_at_sweep()
        return files.objective(result)


def _offer_going_on(folder: Path, request: Request) -> None:
    """Before a run starts, name a finished run of fewer epochs, with the same settings, from which it could go on."""
    settings, values = request.settings, request.values
    if settings.go_on_from or settings.why_not_go_on() or (folder / "last.ckpt").exists():
        return
    shorter: list[tuple[int, str]] = []
    for other in (path.parent for path in folder.parent.glob("*/last.ckpt")):
        with suppress(BadInput):  # a damaged result is no concern of this run
            result = files.read_result(other) or {"status": None}
            there = result.get("settings", {})
            epochs = there.get("max_epochs", settings.max_epochs)
            same = not differing({**values, "max_epochs": epochs}, there)
            if result["status"] == "finished" and same and epochs < settings.max_epochs:
                shorter.append((epochs, os.path.relpath(other)))
    if shorter:
        epochs, there = max(shorter)
        print(f"{there} has trained the first {epochs}: go_on_from={there} trains the other epochs alone", flush=True)


def _refuse_shared_process(cfg: DictConfig) -> None:
    """In a process that has trained before, Lightning reuses what that run left and trains on half of the data."""
    if cfg.trainer.devices > 1 and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise BadInput(
            f"trainer.devices={cfg.trainer.devices} in a sweep needs a launcher that gives each run processes of its "
            "own: hydra/launcher=pool, slurm or ray"
        )


def command() -> int:
    """Run the command line; return its exit code."""
    processes.end_with_parent()
    names.register_resolvers()
    _sweep_by_grids()
    return cli.run(_main, CONF)


def _sweep_by_grids() -> None:
    """Make `grids` the default sweeper of this command.

    Hydra's own sweeper composes each run twice, and refuses keys that only some choices of a swept group have. A
    default in `conf/train.yaml` would override an experiment that chooses a sweeper.
    """
    Plugins.instance()  # registers Hydra's own first
    grids = {"_target_": "hydra_plugins.backforward.GridsSweeper", "params": {}, "grids": []}
    ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=grids)


def _main() -> None:
    given = sys.argv[1:]
    if arguments.wants_help(given):
        print(arguments.manual(given, CONF))
        return
    sys.argv[1:] = arguments.checked(given, CONF)
    main()
