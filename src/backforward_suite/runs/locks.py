"""Locks on run folders: one process at a time trains in a folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"  # in a run's folder


@contextmanager
def locked(folder: Path, timeout: float = 0) -> Iterator[None]:
    """Lock a folder by its lock file, and by itself in case that file is deleted meanwhile.

    Args:
        folder: An existing folder.
        timeout: Seconds to wait for each lock.

    Raises:
        Timeout: Another process holds the lock.
        OSError: The lock file cannot be opened.
    """
    with FileLock(folder / LOCK, timeout=timeout), _itself_locked(folder, timeout):
        yield


def is_taken(folder: Path) -> bool:
    """Whether a process is training in this folder. However a process ends, its lock is released."""
    try:
        with _itself_locked(folder):
            pass
        if (folder / LOCK).is_file():
            with FileLock(folder / LOCK, timeout=0):
                pass
    except Timeout:
        return True
    except OSError:  # there is no folder, or it cannot be opened: the run itself will report what is wrong
        pass
    return False


@contextmanager
def _itself_locked(folder: Path, timeout: float = 0) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Timeout(str(folder)) from None
                time.sleep(0.01)
                continue
            except OSError:  # the file system cannot lock folders
                pass
            break
        yield
    finally:
        os.close(handle)
