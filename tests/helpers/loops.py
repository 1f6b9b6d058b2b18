"""The recipes for Lightning and Accelerate as a user would write them, on one process or on a rank of two.

python -m tests.helpers.loops lightning RANK RANKS PORT FOLDER
"""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from backforward import Backforward, in_accelerate, in_lightning

BATCHES, SAMPLES = 6, 8


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def batches(rank: int = 0, ranks: int = 1) -> DataLoader[tuple[Tensor, ...]]:
    """This rank's share of each batch."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * SAMPLES, 5, generator=random)
    y = torch.randint(3, (len(x),), generator=random)
    return DataLoader(TensorDataset(x[rank::ranks], y[rank::ranks]), batch_size=SAMPLES // ranks)


class Recipe(L.LightningModule):
    """As in the docs."""

    def __init__(self, rule: Callable[..., Any] = Backforward) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network()
        self.make_rule = rule

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.network)

    def on_train_start(self) -> None:
        self.rule = self.make_rule(self.network, loss_fn=F.cross_entropy, **in_lightning(self))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self.rule.step(*batch).loss)


def trainer(folder: Path, **settings: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "log_every_n_steps": 1,
        }
        | settings
    )


def with_lightning(rank: int, ranks: int, folder: Path) -> nn.Module:
    module = Recipe()
    settings = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    fit = trainer(folder, use_distributed_sampler=False, **settings)
    fit.fit(module, batches(rank, ranks))
    assert fit.global_step == 2 * BATCHES
    return module.network


def with_accelerate(rank: int, ranks: int, folder: Path) -> nn.Module:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == ranks
    net = network()
    net, optimizer = accelerator.prepare(net, optimizer_of(net))
    whole = accelerator.unwrap_model(net)
    rule = Backforward(whole, loss_fn=F.cross_entropy, **in_accelerate(accelerator, optimizer))
    for _ in range(2):
        for x, y in batches(rank, ranks):
            rule.step(x, y)
    return whole


def by_hand() -> nn.Module:
    net = network()
    rule = Backforward(net, optimizer_of(net), F.cross_entropy)
    for _ in range(2):
        for x, y in batches():
            rule.step(x, y)
    return net


def main() -> None:
    """A process of a run, as a launcher would start it."""
    loop, rank, ranks, port, folder = sys.argv[1:]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    trained = {"lightning": with_lightning, "accelerate": with_accelerate}[loop](int(rank), int(ranks), Path(folder))
    torch.save(trained.state_dict(), Path(folder, f"rank{rank}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
