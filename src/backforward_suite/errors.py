"""What is shown to a user as a line instead of a traceback."""

from __future__ import annotations


class BadInput(ValueError):
    """What was given cannot be used. The message is one line: what is wrong, and what would be right."""


class Busy(BadInput):
    """Another process has the run's folder; it may be had later."""


class Refused(BadInput):
    """A folder holds a run that is another than the one asked for; the same command is refused again."""


class Stopped(BaseException):
    """The process was asked to end (SIGTERM). No `Exception`: nothing failed, and nobody should go on."""


def cause_of(error: BaseException) -> str:
    """Why a run failed, in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory ({text})" if text else "out of memory"
    if isinstance(error, BadInput):
        return text
    return f"{kind}: {text}" if text else kind
