"""`hydra/launcher=stacked`, as a user gives it, against the pool."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command
from tests.test_settings import composed
from tests.test_stacking import numbers
from tests.test_sweep import DIGITS, start, tree, until

from backforward import runs
from backforward.settings import Settings
from hydra_plugins.backforward_pool._jobs import Job
from hydra_plugins.backforward_pool._stacks import loads_of, why_alone

STACKED = "hydra/launcher=stacked"


def by_run(root: Path) -> dict[str, tuple[dict[str, Any], list[dict[str, float]], bytes]]:
    """Of each run what stands in its result beside times, its curves, and its config."""
    found = {}
    for path in root.rglob("result.json"):
        result = runs.read_result(path.parent)
        assert result is not None
        result = {key: value for key, value in result.items() if key not in ("timing", "final", "best")}
        rows = [numbers(row) for row in runs.read_metrics(path.parent)]
        found[path.parent.name] = (result, rows, (path.parent / ".hydra" / "config.yaml").read_bytes())
    return found


def test_a_stacked_sweep_leaves_what_the_pool_leaves(spawned: Command, tmp_path: Path) -> None:
    sweep = ("-m", "method=sgd,bfp_poster", "norm=none,batch", "lr=0.1,0.05", "seed=0,1", *DIGITS, "max_epochs=2")
    ended = spawned(*sweep, STACKED, "hydra.sweep.dir=stacked", "hydra.launcher.slots=2")
    assert ended.code == 0, ended.out + ended.err
    assert "8 runs not stacked: norm=batch has running statistics" in ended.out
    assert "16 runs: 16 finished" in ended.out
    assert spawned(*sweep, "hydra.sweep.dir=pool").code == 0
    ours, theirs = by_run(tmp_path / "stacked"), by_run(tmp_path / "pool")
    assert ours.keys() == theirs.keys()
    for name, (result, rows, config) in ours.items():
        assert (result, config) == (theirs[name][0], theirs[name][2])
        assert [list(row) for row in rows] == [list(row) for row in theirs[name][1]]
        for row, other in zip(rows, theirs[name][1], strict=True):
            assert row == pytest.approx(other, rel=1e-4, abs=1e-4)
        assert list((tmp_path / "stacked" / name).glob("events.out.*"))
        stacked = runs.read_result(tmp_path / "stacked" / name)["timing"].get("stacked")  # type: ignore[index]
        assert stacked == (None if "batch" in name.split("-") else 2)
    assert not list((tmp_path / "stacked").glob(".stack*"))
    assert "16 done before, skipped" in spawned(*sweep, STACKED, "hydra.sweep.dir=stacked").out


def test_what_a_stack_cannot_do_is_done_one_by_one(spawned: Command, tmp_path: Path) -> None:
    ended = spawned("-m", "seed=0,1,2", "+optimizer.maximize=true", *DIGITS, "max_epochs=1", "lr=1e-3", STACKED)
    assert ended.code == 0, ended.out + ended.err
    assert "3 runs: 3 finished" in ended.out
    assert "a stack only minimises" in next(tmp_path.rglob("*seed0/run.log")).read_text()
    assert len(list(tmp_path.rglob("last.ckpt"))) == 3  # left by single runs


def test_a_stack_that_was_killed_goes_on_as_if_it_had_not_been(spawned: Command, tmp_path: Path) -> None:
    sweep = ("-m", "lr=0.1,0.05", "seed=0,1", "method=bfp", "optimizer=sgd_momentum", *DIGITS, "max_epochs=60", STACKED)
    sweep = (*sweep, "hydra.launcher.slots=1")
    assert spawned(*sweep, "name=whole").code == 0
    command = start(tmp_path, *sweep, "name=cut")
    until(lambda: list((tmp_path / "outputs" / "cut").glob(".stack-*.ckpt")))
    for process in tree(command.pid):
        os.kill(process, signal.SIGKILL)
    command.communicate()
    ended = spawned(*sweep, "name=cut")
    assert "4 finished" in ended.out, ended.out + ended.err
    ours, theirs = (sorted((tmp_path / "outputs" / name).rglob("metrics.csv")) for name in ("cut", "whole"))
    assert len(ours) == len(theirs) == 4
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("lr=0.3 method=bfp_warmup norm=prop", None),
        ("trainer.precision=64-true optimizer=sgd_momentum weight_decay=1e-3 schedule=halve", None),
        ("timeout_min=5", "timeout_min"),
        ("diagnostics=cheap", "diagnostics"),
        ("trainer.precision=bf16-mixed", "bfloat16"),
        ("max_grad_norm=1", "max_grad_norm"),
        ("optimizer=adam", "torch.optim.Adam is not SGD"),
        ("method=bfp method.engine=shortcut", "engine=shortcut"),
        ("model=residual", "is no MLP"),
        ("norm=batch", "norm=batch"),
        ("data_norm=batch", "data_norm=batch"),
        ("model.dropout=0.1", "dropout"),
        ("model.activation=prelu", "PReLU"),
    ],
)
def test_runs_that_are_trained_alone_have_a_reason(overrides: str, reason: str | None) -> None:
    found = why_alone(Settings.check(composed(*overrides.split())))
    assert found is None if reason is None else reason in str(found)


def test_stacks_hold_runs_alike_and_keep_every_slot_busy(tmp_path: Path) -> None:
    def job(*overrides: str) -> Job:
        cfg = composed(*overrides)
        return Job(tmp_path, overrides, tmp_path / "-".join(overrides), cfg, overrides, cfg)

    jobs = [
        job(f"method={method}", f"lr={lr}", f"seed={seed}")
        for method in ("sgd", "bfp")
        for lr in (0.1, 0.2)
        for seed in (0, 1, 2)
    ]
    loads, alone = loads_of(jobs, jobs, size=32, slots=2)
    assert not alone
    assert [len(load.jobs) for load in loads] == [3, 3, 3, 3]
    assert [len({job.cfg.method._target_ for job in load.jobs}) for load in loads] == [1, 1, 1, 1]
    fewer, _ = loads_of(jobs, jobs[1:], size=32, slots=2)
    assert [len(load.jobs) for load in fewer] == [2, 3, 3, 3]
    assert [load.checkpoint for load in fewer] == [load.checkpoint for load in loads]  # whatever is done already
    small, _ = loads_of(jobs, jobs, size=2, slots=1)
    assert [len(load.jobs) for load in small] == [2] * 6
