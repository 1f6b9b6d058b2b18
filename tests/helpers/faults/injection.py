"""Makes the n-th file operation of this process below a folder go wrong: the process is killed there, or it fails.

Operations are Python's: open a file for writing, write (the first piece and each larger one), flush to disk, rename,
remove, make a folder. Writes by native libraries are not seen; the project writes through Python alone.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

PIECE = 4096  # bytes; smaller pieces after the first of a file do not count as operations
# Killed before the operation; killed during a write; no space; input/output error; read-only from here on.
ACTS = ("kill", "tear", "full", "broken", "readonly")
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "readonly": errno.EROFS}


class Injector:
    """Counts operations, and makes one go wrong.

    Args:
        root: Operations on paths below it count.
        act: One of `ACTS`; None changes nothing.
        at: Which operation, from 1.
    """

    def __init__(self, root: Path, act: str | None = None, at: int = 0) -> None:
        self.root, self.act, self.at = f"{root.resolve()}{os.sep}", act, at
        self.owner = os.getpid()
        self.names: list[str] = []

    def concerns(self, path: object) -> bool:
        """Whether operations on a path count in this process; once a disk is read-only, it is so for its children."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        counts = os.getpid() == self.owner or (self.act == "readonly" and len(self.names) >= self.at)
        return counts and str(Path(os.fsdecode(path)).absolute()).startswith(self.root)

    def operation(self, name: str, path: Any, half: Callable[[], None] = lambda: None) -> None:
        """Count an operation, and fail or end the process if it is the one; `half` does half of a write."""
        self.names.append(f"{name} {Path(os.fsdecode(path)).name}")
        count = len(self.names)
        if self.act is None or (count < self.at if self.act == "readonly" else count != self.at):
            return
        if self.act in ("tear", "full", "broken"):
            half()
        if self.act in ("kill", "tear"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(ERRORS[self.act], os.strerror(ERRORS[self.act]))


class _File:
    """A file being written, whose operations are counted."""

    def __init__(self, file: Any, path: Any, injector: Injector) -> None:
        self._file, self._path, self._injector = file, path, injector
        self._begun = False

    def write(self, data: Any) -> Any:
        if not self._begun or len(data) >= PIECE:
            self._begun = True
            self._injector.operation("write", self._path, lambda: self._half(data))
        return self._file.write(data)

    def _half(self, data: Any) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def install(injector: Injector) -> None:
    """Count operations for the rest of this process."""
    real_open, real_os_open, real_fdopen, real_fsync = io.open, os.open, os.fdopen, os.fsync
    paths: dict[int, Any] = {}  # by descriptor

    def opened(file: Any, mode: str = "r", *args: Any, **settings: Any) -> Any:
        if not injector.concerns(file) or not set(mode) & set("wax+"):
            return real_open(file, mode, *args, **settings)
        injector.operation("open", file)
        return _File(real_open(file, mode, *args, **settings), file, injector)

    def os_opened(path: Any, flags: int, *args: Any, **settings: Any) -> int:
        watched = injector.concerns(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if watched:
            injector.operation("open", path)
        handle = real_os_open(path, flags, *args, **settings)
        if watched:
            paths[handle] = path
        return handle

    def fd_opened(handle: int, *args: Any, **settings: Any) -> Any:
        file = real_fdopen(handle, *args, **settings)
        return _File(file, paths[handle], injector) if handle in paths and os.getpid() == injector.owner else file

    def synced(handle: int) -> None:
        if handle in paths and os.getpid() == injector.owner:
            injector.operation("fsync", paths[handle])
        real_fsync(handle)

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **settings: Any) -> Any:
            if injector.concerns(path):
                injector.operation(name, path)
            return real(path, *args, **settings)

        return call

    io.open = builtins.open = opened  # type: ignore[assignment]
    os.open, os.fdopen, os.fsync = os_opened, fd_opened, synced  # type: ignore[assignment]
    for name in ("replace", "rename", "unlink", "remove", "mkdir"):
        setattr(os, name, watched(name, getattr(os, name)))
