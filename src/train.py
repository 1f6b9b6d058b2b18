"""Train one network, or sweep over many settings; or make a study instead.

    python src/train.py method=bfp lr=0.05
    python src/train.py -m method=bfp,sgd lr=0.1,0.05,0.01
    python src/train.py -m method=bfp,sgd lr=1 study=one_step

`conf/train.yaml` lists what can be set.
"""

from __future__ import annotations

import copy
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from backforward import cli, processes, runs
from backforward.errors import BadInput
from backforward.settings import Settings, plain

if TYPE_CHECKING:
    import torch
    from torch import nn

CONF = Path(__file__).resolve().parent.parent / "conf"
REHEARSED = 2  # images of the step that is tried, and counted, before training


def train(cfg: DictConfig, folder: Path | None = None) -> runs.Result:
    """Train one network, or make the study that the config names.

    Args:
        cfg: A config composed from `conf/train.yaml`.
        folder: Where curves and checkpoints go, and where a half-done run goes on; None writes nothing.

    Returns:
        What stands in `result.json`: status, final and best metrics, settings, origin, timing.

    Raises:
        BadInput: Something asked for cannot be had.
    """
    settings = Settings.check(cfg)
    return (_train if settings.study is None else _study)(cfg, settings, folder)


# Torch and Lightning are imported within functions: they take seconds, which a skipped run or a mistyped key does
# without, and a study without the latter.


def _train(cfg: DictConfig, settings: Settings, folder: Path | None) -> runs.Result:
    from hydra.utils import instantiate

    import backforward._torchvision  # noqa: F401  (before Lightning, which imports torchvision)
    from backforward.fitting import fit
    from backforward.training import Classification, InMemoryData

    with cli.refusing():
        parts = _Parts(cfg, settings)
        data, network = parts.data, parts.network(settings.seed)
        schedule = {key: value for key, value in cfg.schedule.items() if key != "interval"}
        module = Classification(
            network,
            make_optimizer=parts.optimizer,
            make_rule=parts.rule,
            make_schedule=instantiate(schedule, _partial_=True, _convert_="all") if schedule["_target_"] else None,
            schedule_interval=settings.schedule.interval,
            after_update=parts.projection(network),
            check_every=settings.trainer.log_every_n_steps,
            seed=settings.seed,
        )
        arithmetic = module.rehearse(*parts.few())
        loaders = InMemoryData(
            data, settings.batch_size, seed=settings.seed, augment=settings.data.augment, shuffle=settings.data.shuffle
        )

    return fit(settings, plain(cfg), module, loaders, folder, runs.choices(), arithmetic)


def _study(cfg: DictConfig, settings: Settings, folder: Path | None) -> runs.Result:
    from hydra.utils import instantiate
    from torch.nn.functional import cross_entropy

    from backforward.studies import Setting
    from backforward.studying import conduct, place, tracker

    with cli.refusing():
        study = instantiate(cfg.study, _convert_="all")
        parts = _Parts(cfg, settings)
        setting = Setting(
            seed=settings.seed,
            batch_size=settings.batch_size,
            data=parts.data,
            make_network=parts.network,
            make_optimizer=parts.optimizer,
            make_rule=lambda network, optimizer: parts.rule(
                network, optimizer, cross_entropy, after_update=parts.projection(network)
            ),
            track=tracker(settings),
            **place(settings),
        )
        network = parts.network(settings.seed)
        setting.make_rule(network, parts.optimizer(network)).prepare(parts.few()[0])

    return conduct(settings, plain(cfg), study, setting, folder, runs.choices())


class _Parts:
    """What trainings and studies are put together from, as the config has it."""

    def __init__(self, cfg: DictConfig, settings: Settings) -> None:
        from hydra.utils import instantiate

        from backforward.data import load_data
        from backforward.normprop import DataNorm

        self._settings = settings
        self.data = load_data(
            settings.data.name,
            Path(settings.data.root),
            protocol=settings.data.protocol,
            size=settings.data.size,
            train_images=settings.data.train_images,
            evaluation_images=settings.data.evaluation_images,
        )
        self._data_norm = DataNorm.fit(settings.data_norm, self.data.train.x)
        self._model = instantiate(
            cfg.model, in_shape=self.data.shape, classes=self.data.classes, _partial_=True, _convert_="all"
        )
        self._optimizer = instantiate(cfg.optimizer, _partial_=True, _convert_="all")
        self._rule = instantiate(cfg.method, _partial_=True, _convert_="all")

    def network(self, seed: int, **changes: object) -> nn.Module:
        """The model with these initial weights, data norm first; `changes` are arguments of it besides the config's."""
        from torch import nn

        model = self._model(seed=seed, **changes)
        return nn.Sequential(OrderedDict(data_norm=copy.deepcopy(self._data_norm), model=model))

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """The optimizer; it decays weights alone."""
        from backforward.models import weight_decay_groups

        decays = (self._settings.optimizer.model_extra or {}).get("weight_decay")
        made: torch.optim.Optimizer = self._optimizer(weight_decay_groups(network) if decays else network.parameters())
        return made

    def rule(self, *args: Any, **hooks: Any) -> Any:
        """The update rule of network, optimizer and loss function."""
        return self._rule(*args, max_grad_norm=self._settings.max_grad_norm, **hooks)

    def projection(self, network: nn.Module) -> Any:
        """What is to be done to parameters after an update; None if the network has no layer to project."""
        from backforward.normprop import NormPropConv2d, NormPropLinear, unit_norm_projection

        projected = any(isinstance(module, NormPropConv2d | NormPropLinear) for module in network.modules())
        return unit_norm_projection(network) if projected else None

    def few(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A few training images and their labels, to try things on."""
        images = self.data.train.take(slice(REHEARSED))
        return images.x.float() / 255, images.y


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
