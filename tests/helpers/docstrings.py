"""Reads what docstrings state."""

from __future__ import annotations

import inspect


def table_of(documented: object) -> dict[str, list[str]]:
    """Return the rows of the Markdown table in a docstring, by their first cell, without the head."""
    lines = [line for line in (inspect.getdoc(documented) or "").splitlines() if line.startswith("|")]
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    return {first: rest for first, *rest in rows}
