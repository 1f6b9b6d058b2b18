"""The short form of `make torture`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.torture import compare, torture, undisturbed


@pytest.mark.slow
def test_six_kills_change_nothing(tmp_path: Path, mnist_root: Path) -> None:
    for name in ("killed", "alone"):
        (tmp_path / name).mkdir()
    kinds = torture(tmp_path / "killed", mnist_root, kills=6, epochs=3)
    assert len(kinds) == 3  # runs, sweeps, all at once
    undisturbed(tmp_path / "alone", mnist_root, epochs=3)
    compare(tmp_path / "killed", tmp_path / "alone")
