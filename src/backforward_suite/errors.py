"""Errors that a user sees as one line instead of a traceback."""

from __future__ import annotations

import errno
from pathlib import Path


class BadInput(ValueError):
    """The input cannot be used. The message is one line: what is wrong, and what would be right."""


class Busy(BadInput):
    """Another process has the run's folder; try again later."""


class Refused(BadInput):
    """A folder has another run than the requested one; the same command will be refused again."""


class Stopped(BaseException):
    """The process was told to end (SIGTERM). Not an `Exception`: nothing failed, and no handler should continue."""


def os_error(error: OSError) -> str:
    """Explain an error of the file system in one line."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full; free some space and give the same command again: finished runs are kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}cannot be written ({error.strerror}); change its rights or work in another folder"
    if isinstance(error.filename, str) and error.errno in (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        for path in (Path(error.filename), *Path(error.filename).parents):
            if path.is_symlink() and not path.exists():
                return (
                    f"{path} is a link to {path.readlink()}, which does not exist; make that folder, or remove the link"
                )
            if path.is_file() and error.errno != errno.ENOENT:
                return f"{path} is a file where a folder is needed; move it away"
    if error.errno == errno.EFBIG:
        return f"{where}the file would exceed the limit on file sizes; raise it (ulimit -f)"
    return f"{where}{error.strerror or error}"


def cause_of(error: BaseException) -> str:
    """Return in one line why a run failed."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory ({text})" if text else "out of memory"
    if isinstance(error, BadInput):
        return text
    if isinstance(error, OSError) and error.errno is not None:
        return os_error(error)
    return f"{kind}: {text}" if text else kind
