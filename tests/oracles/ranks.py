"""One process of a distributed run, in plain torch.distributed. Apart, so that a spawned process imports little."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from tests.helpers.problems import PROBLEMS
from torch import Tensor

from backforward.rules import Backforward


def mean_over_ranks(flat: Tensor) -> Tensor:
    """What a training loop gives a rule as `reduce`."""
    dist.all_reduce(flat)
    return flat / dist.get_world_size()


def train_as_rank(rank: int, ranks: int, folder: str, names: list[str]) -> None:
    """Train the named problems on this rank's share of each batch; save the ends as `<name>-<rank>-of-<ranks>.pt`."""
    torch.set_num_threads(1)
    if ranks > 1:
        meeting = Path(folder, "meeting").as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    for problem in PROBLEMS:
        if problem.id in names:
            model = problem.model()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            rule = Backforward(model, optimizer, problem.loss, reduce=mean_over_ranks if ranks > 1 else None)
            for i in range(4):
                x, y = problem.batch(i)
                rule.step(x[rank::ranks], y[rank::ranks])
            torch.save(model.state_dict(), Path(folder, f"{problem.id}-{rank}-of-{ranks}.pt"))
    if ranks > 1:
        dist.destroy_process_group()
