"""Files that appear whole or not at all. Needs the standard library alone."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_UMASK = os.umask(0)  # cannot be read without being set
os.umask(_UMASK)


@contextmanager
def whole(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under its name whole or not at all: written beside it, flushed to disk, then renamed.

    Raises:
        OSError: With the file's name: the disk is full, or cannot be written to.
    """
    beside: Path | None = None
    text = "b" not in mode
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        beside = Path(name)
        with os.fdopen(handle, mode, encoding="utf-8" if text else None, newline="" if text else None) as file:
            beside.chmod(0o666 & ~_UMASK)  # mkstemp lets nobody else read
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):  # as on a disk that has become read-only: the first error says why
            if beside is not None:
                beside.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def remove_half_written(folder: Path, names: Iterable[str]) -> None:
    """Remove the files that a process killed in `whole` left in a folder, of these names alone."""
    ours = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[a-z0-9_]{{8}}\.tmp")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)
