"""A sweep as a table: one row for each setting, mean and spread over seeds."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from backforward_suite.config import deciding
from backforward_suite.errors import BadInput
from backforward_suite.runs.files import DONE, Result, check_complete, natural, read_result, result_folders

# Heading, where the number stands in result.json, and how it is written.
COLUMNS: tuple[tuple[str, Callable[[Result], float | None], str], ...] = (
    ("loss", lambda result: result["final"].get("loss/train"), ".4f"),
    ("val. %", lambda result: _percent(result["final"].get("accuracy/validation")), ".2f"),
    ("test %", lambda result: _percent(result["final"].get("accuracy/test")), ".2f"),
    ("norm", lambda result: result["final"].get("weight_norm/total"), ".2f"),
    ("sec.", lambda result: result["timing"]["seconds"], ".1f"),
)


def sweep_table(root: Path) -> Group:
    """Tabulate the finished runs below a folder.

    Args:
        root: A sweep's folder, `outputs/<name>`.

    Returns:
        What was run, and a row for each setting that the runs differ in, seeds apart: mean and
        spread over its seeds. Runs on other data, or of other source of one's own, are apart as well. Below it a line
        for each result that cannot be read.

    Raises:
        BadInput: There is no finished run.
    """
    done, damaged = _finished(root)
    results = list({_identity(result): result for result in done}.values())  # equal settings are one run
    if not results:
        raise BadInput("; ".join(damaged) or f"{root}: no finished run here; make quickstart trains some")
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[json.dumps({**_setting(result), **_stands_on(result), "seed": None}, sort_keys=True)].append(result)
    settings = _told_apart(list(groups.values()))
    varying = _varying(settings)

    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for key in varying:
        table.add_column(key, overflow="fold")
    table.add_column("seeds", justify="right")
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right", overflow="fold")
    rows = zip(settings, groups.values(), strict=True)
    for setting, members in sorted(rows, key=lambda row: [natural(str(row[0].get(key))) for key in varying]):
        diverged = sum(result["status"] == "diverged" for result in members)
        seeds = str(len(members)) + (f" ({diverged} diverged)" if diverged else "")
        cells = [mean_and_spread([read(result) for result in members], form) for _, read, form in COLUMNS]
        table.add_row(*(escape(str(setting.get(key, "-"))) for key in varying), seeds, *cells)
    return Group(f"[bold]{escape(root.name)}[/]: {escape(_scale(results))}", table, *map(escape, damaged))


def _finished(root: Path) -> tuple[list[Result], list[str]]:
    """The results of finished runs below a folder, and what is wrong with those that cannot be read."""
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
    """What else decides a result: the content of its data, the source of one's own."""
    return {"data content": result["data"].get("sha256"), "own source": result.get("code", {}).get("own")}


def _identity(result: Result) -> str:
    return json.dumps([result["settings_hash"], _stands_on(result)], sort_keys=True)


def _told_apart(groups: Sequence[Sequence[Result]]) -> list[dict[str, Any]]:
    """The setting of each group; with it a short form of what else decides, where settings alone do not differ."""
    settings = [{**_setting(members[0]), "seed": None} for members in groups]
    alike = [settings.count(setting) > 1 for setting in settings]
    for setting, members, several in zip(settings, groups, alike, strict=True):
        if several:
            setting |= {key: _short(value) for key, value in _stands_on(members[0]).items()}
    return settings


def _short(value: Any) -> str:
    """A checksum that can be told from others at a glance."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8] if value else "-"


def mean_and_spread(values: Sequence[float | None], form: str) -> str:
    """`mean ± standard deviation` (n - 1 in the denominator) of what was measured; the mean alone of one value."""
    measured = [value for value in values if value is not None]
    if not measured:
        return "-"
    mean = format(statistics.fmean(measured), form)
    return mean if len(measured) == 1 else f"{mean}±{format(statistics.stdev(measured), form)}"


def _setting(result: Result) -> dict[str, Any]:
    """What decides a result, in words: the choices of groups, then what each key was set to."""
    values = {key: value for key, value in deciding(result["settings"]).items() if not key.endswith("_target_")}
    return {**result["choices"], **values}


def _varying(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys by which settings differ; a group whose choice tells all of its keys apart stands for them."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting if key != "seed"))
    several = [key for key in keys if len({json.dumps(setting.get(key)) for setting in settings}) > 1]
    own = [key for key in several if "." not in key]

    def follows(key: str) -> bool:
        """Whether it only follows from another: `optimizer.lr` from `lr`, `method.engine` from `method`."""
        values = [json.dumps(setting.get(key)) for setting in settings]
        group = [str(setting.get(key.split(".", maxsplit=1)[0])) for setting in settings]
        of_its_choice = len(set(zip(group, values, strict=True))) == len(set(group))
        return "." in key and (of_its_choice or any(values == [json.dumps(s.get(k)) for s in settings] for k in own))

    return [key for key in several if not follows(key)] or ["method", "lr"]


def _scale(results: Sequence[Result]) -> str:
    """On what, and how long."""
    data = sorted({f"{result['data']['name']} ({result['data']['train']} training images)" for result in results})
    epochs = sorted({result["settings"]["max_epochs"] for result in results})
    return (
        f"{', '.join(data)}, {', '.join(map(str, epochs))} epochs.\n"
        "Mean±standard deviation over seeds, after the last epoch: training loss,\n"
        "validation and test accuracy, L2 norm of all parameters, seconds of a run."
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
