"""What is shown to a user as a line instead of a traceback."""

from __future__ import annotations

import errno
from pathlib import Path


class BadInput(ValueError):
    """What was given cannot be used. The message is one line: what is wrong, and what would be right."""


class Busy(BadInput):
    """Another process has the run's folder; it may be had later."""


class Refused(BadInput):
    """A folder holds a run that is another than the one asked for; the same command is refused again."""


class Stopped(BaseException):
    """The process was asked to end (SIGTERM). No `Exception`: nothing failed, and nobody should go on."""


def os_error(error: OSError) -> str:
    """An error of the file system in one line."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full; free some space and give the same command again: finished runs are kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}may not be written here ({error.strerror}); change its rights or work in another folder"
    if isinstance(error.filename, str) and error.errno in (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        for path in (Path(error.filename), *Path(error.filename).parents):
            if path.is_symlink() and not path.exists():
                return (
                    f"{path} is a link to {path.readlink()}, which is not there; make that folder, or remove the link"
                )
            if path.is_file() and error.errno != errno.ENOENT:
                return f"{path} is a file, and a folder is needed there; move it away"
    if error.errno == errno.EFBIG:
        return f"{where}no file may grow so large here; raise the limit (ulimit -f)"
    return f"{where}{error.strerror or error}"


def cause_of(error: BaseException) -> str:
    """Why a run failed, in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory ({text})" if text else "out of memory"
    if isinstance(error, BadInput):
        return text
    if isinstance(error, OSError) and error.errno is not None:
        return os_error(error)
    return f"{kind}: {text}" if text else kind
