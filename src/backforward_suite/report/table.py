"""A sweep as a table: one row for each setting, mean and spread over seeds."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table

from backforward_suite.config import deciding
from backforward_suite.errors import BadInput
from backforward_suite.runs.files import DONE, Result, check_complete, natural, read_result, result_folders

# Heading, number in result.json, format.
COLUMNS: tuple[tuple[str, Callable[[Result], float | None], str], ...] = (
    ("loss", lambda result: result["final"].get("loss/train"), ".4f"),
    ("val. %", lambda result: _percent(result["final"].get("accuracy/validation")), ".2f"),
    ("test %", lambda result: _percent(result["final"].get("accuracy/test")), ".2f"),
    ("norm", lambda result: result["final"].get("weight_norm/total"), ".2f"),
    ("sec.", lambda result: result["timing"]["seconds"], ".1f"),
)


NOTE = (
    "Mean±standard deviation over seeds, after the last epoch: training loss, validation and test accuracy, L2 norm of "
    "all parameters, seconds of a run."
)
LEAST = 20  # characters for the settings of a row


@dataclass(frozen=True)
class TableRow:
    """A setting and its runs, one a seed."""

    setting: dict[str, Any]
    members: Sequence[Result]

    @property
    def diverged(self) -> int:
        """The number of diverged runs."""
        return sum(result["status"] == "diverged" for result in self.members)

    def values(self, read: Callable[[Result], float | None]) -> list[float]:
        """A number of each run in which it was measured."""
        return [value for value in map(read, self.members) if value is not None]


def sweep_table(root: Path, where: Mapping[str, str] | None = None, sort: str | None = None) -> Group:
    """Tabulate the finished runs below a folder.

    Args:
        root: A sweep's folder, `outputs/<name>`.
        where: Settings that runs must have, such as `{"data": "mnist"}`.
        sort: A setting or a heading to sort rows by, the best first; by default rows are sorted by their settings.

    Returns:
        A table for each data set and number of epochs, with a row for each setting and mean and spread over its seeds.
        Runs on different data, or with different source of the user's own, get different rows. Below the tables there
        is a line for each result that cannot be read.

    Raises:
        BadInput: There is no finished run, none with these settings, or no key of that name.
    """
    rows, damaged = _rows(root, where or {})
    tables: list[RenderableType] = []
    sections: dict[str, list[TableRow]] = defaultdict(list)
    for row in rows:
        sections[_section(row.members)].append(row)
    for section, members in sections.items():
        tables += [f"[bold]{escape(root.name)}[/]: {escape(section)}", _Fitted(_sorted(members, sort))]
    return Group(*tables, NOTE, *map(escape, damaged))


def sweep_csv(root: Path, where: Mapping[str, str] | None = None, sort: str | None = None) -> str:
    """The same as CSV in full precision: settings, then mean and standard deviation (sd) of each number."""
    rows, _ = _rows(root, where or {})
    rows = _sorted(rows, sort)
    keys = list(dict.fromkeys(("data", "max_epochs", *_varying([row.setting for row in rows]))))
    numbers = [f"{heading} {kind}" for heading, _, _ in COLUMNS for kind in ("mean", "sd")]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "seeds", "diverged", *numbers])
    for row in rows:
        measured = [row.values(read) for _, read, _ in COLUMNS]
        cells = [[statistics.fmean(v) if v else "", statistics.stdev(v) if len(v) > 1 else ""] for v in measured]
        settings = [row.setting.get(key, "") for key in keys]
        writer.writerow([*settings, len(row.members), row.diverged, *(cell for pair in cells for cell in pair)])
    return text.getvalue()


def _rows(root: Path, where: Mapping[str, str]) -> tuple[list[TableRow], list[str]]:
    done, damaged = _finished(root)
    results = list({_identity(result): result for result in done}.values())  # equal settings are one run
    if not results:
        raise BadInput("; ".join(damaged) or f"{root}: no finished run here; make quickstart trains some")
    keys = {key for result in results for key in _setting(result)}
    for key, value in where.items():
        _check_key(key, keys)
        there = sorted({str(_setting(result).get(key)) for result in results}, key=natural)
        results = [result for result in results if str(_setting(result).get(key)) == value]
        if not results:
            raise BadInput(f"--where {key}={value}: no finished run has that; there are {', '.join(there)}")
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[json.dumps({**_setting(result), **_stands_on(result), "seed": None}, sort_keys=True)].append(result)
    settings = _told_apart(list(groups.values()))
    return [TableRow(setting, members) for setting, members in zip(settings, groups.values(), strict=True)], damaged


def _check_key(key: str, keys: Iterable[str]) -> None:
    if key not in keys:
        close = difflib.get_close_matches(key, list(keys), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadInput(f"{key}: no run has a setting of that name{hint}")


def _sorted(rows: Sequence[TableRow], sort: str | None) -> list[TableRow]:
    varying = _varying([row.setting for row in rows])
    ordered = sorted(rows, key=lambda row: [natural(str(row.setting.get(key))) for key in varying])
    if sort is None:
        return ordered
    for heading, read, _ in COLUMNS:
        if sort in (heading, heading.split()[0].rstrip(".")):
            sign = -1 if heading.endswith("%") else 1  # the highest accuracy, the lowest loss
            means = {id(row): statistics.fmean(row.values(read) or [sign * math.inf]) for row in rows}
            return sorted(ordered, key=lambda row: sign * means[id(row)])
    _check_key(sort, {key for row in rows for key in row.setting})
    return sorted(ordered, key=lambda row: natural(str(row.setting.get(sort))))


class _Fitted:
    """A table that fits the console without truncating numbers.

    If the settings do not fit beside the numbers, they share one column; if that is too narrow, the last numbers are
    left out, and a line says so.
    """

    def __init__(self, rows: Sequence[TableRow]) -> None:
        self.rows = rows
        self.keys = _varying([row.setting for row in rows])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        numbers = [("seeds", [str(len(row.members)) for row in self.rows])]
        if any(row.diverged for row in self.rows):
            numbers.append(("diverged", [str(row.diverged or "") for row in self.rows]))
        for heading, read, form in COLUMNS:
            numbers.append((heading, [mean_and_spread(row.values(read), form) for row in self.rows]))
        left_out: list[str] = []
        while len(numbers) > 2 and options.max_width - _widths(numbers) < LEAST:
            left_out.insert(0, numbers.pop()[0])
        room = options.max_width - _widths(numbers)
        settings = [(key, [str(row.setting.get(key, "-")) for row in self.rows]) for key in self.keys]
        if _widths(settings) > room:
            settings = [("setting", [self._in_words(row) for row in self.rows])]
        table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
        for heading, _ in settings:
            table.add_column(heading, overflow="fold", no_wrap=len(settings) > 1)
        for heading, _ in numbers:
            table.add_column(heading, justify="right", no_wrap=True)
        for cells in zip(*(cells for _, cells in (*settings, *numbers)), strict=True):
            table.add_row(*map(escape, cells))
        yield table
        if left_out:
            yield f"Not shown, as the console is too narrow: {', '.join(left_out)} (--csv has all)."

    def _in_words(self, row: TableRow) -> str:
        here = [(key, row.setting[key]) for key in self.keys if row.setting.get(key) is not None]
        return " ".join(str(value) if key == "method" else f"{key}={value}" for key, value in here)


def _widths(columns: Sequence[tuple[str, list[str]]]) -> int:
    """The width of columns with a space between them."""
    return sum(max(len(text) for text in (heading, *cells)) + 1 for heading, cells in columns) + 1


def _finished(root: Path) -> tuple[list[Result], list[str]]:
    """The results of finished runs below a folder, and messages about those that cannot be read."""
    done: list[Result] = []
    damaged: list[str] = []
    for folder in result_folders(root):
        try:
            result = read_result(folder)
            if result is not None and result["status"] in DONE:
                check_complete(folder, result)
                done.append(result)
        except BadInput as error:
            damaged.append(f"left out: {error}")
    return done, damaged


def _stands_on(result: Result) -> dict[str, Any]:
    """What else decides a result: the content of its data, and the user's own source."""
    return {"data content": result["data"].get("sha256"), "own source": result.get("code", {}).get("own")}


def _identity(result: Result) -> str:
    return json.dumps([result["settings_hash"], _stands_on(result)], sort_keys=True)


def _told_apart(groups: Sequence[Sequence[Result]]) -> list[dict[str, Any]]:
    """The setting of each group, with checksums of what else decides if settings alone do not differ."""
    settings = [{**_setting(members[0]), "seed": None} for members in groups]
    alike = [settings.count(setting) > 1 for setting in settings]
    for setting, members, several in zip(settings, groups, alike, strict=True):
        if several:
            setting |= {key: _short(value) for key, value in _stands_on(members[0]).items()}
    return settings


def _short(value: Any) -> str:
    """A short checksum."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8] if value else "-"


def mean_and_spread(values: Sequence[float | None], form: str) -> str:
    """`mean±standard deviation` (n - 1 in the denominator) of what was measured; only the mean of one value."""
    measured = [value for value in values if value is not None]
    if not measured:
        return "-"
    mean = format(statistics.fmean(measured), form)
    return mean if len(measured) == 1 else f"{mean}±{format(statistics.stdev(measured), form)}"


def _setting(result: Result) -> dict[str, Any]:
    """What decides a result: the choices of groups, then the value of each key."""
    values = {key: value for key, value in deciding(result["settings"]).items() if not key.endswith("_target_")}
    return {**result["choices"], **values}


def _varying(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys by which settings differ; a group replaces its keys if its choice determines them."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting if key != "seed"))
    several = [key for key in keys if len({json.dumps(setting.get(key)) for setting in settings}) > 1]
    own = [key for key in several if "." not in key]

    def follows(key: str) -> bool:
        """Whether another key determines it: `lr` determines `optimizer.lr`, `method` determines `method.engine`."""
        values = [json.dumps(setting.get(key)) for setting in settings]
        group = [str(setting.get(key.split(".", maxsplit=1)[0])) for setting in settings]
        of_its_choice = len(set(zip(group, values, strict=True))) == len(set(group))
        return "." in key and (of_its_choice or any(values == [json.dumps(s.get(k)) for s in settings] for k in own))

    return [key for key in several if not follows(key)] or ["method", "lr"]


def _section(results: Sequence[Result]) -> str:
    """Data set and epochs."""
    data, epochs = results[0]["data"], results[0]["settings"]["max_epochs"]
    return f"{data['name']} ({data['train']} training images), {epochs} epoch{'s' if epochs != 1 else ''}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
