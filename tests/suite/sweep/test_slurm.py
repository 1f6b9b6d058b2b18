"""Sweeps on a real Slurm cluster of one node with fake GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.helpers.commands import Command, environment
from tests.helpers.failing_sweep import fails_once_then_ends
from tests.helpers.single_node_slurm import single_node_slurm, why_not
from tests.helpers.sweeps import DIGITS, WITH_TESTS, assert_same, start, until

from backforward_suite.runs import files, locks
from backforward_suite.train.callbacks.checkpoint import read_checkpoint

pytestmark = pytest.mark.cluster

SLURM = ("-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.poll_seconds=0.3", *DIGITS)
WITHOUT_GPUS = "hydra.launcher.gpus_per_device=0"
LONG = (WITHOUT_GPUS, "max_epochs=100000", "trainer.checkpoint_minutes=100", "trainer.log_every_n_steps=1")

Environment = dict[str, str]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Environment]:
    """The environment of a Slurm cluster."""
    reason = why_not() or (None if find_spec("submitit") else "not installed: submitit (pip install -e '.[slurm]')")
    if reason:
        pytest.skip(reason)
    with single_node_slurm() as inside:
        yield {key: inside[key] for key in ("PATH", "SLURM_CONF")}


def of_slurm(slurm: Environment, *command: str) -> str:
    return subprocess.run(command, env=environment(**slurm), check=True, capture_output=True, text=True).stdout


def test_two_by_two_with_one_failing_pinned_and_resumed(slurm: Environment, tmp_path: Path) -> None:
    finished = fails_once_then_ends(tmp_path, *SLURM, "max_epochs=2", **slurm)
    # Two runs at a time on two (fake) GPUs: each saw one.
    assert {result["timing"]["cuda_visible_devices"] for result in finished} <= {"0", "1"}
    assert all("SLURM" not in key for result in finished for key in result["settings"])


def test_a_preempted_job_writes_a_checkpoint(slurm: Environment, tmp_path: Path) -> None:
    sweep = start(tmp_path, *SLURM, *LONG, "trainer.devices=1,2", **slurm)
    until(lambda: len(list(tmp_path.rglob("last.ckpt"))) == 2)
    one, two = sorted(path.parent for path in tmp_path.rglob("last.ckpt"))
    assert len(read_checkpoint(two / "last.ckpt")["ranks"]) == 2  # two tasks of one job, one run
    of_slurm(slurm, "scancel", "--signal=TERM", "--me")  # as when it is preempted
    out, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 1
    assert out.count("stopped by SIGTERM; it resumes from its last checkpoint") == 4, out
    for folder in (one, two):
        assert not locks.is_taken(folder)
        assert read_checkpoint(folder / "last.ckpt")["global_step"] > 0
        assert "stopped by SIGTERM" in files.last_lines(folder / "run.log", 3)[-1]


def test_ctrl_c_cancels_the_jobs(slurm: Environment, tmp_path: Path) -> None:
    sweep = start(tmp_path, *SLURM, *LONG, "seed=0,1", "hydra.launcher.array_parallelism=1", **slurm)
    until(lambda: list(tmp_path.rglob("last.ckpt")))
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    before = checkpoint.stat().st_mtime_ns
    os.kill(sweep.pid, signal.SIGINT)
    out, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, out
    assert out.splitlines()[-1] == "error: interrupted; the same command resumes"
    assert "Traceback" not in out
    until(lambda: not of_slurm(slurm, "squeue", "--noheader"), seconds=30)
    assert not locks.is_taken(checkpoint.parent)
    assert checkpoint.stat().st_mtime_ns > before
    assert "stopped by SIGTERM" in files.last_lines(checkpoint.parent / "run.log", 1)[0]
    assert len(list(tmp_path.rglob("run.log"))) == 1  # the waiting run was not started


def test_a_job_warned_of_its_time_limit_is_submitted_again_and_resumes(
    slurm: Environment, tmp_path: Path, train: Command
) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    job = (
        "optimizer._target_=tests.helpers.misbehaving.IsSlowAtFirst",
        "max_epochs=6",
        "trainer.checkpoint_minutes=100",
    )
    limit = (
        "hydra.launcher.timeout_min=10",
        "hydra.launcher.max_num_timeout=1",
    )  # submitit takes any SIGUSR2 for it
    sweep = start(cut, *SLURM, WITHOUT_GPUS, *limit, *job, **slurm, PYTHONPATH=WITH_TESTS, SLOW_AT_FIRST="1")
    until(lambda: list(cut.rglob("last.ckpt")))
    of_slurm(slurm, "scancel", "--signal=USR2", "--me")  # as Slurm does before the limit
    out, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, out
    assert "1 run: 1 finished" in out
    (log,) = cut.rglob("run.log")
    assert log.read_text().count("$ python ") == 2
    assert "goes on from step" in log.read_text()
    assert train(*DIGITS, *job).code == 0
    assert_same(cut, tmp_path / "outputs")
