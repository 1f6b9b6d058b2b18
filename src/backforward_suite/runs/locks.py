"""One process trains in a run's folder: it holds the folder's lock."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"  # in a run's folder, held while it trains


@contextmanager
def held(folder: Path, timeout: float = 0) -> Iterator[None]:
    """Hold a folder: by the lock file, and by the folder itself, which counts where that file is deleted meanwhile.

    Args:
        folder: An existing folder.
        timeout: Seconds to wait for the lock file.

    Raises:
        Timeout: Another process holds it.
        OSError: The lock file cannot be opened.
    """
    with FileLock(folder / LOCK, timeout=timeout):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise Timeout(str(folder)) from None
        except OSError:  # a file system that locks no folders
            pass
        try:
            yield
        finally:
            os.close(handle)


def is_taken(folder: Path) -> bool:
    """Whether a process is training in this folder. Its lock goes with it, however it ends."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # no folder, or none that can be looked into
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        os.close(handle)
    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # its start says what is wrong with it
        return False
