"""`make` removes an environment of its own, and never a folder of somebody's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.helpers.commands import REPOSITORY


def make(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("src", "tests", "a", "b", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    return tmp_path


@pytest.mark.parametrize("target", ["clean", "setup"])
@pytest.mark.parametrize("folder", ["mine", "a b", "", ".", "src"])
def test_a_folder_that_is_no_environment_stays(place: Path, target: str, folder: str) -> None:
    before = sorted(place.rglob("*"))
    ended = make(place, target, f"VENV={folder}")
    assert ended.returncode == 2
    assert "no virtual environment" in ended.stderr or "without spaces" in ended.stderr
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("mark", ["pyvenv.cfg", ".core"])
def test_an_environment_goes(place: Path, mark: str) -> None:
    (place / "mine" / mark).touch()
    assert make(place, "clean", "VENV=mine").returncode == 0
    assert not (place / "mine").exists()
    assert (place / "a" / "file").exists()
