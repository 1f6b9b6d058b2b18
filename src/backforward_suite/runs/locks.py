"""One process trains in a run's folder: it holds the folder's lock."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"  # in a run's folder, held while it trains


def is_taken(folder: Path) -> bool:
    """Whether a process is training in this folder. Its lock goes with it, however it ends."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
