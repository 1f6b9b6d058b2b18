"""The short form of `make torture`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.torture import Standing, check_resumed, compare, torture, undisturbed

BEFORE = Standing(starts=1, step=50, changed=1, done=False)
RESUMED, SILENT = "goes on from step 50, where ...", "a start that prints nothing of the kind"


@pytest.mark.slow
def test_six_kills_change_nothing(tmp_path: Path, mnist_root: Path) -> None:
    for name in ("killed", "alone"):
        (tmp_path / name).mkdir()
    kinds = torture(tmp_path / "killed", mnist_root, kills=6, epochs=3)
    assert len(kinds) == 3  # runs, sweeps, all at once
    undisturbed(tmp_path / "alone", mnist_root, epochs=3)
    compare(tmp_path / "killed", tmp_path / "alone")


@pytest.mark.parametrize(
    ("now", "starts"),
    [
        (Standing(2, 80, 2, done=False), ["", RESUMED]),
        (Standing(2, 90, 2, done=True), ["", RESUMED]),
        (Standing(2, 50, 1, done=False), ["", SILENT]),  # killed before it could print anything
        (Standing(3, 80, 2, done=False), ["", SILENT, RESUMED]),
    ],
)
def test_a_run_that_resumes_passes(tmp_path: Path, now: Standing, starts: list[str]) -> None:
    check_resumed(tmp_path, BEFORE, now, starts)


@pytest.mark.parametrize(
    ("now", "starts"),
    [
        (Standing(2, 80, 2, done=False), ["", SILENT]),
        (Standing(2, 90, 1, done=True), ["", SILENT]),
        (Standing(3, 80, 2, done=False), ["", SILENT, "goes on from step 10"]),
    ],
)
def test_a_run_that_starts_from_scratch_fails(tmp_path: Path, now: Standing, starts: list[str]) -> None:
    with pytest.raises(AssertionError, match="had a checkpoint at step 50"):
        check_resumed(tmp_path, BEFORE, now, starts)
