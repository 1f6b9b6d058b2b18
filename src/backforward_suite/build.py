"""Build the parts of a training or a study from a composed config."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from backforward.data_norm import DataNorm
from backforward.models import weight_decay_groups
from backforward.normprop import NormPropConv2d, NormPropLinear, unit_norm_projection
from backforward.rules import UpdateRule
from backforward.shift import layers
from backforward.switch import Switch
from backforward_suite.config import Request
from backforward_suite.data import DataSplits, load_asked
from backforward_suite.targets import refuse_wrong_types

REHEARSED = 2  # images of the step that is tried and counted before training


def switching(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    first: Callable[..., UpdateRule],
    then: Callable[..., UpdateRule],
    at_epoch: int,
    **hooks: Any,
) -> Switch:
    """Build a `Switch` from two partial rules, as a config gives them."""
    one, other = (rule(model, optimizer, loss_fn, **hooks) for rule in (first, then))
    return Switch(one, other, at_epoch)


def model_maker(cfg: DictConfig, shape: tuple[int, int, int], classes: int) -> Callable[..., nn.Module]:
    """Return a function that builds the config's model from a seed, for images ``(C, H, W)``."""
    maker: Callable[..., nn.Module] = instantiate(
        cfg.model, in_shape=shape, classes=classes, _partial_=True, _convert_="all"
    )
    if cfg.norm.get("_target_") is None:
        return maker
    norm = {key: value for key, value in cfg.norm.items() if key != "kind"}
    return partial(maker, norm=instantiate(norm, _partial_=True, _convert_="all"))


def with_data_norm(data_norm: DataNorm, model: nn.Module) -> nn.Sequential:
    """Return the network to train: input normalisation, then the model."""
    return nn.Sequential(OrderedDict(data_norm=data_norm, model=model))


class Parts:
    """The parts of a training or a study, as the config has them.

    Args:
        request: The run's settings.
        data: The data set, if it is loaded already.

    Raises:
        BadInput, ValueError, ...: A part cannot be built; wrap in `cli.refusing`.
    """

    def __init__(self, request: Request, data: DataSplits | None = None) -> None:
        cfg = request.cfg
        for group in ("model", "optimizer", "method", "schedule"):
            refuse_wrong_types(group, request.values[group])
        settings = self._settings = request.settings
        if data is None:
            data = load_asked(settings.data)
        self.data = data
        self._data_norm = DataNorm.fit(settings.data_norm, self.data.train.x)
        self._model = model_maker(cfg, self.data.shape, self.data.classes)
        self._optimizer = instantiate(cfg.optimizer, _partial_=True, _convert_="all")
        self._rule = instantiate(cfg.method, _partial_=True, _convert_="all")
        schedule = {key: value for key, value in cfg.schedule.items() if key != "interval"}
        self.schedule = instantiate(schedule, _partial_=True, _convert_="all") if schedule["_target_"] else None

    def network(self, seed: int, **changes: object) -> nn.Module:
        """Return data norm and model, with the seed's initial weights; `changes` are further arguments of the model."""
        return with_data_norm(copy.deepcopy(self._data_norm), self._model(seed=seed, **changes))

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer; it decays weights only, and the last layer may have its own learning rate."""
        decays = (self._settings.optimizer.model_extra or {}).get("weight_decay")
        groups = weight_decay_groups(network) if decays else [{"params": list(network.parameters())}]
        if self._settings.head_lr is not None:
            groups = self._with_head(groups, network, self._settings.head_lr)
        made: torch.optim.Optimizer = self._optimizer(groups)
        return made

    def _with_head(self, groups: list[dict[str, Any]], network: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Return parameter groups in which the last layer in forward order has this learning rate."""
        images = self.few()[0].to(next(network.parameters()).device)
        head = {id(parameter) for parameter in layers(network, images)[-1].parameters}
        parted = []
        for group in groups:
            mine = [p for p in group["params"] if id(p) in head]
            parted.append({**group, "params": [p for p in group["params"] if id(p) not in head]})
            parted.append({**group, "params": mine, "lr": lr})
        return [group for group in parted if group["params"]]

    def rule(self, *args: Any, **hooks: Any) -> Any:
        """Return the update rule of a network, an optimizer and a loss function."""
        if (parts := self._settings.micro_batches) > 1:  # else a rule of your own need not know of them
            hooks["micro_batches"] = parts
        return self._rule(*args, max_grad_norm=self._settings.max_grad_norm, **hooks)

    def projection(self, network: nn.Module) -> Any:
        """Return the projection to apply after an update; None if the network has no layer to project."""
        projected = any(isinstance(module, NormPropConv2d | NormPropLinear) for module in network.modules())
        return unit_norm_projection(network) if projected else None

    def few(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a few training images, as many for each micro-batch, and their labels."""
        images = self.data.train.take(slice(min(REHEARSED, self._settings.batch_size) * self._settings.micro_batches))
        return images.x.float() / 255, images.y
