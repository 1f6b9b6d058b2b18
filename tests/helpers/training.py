"""Small trainings within the test's own process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tests.helpers.configs import composed
from torch import nn

from backforward.data_norm import DataNorm
from backforward.models import MLP
from backforward_suite.data import EpochLoader, load_data
from backforward_suite.run import train as train_alone
from backforward_suite.runs.files import Result
from backforward_suite.train.callbacks.record import RunRecord

SMALL = ("data=digits", "batch_size=32", "model.hidden=16", "trainer.accelerator=cpu")

METHODS = ["sgd", "bfp", "bfp_naive", "bfp_poster", "sgd_repeat", "bfp_warmup", "bfp_finetune"]


def trained(folder: Path | None, *overrides: str) -> Result:
    return train_alone(composed(*SMALL, *overrides), folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def network_and_loader(seed: int = 0) -> tuple[nn.Sequential, EpochLoader]:
    data = load_data("digits", Path("nowhere"))
    network = nn.Sequential()
    network.add_module("data_norm", DataNorm.fit("channel", data.train.x))
    network.add_module("model", MLP(data.shape, data.classes, hidden=16, seed=seed))
    return network, EpochLoader(data.train, 32, seed=seed)


def as_trained(network: nn.Module) -> dict[str, torch.Tensor]:
    return {f"network.{key}": value for key, value in network.state_dict().items()}


def only_network(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if key.startswith("network.")}


class CutOff(Exception):
    """Stands for kill -9: nothing after it is written."""


def cut_off_at(step: int) -> Callable[..., None]:
    def before_batch(_: RunRecord, trainer: L.Trainer, *__: Any) -> None:
        if trainer.global_step == step:
            raise CutOff

    return before_batch


def told_to_end_at(step: int) -> Callable[..., None]:
    def before_batch(_: RunRecord, trainer: L.Trainer, *__: Any) -> None:
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return before_batch
