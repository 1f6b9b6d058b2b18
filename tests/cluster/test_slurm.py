"""Sweeps through a real Slurm, on one node with fake GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.cluster.single_node_slurm import single_node_slurm, why_not
from tests.conftest import REPOSITORY, TRAIN, environment
from tests.test_sweep import until

from backforward import runs
from backforward.callbacks.checkpoint import read_checkpoint

DIGITS = ("data=digits", "model.hidden=8", "batch_size=64", "trainer.accelerator=cpu")
SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.poll_seconds=0.3")


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    reason = why_not() or (None if find_spec("submitit") else "not installed: submitit (pip install -e '.[slurm]')")
    if reason:
        pytest.skip(reason)
    with single_node_slurm() as inside:
        path = f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}"
        yield environment(PYTHONPATH=path, PATH=inside["PATH"], SLURM_CONF=inside["SLURM_CONF"])


def swept(cwd: Path, slurm: dict[str, str], *arguments: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, str(TRAIN), "-m", *SLURM, *DIGITS, *arguments],
        check=False,
        cwd=cwd,
        env=slurm,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    return ended.returncode, ended.stdout


def test_two_by_two_with_one_failing_pinned_and_resumed(slurm: dict[str, str], tmp_path: Path) -> None:
    targets = "optimizer._target_=torch.optim.SGD,tests.misbehaving.RaisesOnce"
    job = (targets, "seed=0,1", "max_epochs=2")
    code, out = swept(tmp_path, slurm, *job)
    assert code == 1, out
    assert "4 runs: 2 finished, 2 failed" in out, out
    assert out.count("RuntimeError: this time it goes wrong") == 4  # as it happens, and in the summary
    folders = {path.parent.name: path.parent for path in tmp_path.rglob("result.json")}
    results = {name: runs.read_result(folder) for name, folder in folders.items()}
    finished = [result for result in results.values() if result and result["status"] == "finished"]
    # Two at a time on two (fake) GPUs: each saw one, and not the other's.
    assert {result["hardware"]["cuda_visible_devices"] for result in finished} <= {"0", "1"}
    assert all("SLURM" not in key for result in finished for key in result["settings"])

    code, out = swept(tmp_path, slurm, *job)
    assert code == 0, out
    assert "4 runs: 2 finished, 2 done before, skipped" in out


def test_a_job_taken_back_keeps_a_checkpoint(slurm: dict[str, str], tmp_path: Path) -> None:
    long = (
        "hydra.launcher.gpus_per_device=0",
        "max_epochs=100000",
        "trainer.checkpoint_minutes=100",
        "trainer.log_every_n_steps=1",
    )
    sweep = subprocess.Popen(
        [
            sys.executable,
            str(TRAIN),
            "-m",
            *SLURM,
            *DIGITS,
            *long,
            "trainer.devices=1,2",
            "hydra.launcher.gpus_per_device=0",
        ],
        cwd=tmp_path,
        env=slurm,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: len(list(tmp_path.rglob("last.ckpt"))) == 2)
    except AssertionError:
        sweep.kill()
        raise
    one, two = sorted(path.parent for path in tmp_path.rglob("last.ckpt"))
    assert len(read_checkpoint(two / "last.ckpt")["ranks"]) == 2  # two tasks of one job, one run
    subprocess.run(["scancel", "--signal=TERM", "--me"], env=slurm, check=True)  # as when it is preempted
    out, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 1
    assert out.count("stopped by SIGTERM; it goes on from its last checkpoint") == 4, out
    for folder in (one, two):
        assert not runs.is_taken(folder)
        assert read_checkpoint(folder / "last.ckpt")["global_step"] > 0
        assert "stopped by SIGTERM" in runs.last_lines(folder / "run.log", 3)[-1]
