"""One run on two processes (gloo): the same batches as one process, ranks alike to the bit, also after a cut."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.commands import Command
from tests.helpers.configs import composed
from tests.helpers.ranks import two_ranks
from tests.helpers.sweeps import DIGITS, alive, assert_same, start, tree, until
from tests.helpers.training import SMALL, network_and_loader, only_network, same, trained, weights
from torch import nn

from backforward_suite.data import EpochLoader, load_data
from backforward_suite.runs import files, locks
from backforward_suite.train.callbacks.checkpoint import read_checkpoint
from backforward_suite.train.module import rank_seed

METHODS = {
    "sgd, momentum": "method=sgd optimizer=sgd_momentum",
    "bfp": "method=bfp",
    "bfp, clipped, weight decay": "method=bfp max_grad_norm=0.5 weight_decay=0.01",
}


def assert_close(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        measured = {key: value for key, value in row.items() if value is not None}
        assert measured == pytest.approx({key: other[key] for key in measured}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_two_processes_see_the_batches_of_one(settings: str, tmp_path: Path) -> None:
    overrides = (*settings.split(), "max_epochs=2")
    ranks = two_ranks(tmp_path / "two", *overrides)
    assert same(*ranks)
    trained(tmp_path / "one", *overrides)
    one = only_network(weights(tmp_path / "one"))
    for key, value in only_network(weights(tmp_path / "two")).items():
        torch.testing.assert_close(value, one[key], rtol=0, atol=1e-6)
    # Sums over all images of both: losses, hits, norms, steps.
    assert_close(files.read_metrics(tmp_path / "two"), files.read_metrics(tmp_path / "one"))


class TestBatchNorm:
    def test_statistics_are_of_each_share_and_running_ones_their_mean(self, tmp_path: Path) -> None:
        ranks = two_ranks(tmp_path, "norm=batch", "max_epochs=1", "lr=0.1")
        assert same(*ranks)  # after the evaluation, running statistics as well

        shares = [with_batch_norm() for _ in range(2)]
        data = load_data("digits", Path("nowhere"))
        loaders = [EpochLoader(data.train, 32, rank=rank, world_size=2) for rank in range(2)]
        for batches in zip(*loaders, strict=True):
            gradients = [
                torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters()))
                for network, (x, y) in zip(shares, batches, strict=True)
            ]
            for network in shares:
                for weight, *both in zip(network.parameters(), *gradients, strict=True):
                    weight.data.sub_(0.1 * (both[0] + both[1]) / 2)
        one, other = (network.state_dict() for network in shares)
        for key, value in ranks[0].items():
            mean = (one[key] + other[key]) / 2 if value.is_floating_point() else one[key]
            torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-5)


def with_batch_norm() -> nn.Module:
    from hydra.utils import instantiate

    network, _ = network_and_loader()
    model = instantiate(composed(*SMALL, "norm=batch").model, in_shape=(1, 8, 8), classes=10, seed=0, _convert_="all")
    network.model = model
    return copy.deepcopy(network).train()


def test_each_rank_draws_its_own_dropout(tmp_path: Path) -> None:
    seeds = {rank_seed(seed, rank) for seed in range(20) for rank in range(8)}
    assert len(seeds) == 160
    assert rank_seed(3, 0) == 3  # one process: the run's own
    ranks = two_ranks(tmp_path, "model.dropout=0.5", "max_epochs=1")
    assert same(*ranks)  # different draws, one average
    states = [own["rng"]["cpu"] for own in read_checkpoint(tmp_path / "last.ckpt")["ranks"]]
    assert len(states) == 2
    assert not torch.equal(*states)


def test_cut_off_anywhere_two_processes_go_on_as_if_they_had_not_been(tmp_path: Path) -> None:
    overrides = (
        *("method=bfp", "model.dropout=0.2", "norm=batch", "optimizer=adam", "lr=0.001", "max_epochs=2"),
        *("trainer.checkpoint_minutes=1e-9", "trainer.log_every_n_steps=1"),  # a checkpoint after every batch
    )
    whole = two_ranks(tmp_path / "whole", *overrides)
    for step in (17, 40, 41):  # 40 batches an epoch
        two_ranks(tmp_path / "cut", *overrides, cut_at=step)
        assert read_checkpoint(tmp_path / "cut" / "last.ckpt")["global_step"] == step
    two_ranks(tmp_path / "cut", *overrides, stop_at=60)  # one of them is told to end: both do
    assert read_checkpoint(tmp_path / "cut" / "last.ckpt")["global_step"] == 61
    assert not (tmp_path / "cut" / "result.json").exists()
    assert all(same(*pair) for pair in zip(whole, two_ranks(tmp_path / "cut", *overrides), strict=True))
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert (tmp_path / "cut" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def ranks_of(sweep: int) -> list[int]:
    """The processes of the only run of a sweep, its first one first: the head of a group, and its child."""
    family = tree(sweep)
    heads = [pid for pid in family if alive(pid) and os.getpgid(pid) == pid and pid != sweep]
    return heads + [pid for head in heads for pid in tree(head)[1:]]


class TestSweeps:
    def test_one_and_two_devices_in_one_sweep(self, spawned: Command, tmp_path: Path) -> None:
        ended = spawned("-m", "method=bfp", "trainer.devices=1,2", *SMALL, "max_epochs=1")
        assert ended.code == 0, ended.out + ended.err
        assert "2 runs: 2 finished" in ended.out
        one, two = sorted((tmp_path / "outputs" / "train").glob("bfp-*"))
        results = [files.read_result(folder) for folder in (one, two)]
        assert [result["hardware"]["devices"] for result in results if result] == [1, 2]
        # Neither trains on half of the data, as runs that share a process do.
        for key, value in only_network(weights(one)).items():
            torch.testing.assert_close(value, weights(two)[key], rtol=0, atol=1e-6)
        assert_close(files.read_metrics(one), files.read_metrics(two))
        assert (two / "run.log").read_text().count("finished") == 1  # the first rank alone shows the result
        assert len(list(two.glob("events.out.*"))) == len(list(one.glob("events.out.*")))
        assert [result["timing"]["threads"] for result in results if result] == [1, 1]  # a core each

    def test_a_killed_first_process_takes_the_other_along(self, tmp_path: Path) -> None:
        job = (
            *("trainer=ddp", *DIGITS, "method=bfp", "max_epochs=3"),
            *("trainer.checkpoint_minutes=0.001", "trainer.log_every_n_steps=7"),
        )
        killed, alone = tmp_path / "killed", tmp_path / "alone"
        killed.mkdir()
        alone.mkdir()
        sweep = start(killed, "-m", *job)
        until(lambda: list(killed.rglob("last.ckpt")))
        first, second = ranks_of(sweep.pid)
        os.kill(first, signal.SIGKILL)
        out, _ = sweep.communicate(timeout=60)
        assert sweep.returncode == 1
        assert "1 run: 1 failed" in out
        assert "killed by SIGKILL" in out
        assert not alive(second)
        (folder,) = (path.parent for path in killed.rglob("last.ckpt"))
        assert not locks.is_taken(folder)

        for again in (start(killed, "-m", *job), start(alone, *job)):
            out, _ = again.communicate(timeout=200)
            assert again.returncode == 0, out
        assert "goes on from step" in (folder / "run.log").read_text()
        assert_same(killed, alone)

    def test_nothing_is_left_of_a_run_killed_with_its_sweep_as_it_starts(self, tmp_path: Path) -> None:
        sweep = start(tmp_path, "-m", "trainer=ddp", *DIGITS, "max_epochs=100000")
        until(lambda: len(ranks_of(sweep.pid)) == 2)
        first, second = ranks_of(sweep.pid)  # the second imports torch
        for pid in (first, sweep.pid):
            os.kill(pid, signal.SIGKILL)
        sweep.communicate(timeout=30)
        until(lambda: not alive(second), seconds=20)
        (log,) = tmp_path.rglob("run.log")
        assert not locks.is_taken(log.parent)

    def test_a_killed_second_process_takes_the_first_along(self, tmp_path: Path) -> None:
        sweep = start(tmp_path, "-m", "trainer=ddp", *DIGITS, "max_epochs=100000")
        until(lambda: list(tmp_path.rglob("last.ckpt")))
        first, second = ranks_of(sweep.pid)
        os.kill(second, signal.SIGKILL)
        out, _ = sweep.communicate(timeout=60)
        assert sweep.returncode == 1
        assert "1 run: 1 failed" in out
        assert not alive(first)

    def test_a_launcher_that_shares_a_process_is_refused(self, train: Command, tmp_path: Path) -> None:
        ended = train("-m", "hydra/launcher=basic", "trainer.devices=2,1", *SMALL, "max_epochs=1")
        assert ended.code == 2
        assert ended.err.strip().splitlines()[-1:] == [  # Hydra's launcher says before which overrides it is about
            "error: trainer.devices=2 in a sweep needs a launcher that gives each run processes of its own: "
            "hydra/launcher=pool, slurm or ray"
        ]
        done = list(tmp_path.rglob("result.json"))
        assert len(done) == 1  # the one with a single device
        trained(tmp_path / "alone", "max_epochs=1")
        assert same(weights(done[0].parent), weights(tmp_path / "alone"))
