"""What is shown to a user as a line instead of a traceback."""

from __future__ import annotations


class BadInput(ValueError):
    """What was given cannot be used. The message is one line: what is wrong, and what would be right."""


class Busy(BadInput):
    """Another process has the run's folder; it may be had later."""


class Stopped(BaseException):
    """The process was asked to end (SIGTERM). No `Exception`: nothing failed, and nobody should go on."""
