"""What the tests of studies share: a setting on scikit-learn's digits, without configs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.settings import MakeSetting
from torch import nn

from backforward.data_norm import DataNorm
from backforward.models import MLP
from backforward.normprop import unit_norm_projection
from backforward.rules import Backprop
from backforward_suite.data import DataSplits, load_data
from backforward_suite.studies import Setting

SGD_AT_1 = partial(torch.optim.SGD, lr=1.0)


@pytest.fixture(scope="session")
def digits() -> DataSplits:
    return load_data("digits", Path("data"))


@pytest.fixture
def make_setting(digits: DataSplits) -> MakeSetting:
    """A setting; arguments replace the defaults: plain SGD at lr 1, the MLP, each pixel standardised."""

    def make(
        rule: Callable[..., Any] = Backprop,
        optimizer: Callable[..., torch.optim.Optimizer] = SGD_AT_1,
        model: Callable[..., nn.Module] = MLP,
        **changes: Any,
    ) -> Setting:
        def make_network(seed: int, **arguments: Any) -> nn.Module:
            network = model(in_shape=digits.shape, classes=10, seed=seed, **arguments)
            return nn.Sequential(OrderedDict(data_norm=DataNorm.fit("global", digits.train.x), model=network))

        def make_rule(network: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
            return rule(network, optimizer, F.cross_entropy, after_update=unit_norm_projection(network))

        return Setting(
            **{
                "seed": 0,
                "batch_size": 8,
                "data": digits,
                "make_network": make_network,
                "make_optimizer": lambda network: optimizer(network.parameters()),
                "make_rule": make_rule,
                **changes,
            }
        )

    return make
