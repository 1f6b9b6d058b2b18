"""A sweep on a real Ray cluster, to which a second node is added in the midst of it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.cluster.local_ray import local_ray
from tests.conftest import REPOSITORY, TRAIN, environment
from tests.test_sweep import until

from backforward import runs

RAY = ("hydra/launcher=ray", "data=digits", "model.hidden=8", "batch_size=64", "trainer.accelerator=cpu")


def sweep(cwd: Path, inside: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TRAIN), "-m", *RAY, *arguments],
        cwd=cwd,
        env=inside,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(find_spec("ray") is None, reason="not installed: ray (pip install -e '.[ray]')")
def test_two_by_two_with_one_failing_a_node_added_and_resumed(tmp_path: Path) -> None:
    inside = environment(PYTHONPATH=f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}")
    with local_ray(inside) as (address, add_node):
        job = (
            f"hydra.launcher.init.address='{address}'",
            *("optimizer._target_=torch.optim.SGD,tests.misbehaving.RaisesOnce", "seed=0,1", "max_epochs=20"),
        )
        first = sweep(tmp_path, inside, *job)
        until(lambda: list(tmp_path.rglob("last.ckpt")))
        assert len(list(tmp_path.rglob("run.log"))) == 1  # one GPU, one run at a time
        add_node()
        out, _ = first.communicate(timeout=200)
        assert first.returncode == 1, out
        assert "4 runs: 2 finished, 2 failed" in out, out
        assert out.count("RuntimeError: this time it goes wrong") == 4  # as it happens, and in the summary
        results = [runs.read_result(path.parent) for path in tmp_path.rglob("result.json")]
        finished = [result for result in results if result and result["status"] == "finished"]
        # Each run saw one (fake) GPU.
        assert {result["hardware"]["cuda_visible_devices"] for result in finished} == {"0"}

        second = sweep(tmp_path, inside, *job)
        out, _ = second.communicate(timeout=200)
        assert second.returncode == 0, out
        assert "4 runs: 2 finished, 2 done before, skipped" in out
