"""The sweep that each launcher is tested with: 2 x 2 runs, one setting fails; then the same command again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.sweeps import WITH_TESTS, start

from backforward_suite.runs import files

JOB = ("optimizer._target_=torch.optim.SGD,tests.helpers.misbehaving.RaisesOnce", "seed=0,1")


def fails_once_then_ends(
    cwd: Path, *launcher: str, meanwhile: Callable[[], None] = lambda: None, **changes: str
) -> list[dict[str, Any]]:
    """Sweep: two of four runs fail, and the same command then runs only these.

    Args:
        cwd: An empty folder.
        launcher: Further arguments.
        meanwhile: Called during the first sweep.
        changes: Changes to the environment.

    Returns:
        The results of the runs that did not fail.
    """
    changes = {"PYTHONPATH": WITH_TESTS, **changes}
    first = start(cwd, *launcher, *JOB, **changes)
    meanwhile()
    out, _ = first.communicate(timeout=200)
    assert first.returncode == 1, out
    assert "4 runs: 2 finished, 2 failed" in out, out
    assert out.count("RuntimeError: this time it goes wrong") == 4  # as it happens, and in the summary
    results = [files.read_result(path.parent) for path in cwd.rglob("result.json")]
    finished = [result for result in results if result and result["status"] == "finished"]
    assert len(finished) == 2

    second = start(cwd, *launcher, *JOB, **changes)
    out, _ = second.communicate(timeout=200)
    assert second.returncode == 0, out
    assert "4 runs: 2 finished, 2 done before, skipped" in out
    return finished
