"""`hydra/launcher=stacked`, as a user gives it, against the pool."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import Command
from tests.test_settings import composed
from tests.test_stacking import numbers
from tests.test_sweep import DIGITS, start, tree, until

from backforward import runs
from backforward.settings import Settings, fingerprint, plain
from hydra_plugins.backforward_pool._jobs import Job, Sweep
from hydra_plugins.backforward_pool._pool import Load, _left_by, _Running
from hydra_plugins.backforward_pool._stacks import cut_off, loads_of, why_alone

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


def job(root: Path, *overrides: str) -> Job:
    cfg = composed(*overrides)
    return Job(root, overrides, root / "-".join(overrides), cfg, overrides, cfg)


FOUR = ("-m", "lr=0.1,0.05", "seed=0,1", "method=bfp", "optimizer=sgd_momentum", *DIGITS, "max_epochs=15", STACKED)


def curves(root: Path) -> list[bytes]:
    """Of each run its `metrics.csv`."""
    return [path.read_bytes() for path in sorted(root.rglob("metrics.csv"))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The curves of four runs in one stack that nothing has disturbed."""
    root = tmp_path_factory.mktemp("whole")
    sweep = start(root, *FOUR, "hydra.launcher.slots=1")
    out, _ = sweep.communicate(timeout=300)
    found = curves(root)
    assert len(found) == 4, out
    return found


def cut_off_by_kill(root: Path, *sweep: str, processes: Callable[[int], Iterable[int]]) -> tuple[int, str]:
    """Begin a sweep of stacks, kill processes of it once there is a checkpoint; its exit code, and what it printed."""
    command = start(root, *sweep)
    until(lambda: list(root.rglob(".stack-*.ckpt")))
    for process in processes(command.pid):
        os.kill(process, signal.SIGKILL)
    out, _ = command.communicate(timeout=300)
    return command.returncode, out


def test_a_stack_that_was_killed_goes_on_as_if_it_had_not_been(
    whole: list[bytes], spawned: Command, tmp_path: Path
) -> None:
    sweep = (*FOUR, "hydra.launcher.slots=1")
    cut_off_by_kill(tmp_path, *sweep, processes=tree)
    ended = spawned(*sweep)
    assert "4 finished" in ended.out, ended.out + ended.err
    assert curves(tmp_path) == whole


def test_one_run_of_a_stack_that_was_killed_goes_on_and_so_do_the_others(spawned: Command, tmp_path: Path) -> None:
    cut_off_by_kill(tmp_path, *FOUR, "hydra.launcher.slots=1", processes=tree)
    one = spawned(*(word for word in FOUR if not word.startswith(("lr", "seed"))), "lr=0.1", "seed=0")
    assert "1 run: 1 finished" in one.out, one.out + one.err
    rest = spawned(*FOUR, "hydra.launcher.slots=2")
    assert "4 runs: 3 finished, 1 done before" in rest.out, rest.out + rest.err
    results = [runs.read_result(path.parent) for path in tmp_path.rglob("result.json")]
    assert sorted(result["timing"]["stacked"] for result in results if result) == [1, 3, 3, 3]
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_stack_whose_process_was_killed_goes_on_within_the_sweep(whole: list[bytes], tmp_path: Path) -> None:
    def stack(sweep: int) -> list[int]:
        return [pid for pid in tree(sweep) if pid != sweep and os.getsid(pid) == pid]

    code, out = cut_off_by_kill(tmp_path, *FOUR, "hydra.launcher.slots=1", processes=stack)
    assert code == 0, out
    assert "a stack of 4 runs was killed by SIGKILL; it goes on from its last checkpoint" in out
    assert "4 runs: 4 finished" in out
    assert curves(tmp_path) == whole
    assert not list(tmp_path.rglob("*.ckpt"))  # none was begun anew, alone


def test_a_stack_killed_twice_is_done_one_by_one(tmp_path: Path) -> None:
    jobs = tuple(job(tmp_path, f"seed={seed}") for seed in range(3))
    sweep, checkpoint = Sweep(jobs), tmp_path / ".stack-0.ckpt"
    checkpoint.touch()

    def left_by(load: Load, code: int) -> list[Load]:
        return _left_by(_Running(load, SimpleNamespace(exitcode=code), []), sweep)  # type: ignore[arg-type]

    once = left_by(Load(jobs, checkpoint), -signal.SIGKILL)
    assert once == [Load(jobs, checkpoint, again=True)]
    assert checkpoint.exists()
    assert left_by(once[0], -signal.SIGKILL) == [Load((job,)) for job in jobs]
    assert not checkpoint.exists()
    assert left_by(Load(jobs, checkpoint), 1) == [Load((job,)) for job in jobs]  # no second try where it raised
    assert not sweep.outcomes


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
    jobs = [
        job(tmp_path, f"method={method}", f"lr={lr}", f"seed={seed}")
        for method in ("sgd", "bfp")
        for lr in (0.1, 0.2)
        for seed in (0, 1, 2)
    ]
    loads, alone = loads_of(jobs, size=32, slots=2)
    assert not alone
    assert [len(load.jobs) for load in loads] == [3, 3, 3, 3]
    assert [len({job.cfg.method._target_ for job in load.jobs}) for load in loads] == [1, 1, 1, 1]
    assert len({load.checkpoint for load in loads}) == 4
    small, _ = loads_of(jobs, size=2, slots=1)
    assert [len(load.jobs) for load in small] == [2] * 6


def left_behind(path: Path, step: int, *jobs: Job) -> bytes:
    """Write as much of a stack's checkpoint as is read before its runs begin."""
    torch.save({"state_dict": {}, "members": [fingerprint(plain(job.cfg)) for job in jobs], "step": step}, path)
    return path.read_bytes()


def test_a_stack_that_was_cut_off_keeps_together(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "method=bfp", f"seed={seed}") for seed in range(5)]
    path = tmp_path / ".stack-0.ckpt"
    bytes_ = left_behind(path, 7, *jobs[:4])
    cut = cut_off([tmp_path], pytest.fail)

    loads, _ = loads_of(jobs, size=32, slots=2, cut=cut)  # whatever the number of slots, whatever joins
    assert loads == [Load(tuple(jobs[:4]), path), Load((jobs[4],))]
    runs.write_result(made(jobs[0].folder), {"status": "finished", "settings_hash": fingerprint(plain(jobs[0].cfg))})
    cut = cut_off([tmp_path], pytest.fail)
    assert loads_of(jobs[1:4], size=32, slots=3, cut=cut)[0] == [Load(tuple(jobs[1:4]), path)]

    (alone,), _ = loads_of(jobs[2:3], size=32, slots=2, cut=cut)  # a part of it: the others still need the checkpoint
    assert alone.jobs == (jobs[2],)
    assert alone.checkpoint not in (None, path)
    assert alone.checkpoint is not None and alone.checkpoint.read_bytes() == bytes_ == path.read_bytes()
    halves, _ = loads_of(jobs[1:4], size=2, slots=1, cut=cut)
    assert [len(load.jobs) for load in halves] == [2, 1]
    assert path not in [load.checkpoint for load in halves]


def test_of_two_checkpoints_of_a_run_the_further_one_counts(tmp_path: Path) -> None:
    jobs = tuple(job(tmp_path, "method=bfp", f"seed={seed}") for seed in range(3))
    left_behind(tmp_path / ".stack-0.ckpt", 5, *jobs)
    left_behind(tmp_path / ".stack-1.ckpt", 9, jobs[0])
    first, second = loads_of(jobs, size=32, slots=1, cut=cut_off([tmp_path], pytest.fail))[0]
    assert first == Load(jobs[:1], tmp_path / ".stack-1.ckpt")
    assert second.jobs == jobs[1:]
    assert second.checkpoint is not None and cut_off([tmp_path], pytest.fail)[-1].step == 5


def test_checkpoints_of_stacks_that_nobody_needs_are_deleted(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "method=bfp", f"seed={seed}") for seed in range(3)]
    left_behind(tmp_path / ".stack-0.ckpt", 5, *jobs[:2])
    left_behind(tmp_path / ".stack-1.ckpt", 5, *jobs[1:])
    (tmp_path / ".stack-2.ckpt").write_bytes(b"no checkpoint")
    for done in jobs[:2]:
        runs.write_result(made(done.folder), {"status": "diverged", "settings_hash": fingerprint(plain(done.cfg))})
    notes: list[str] = []
    (left,) = cut_off([tmp_path], notes.append)
    assert list(tmp_path.glob(".stack*")) == [left.checkpoint] == [tmp_path / ".stack-1.ckpt"]
    assert left.keys == {fingerprint(plain(jobs[2].cfg))}
    assert notes == [f"{tmp_path / '.stack-2.ckpt'} is damaged: its runs begin anew"]


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder
