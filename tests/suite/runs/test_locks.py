from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout
from tests.helpers.commands import environment

from backforward_suite.runs.locks import LOCK, held, is_taken

HOLDS = """
import sys
from pathlib import Path
from backforward_suite.runs.locks import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    assert not is_taken(tmp_path)
    with held(tmp_path):
        assert is_taken(tmp_path)
        with pytest.raises(Timeout), held(tmp_path):
            pass
    assert not is_taken(tmp_path)


def test_a_folder_stays_held_when_its_lock_file_is_deleted(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    (tmp_path / LOCK).unlink()
    assert is_taken(tmp_path)
    with pytest.raises(Timeout), held(tmp_path):
        pass
    other.communicate("")
    assert not is_taken(tmp_path)


def test_no_folder_is_not_taken(tmp_path: Path) -> None:
    assert not is_taken(tmp_path / "nowhere")
