"""The one kind of error that is shown to a user as a line instead of a traceback."""

from __future__ import annotations


class BadInput(ValueError):
    """What was given cannot be used. The message is one line: what is wrong, and what would be right."""
