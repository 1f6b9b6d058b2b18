"""Whether the files of finished runs are unchanged: checksums, settings, tables, checkpoints, data, source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from backforward_suite.config import fingerprint
from backforward_suite.errors import BadInput
from backforward_suite.runs.files import DONE, Result, changed_tables, has_checksum, read_result, result_folders

# A check of the caller's, which may load torch: a folder and its result -> what is wrong, or an empty string.
Look = Callable[[Path, Result], str]

OK, UNKNOWN = "ok", "-"


@dataclass(frozen=True)
class Verified:
    """One run.

    Attributes:
        folder: Its folder.
        checks: For each check `ok`, `-` if there is nothing to compare with (runs of older versions), or what is wrong.
    """

    folder: Path
    checks: Mapping[str, str]

    @property
    def wrong(self) -> bool:
        """Whether any check failed."""
        return any(found not in (OK, UNKNOWN) for found in self.checks.values())


def verified(root: Path, looks: Mapping[str, Look]) -> list[Verified]:
    """Check all finished runs below a folder.

    Args:
        root: A sweep's folder, `outputs/<name>`, or any above it.
        looks: Further checks, by name; a check that raises `BadInput` has failed.

    Raises:
        BadInput: There is no finished run.
    """
    found = [one for one in (_verified(folder, looks) for folder in result_folders(root)) if one is not None]
    if not found:
        raise BadInput(f"{root}: no finished run here; give a sweep's folder, such as outputs/quickstart")
    return found


def _verified(folder: Path, looks: Mapping[str, Look]) -> Verified | None:
    try:
        result = read_result(folder)
    except BadInput as error:
        return Verified(folder, {"result": str(error)})
    if result is None or result["status"] not in DONE:
        return None
    checks = {"result": OK if has_checksum(folder) else UNKNOWN, "settings": _settings(result)}
    checks["tables"] = (changed_tables(folder, result) or OK) if "files" in result else UNKNOWN
    for name, look in looks.items():
        checks[name] = _looked(look, folder, result)
    return Verified(folder, checks)


def _settings(result: Mapping[str, Any]) -> str:
    same = fingerprint(result.get("settings", {})) == result.get("settings_hash")
    return OK if same else "settings do not match their hash"


def _looked(look: Look, folder: Path, result: Result) -> str:
    try:
        return look(folder, result) or OK
    except (BadInput, OSError) as error:
        return str(error)


def table_of(found: list[Verified], root: Path) -> RenderableType:
    """A line a run, and below the table what is wrong with changed runs."""
    names = list(dict.fromkeys(name for one in found for name in one.checks))
    table = Table()
    table.add_column("run", overflow="fold")
    for name in names:
        table.add_column(name)
    for one in found:
        cells = [one.checks.get(name, UNKNOWN) for name in names]
        place = str(one.folder.relative_to(root)) if one.folder != root else one.folder.name
        table.add_row(escape(place), *(cell if cell in (OK, UNKNOWN) else "WRONG" for cell in cells))
    faults = [
        f"[bold]{escape(str(one.folder))}[/]: {escape(cell)}"
        for one in found
        for cell in one.checks.values()
        if cell not in (OK, UNKNOWN)
    ]
    wrong = sum(one.wrong for one in found)
    runs = "run" if len(found) == 1 else "runs"
    return Group(table, *faults, f"{len(found)} finished {runs}: {wrong} changed")
