"""Sweeps on a real Ray cluster with nodes that join and fail."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.helpers.commands import Command, environment
from tests.helpers.failing_sweep import fails_once_then_ends
from tests.helpers.local_ray import local_ray
from tests.helpers.sweeps import DIGITS, WITH_TESTS, assert_same, start, tree, until

from backforward_suite.runs import files, locks

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="not installed: ray (pip install -e '.[ray]')"),
]

LONG = ("max_epochs=100000", "trainer.checkpoint_minutes=100")


def on(address: str) -> tuple[str, ...]:
    return ("-m", "hydra/launcher=ray", f"hydra.launcher.init.address='{address}'")


def test_two_by_two_with_one_failing_a_node_added_and_resumed(tmp_path: Path) -> None:
    with local_ray(environment(PYTHONPATH=WITH_TESTS)) as cluster:

        def one_at_a_time_then_two() -> None:
            until(lambda: list(tmp_path.rglob("last.ckpt")))
            assert len(list(tmp_path.rglob("run.log"))) == 1  # one GPU, one run
            cluster.add_node()

        job = (*on(cluster.address), *DIGITS, "max_epochs=20")
        finished = fails_once_then_ends(tmp_path, *job, meanwhile=one_at_a_time_then_two)
    # Each run saw one (fake) GPU, of its own node.
    assert {result["timing"]["cuda_visible_devices"] for result in finished} == {"0"}


def test_a_run_whose_node_is_lost_resumes_elsewhere(tmp_path: Path, train: Command) -> None:
    slow = "optimizer._target_=tests.helpers.misbehaving.IsSlowAtFirst"
    job = (*DIGITS, slow, "max_epochs=6", "trainer.checkpoint_minutes=0.005")
    lost = tmp_path / "lost"
    lost.mkdir()
    with local_ray(environment(PYTHONPATH=WITH_TESTS, SLOW_AT_FIRST="1")) as cluster:
        cluster.add_node()
        sweep = start(lost, *on(cluster.address), *job, "+hydra.launcher.remote.resources={added: 1}")
        until(lambda: list(lost.rglob("last.ckpt")))
        cluster.lose_node()
        cluster.add_node()
        out, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, out
    assert "1 run: 1 finished" in out
    (log,) = lost.rglob("run.log")
    assert log.read_text().count("$ python ") == 2
    assert "goes on from step" in log.read_text()
    assert train(*job).code == 0
    assert_same(lost, tmp_path / "outputs")


def test_ctrl_c_cancels_the_tasks(tmp_path: Path) -> None:
    with local_ray(environment()) as cluster:
        sweep = start(tmp_path, *on(cluster.address), *DIGITS, *LONG, "seed=0,1")
        until(lambda: list(tmp_path.rglob("last.ckpt")))
        (checkpoint,) = tmp_path.rglob("last.ckpt")
        before = checkpoint.stat().st_mtime_ns
        family = tree(sweep.pid)
        os.kill(sweep.pid, signal.SIGINT)
        out, _ = sweep.communicate(timeout=60)
        assert sweep.returncode == 130, out
        assert out.splitlines()[-1] == "error: interrupted; the same command resumes"
        assert "Traceback" not in out
        assert len(family) == 1  # the run is a child of its node, and has ended too
        assert not locks.is_taken(checkpoint.parent)
        assert checkpoint.stat().st_mtime_ns > before
        assert "stopped by SIGTERM" in files.last_lines(checkpoint.parent / "run.log", 1)[0]
        assert len(list(tmp_path.rglob("run.log"))) == 1  # the waiting run was not started
