"""Makes the n-th file operation of this process below a folder go wrong: the process is killed there, or it fails.

Operations are those of Python: to open a file for writing, to write (the first piece and each larger one), to flush to
disk, to rename, to remove, to make a folder. What native libraries write is not seen; ours write through Python alone.
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

PIECE = 4096  # bytes; smaller pieces after the first of a file are no operations of their own
ACTS = ("kill", "tear", "full", "broken")  # killed before it; killed amid a write; no space; input/output error


class Injector:
    """Counts operations, and spoils one.

    Args:
        root: Operations on paths below it count.
        act: One of `ACTS`; None spoils nothing.
        at: Which operation, from 1.
    """

    def __init__(self, root: Path, act: str | None = None, at: int = 0) -> None:
        self.root, self.act, self.at = str(root.resolve()), act, at
        self.owner = os.getpid()
        self.count = 0
        self.names: list[str] = []

    def concerns(self, path: object) -> bool:
        """Whether a path is watched, in this process."""
        if not isinstance(path, str | bytes | os.PathLike) or os.getpid() != self.owner:
            return False
        return str(Path(os.fsdecode(path)).absolute()).startswith(self.root)

    def operation(self, name: str, path: Any, half: Callable[[], None] = lambda: None) -> None:
        """One has come; `half` does half of it."""
        self.count += 1
        self.names.append(f"{name} {Path(os.fsdecode(path)).name}")
        if self.count != self.at or self.act is None:
            return
        if self.act != "kill":
            half()
        if self.act in ("kill", "tear"):
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.ENOSPC if self.act == "full" else errno.EIO
        raise OSError(number, os.strerror(number))


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
    """Watch from now on, for the rest of this process."""
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
