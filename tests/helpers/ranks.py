"""Runs on two processes of this machine, forked from a server that has torch and Lightning loaded."""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
from tests.helpers.configs import composed
from tests.helpers.training import SMALL, CutOff, cut_off_at, told_to_end_at
from torch import nn

from backforward_suite.errors import Stopped
from backforward_suite.train.callbacks.record import RunRecord
from backforward_suite.train.module import Classification


def one_rank(rank: int, port: int, folder: Path, overrides: list[str], cut_at: int | None, stop_at: int | None) -> None:
    """A process of a run, as a scheduler that starts all of them would have it. Leaves what its network became."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    from backforward_suite.run import train

    networks: list[nn.Module] = []
    on_train_end = Classification.on_train_end
    Classification.on_train_end = lambda self: (networks.append(self.network), on_train_end(self))[1]  # type: ignore[method-assign]
    if cut_at is not None:
        RunRecord.before_batch = cut_off_at(cut_at)  # type: ignore[method-assign]
    if stop_at is not None and rank == 1:
        RunRecord.before_batch = told_to_end_at(stop_at)  # type: ignore[method-assign]
    torch.set_num_threads(1)
    try:
        train(composed(*SMALL, "trainer=ddp", *overrides), folder)
    except (CutOff, Stopped):
        os._exit(0)
    torch.save(networks[-1].state_dict(), folder / f"rank{rank}.pt")


def two_ranks(
    folder: Path, *overrides: str, cut_at: int | None = None, stop_at: int | None = None
) -> list[dict[str, torch.Tensor]]:
    # The server reads its path from the environment, and says nothing if what it is to load is not there.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.ranks"])
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=one_rank, args=(n, port, folder, list(overrides), cut_at, stop_at)) for n in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]
