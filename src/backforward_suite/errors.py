"""Errors that a user sees as one line instead of a traceback."""

from __future__ import annotations


class BadInput(ValueError):
    """The input cannot be used. The message is one line: what is wrong, and what would be right."""


class Busy(BadInput):
    """Another process has the run's folder; try again later."""


class Refused(BadInput):
    """A folder has another run than the requested one; the same command will be refused again."""


class Stopped(BaseException):
    """The process was told to end (SIGTERM). Not an `Exception`: nothing failed, and no handler should continue."""


def cause_of(error: BaseException) -> str:
    """Return in one line why a run failed."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory ({text})" if text else "out of memory"
    if isinstance(error, BadInput):
        return text
    return f"{kind}: {text}" if text else kind
