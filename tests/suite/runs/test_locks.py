from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import Timeout
from tests.helpers.commands import environment

from backforward_suite.runs import locks
from backforward_suite.runs.locks import LOCK, is_taken, locked

HOLDS = """
import sys
from pathlib import Path
from backforward_suite.runs.locks import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_one_process_locks_a_folder(tmp_path: Path) -> None:
    assert not is_taken(tmp_path)
    with locked(tmp_path):
        assert is_taken(tmp_path)
        with pytest.raises(Timeout), locked(tmp_path):
            pass
    assert not is_taken(tmp_path)


def test_a_folder_stays_locked_when_its_lock_file_is_deleted(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    (tmp_path / LOCK).unlink()
    assert is_taken(tmp_path)
    with pytest.raises(Timeout), locked(tmp_path):
        pass
    other.communicate("")
    assert not is_taken(tmp_path)


def test_a_process_that_only_checks_a_folder_makes_no_other_fail(tmp_path: Path) -> None:
    checks = locks._itself_locked(tmp_path)  # what `is_taken` does for a moment
    checks.__enter__()
    release = threading.Timer(0.05, checks.__exit__, (None, None, None))
    release.start()
    with locked(tmp_path, timeout=30):
        assert is_taken(tmp_path)
    release.join()


def test_no_folder_is_not_taken(tmp_path: Path) -> None:
    assert not is_taken(tmp_path / "nowhere")
