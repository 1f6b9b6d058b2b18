"""Train one network, or sweep over many settings.

    python src/train.py method=bfp lr=0.05
    python src/train.py -m method=bfp,sgd lr=0.1,0.05,0.01

`conf/train.yaml` lists what can be set.
"""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from backforward import cli, processes, runs
from backforward.errors import BadInput
from backforward.settings import Settings, plain

CONF = Path(__file__).resolve().parent.parent / "conf"
REHEARSED = 2  # images of the step that is tried, and counted, before training


def train(cfg: DictConfig, folder: Path | None = None) -> runs.Result:
    """Train one network.

    Args:
        cfg: A config composed from `conf/train.yaml`.
        folder: Where curves and checkpoints go, and where a half-done run goes on; None writes nothing.

    Returns:
        What stands in `result.json`: status, final and best metrics, settings, origin, timing.

    Raises:
        BadInput: Something asked for cannot be had.
    """
    # Importing torch and Lightning takes seconds, which a skipped run or a mistyped key does without.
    from hydra.utils import instantiate
    from torch import nn

    import backforward._torchvision  # noqa: F401  (before Lightning, which imports torchvision)
    from backforward.data import load_data
    from backforward.fitting import fit
    from backforward.models import weight_decay_groups
    from backforward.normprop import DataNorm, unit_norm_projection
    from backforward.training import Classification, InMemoryData

    settings = Settings.check(cfg)
    with cli.refusing():
        data = load_data(
            settings.data.name,
            Path(settings.data.root),
            protocol=settings.data.protocol,
            size=settings.data.size,
            train_images=settings.data.train_images,
            evaluation_images=settings.data.evaluation_images,
        )
        model = instantiate(cfg.model, in_shape=data.shape, classes=data.classes, seed=settings.seed, _convert_="all")
        network = nn.Sequential(OrderedDict(data_norm=DataNorm.fit(settings.data_norm, data.train.x), model=model))
        schedule = {key: value for key, value in cfg.schedule.items() if key != "interval"}
        build_optimizer = instantiate(cfg.optimizer, _partial_=True, _convert_="all")
        build_rule = instantiate(cfg.method, _partial_=True, _convert_="all")
        module = Classification(
            network,
            make_optimizer=lambda network: build_optimizer(
                weight_decay_groups(network)
                if (settings.optimizer.model_extra or {}).get("weight_decay")
                else network.parameters()
            ),
            make_rule=lambda *args, **hooks: build_rule(*args, max_grad_norm=settings.max_grad_norm, **hooks),
            make_schedule=instantiate(schedule, _partial_=True, _convert_="all") if schedule["_target_"] else None,
            schedule_interval=settings.schedule.interval,
            after_update=unit_norm_projection(network) if settings.norm.kind == "prop" else None,
            check_every=settings.trainer.log_every_n_steps,
            seed=settings.seed,
        )
        few = data.train.x[:REHEARSED].float() / 255, data.train.y[:REHEARSED].long()
        arithmetic = module.rehearse(*few)
        loaders = InMemoryData(
            data, settings.batch_size, seed=settings.seed, augment=settings.data.augment, shuffle=settings.data.shuffle
        )

    return fit(settings, plain(cfg), module, loaders, folder, runs.choices(), arithmetic)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train in the run's folder, unless that run is done; return its accuracy on the validation set."""
    with cli.past_hydra():
        _refuse_shared_process(cfg)
        folder = Path(HydraConfig.get().runtime.output_dir)
        result = runs.finished_result(folder, cfg)
        if result is None:
            with runs.sitting(folder, cfg) as record:
                # Again, now that nobody else can be at it: another sweep may have been quicker.
                result = runs.finished_result(folder, cfg) or record(train(cfg, folder))
        if processes.rank(cfg.trainer.devices) == 0:
            cli.show(result, folder)
        return runs.objective(result)


def _refuse_shared_process(cfg: DictConfig) -> None:
    """In a process that has trained before, Lightning takes what that left for its own: half of the data, silently."""
    if cfg.trainer.devices > 1 and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise BadInput(
            f"trainer.devices={cfg.trainer.devices} in a sweep needs a launcher that gives each run processes of its "
            "own: hydra/launcher=pool, slurm or ray"
        )


def command() -> int:
    """The command line; returns its exit code."""
    if parent := os.environ.pop("BACKFORWARD_PARENT", None):  # a worker of Slurm or Ray
        processes.end_with_parent(int(parent))
    runs.register_resolvers()
    return cli.run(main, CONF)


if __name__ == "__main__":
    sys.exit(command())
