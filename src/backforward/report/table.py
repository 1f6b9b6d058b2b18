"""A sweep as a table: one row for each setting, mean and spread over seeds."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from backforward.errors import BadInput
from backforward.runs import DONE, Result, natural, read_result, result_folders
from backforward.settings import deciding

# Heading, where the number stands in result.json, and how it is written.
COLUMNS: tuple[tuple[str, Callable[[Result], float | None], str], ...] = (
    ("train loss", lambda result: result["final"].get("loss/train"), ".4f"),
    ("validation acc. %", lambda result: _percent(result["final"].get("accuracy/validation")), ".2f"),
    ("test acc. %", lambda result: _percent(result["final"].get("accuracy/test")), ".2f"),
    ("weight norm", lambda result: result["final"].get("weight_norm/total"), ".2f"),
    ("seconds", lambda result: result["timing"]["seconds"], ".1f"),
)


def sweep_table(root: Path) -> Table:
    """Tabulate the finished runs below a folder.

    Args:
        root: A sweep's folder, `outputs/<name>`.

    Returns:
        A row for each setting that the runs differ in, seeds apart: `mean ± standard deviation` over its seeds.

    Raises:
        BadInput: There is no finished run, or a result is damaged.
    """
    results = [result for result in map(read_result, result_folders(root)) if result and result["status"] in DONE]
    if not results:
        raise BadInput(f"{root}: no finished run here; make quickstart trains some")
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[json.dumps({**_setting(result), "seed": None}, sort_keys=True)].append(result)
    varying = _varying([_setting(members[0]) for members in groups.values()])

    table = Table(title=f"{root.name}: {_scale(results)}", title_justify="left")
    for key in varying:
        table.add_column(key)
    table.add_column("seeds", justify="right")
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for members in sorted(
        groups.values(), key=lambda members: [natural(str(_setting(members[0])[k])) for k in varying]
    ):
        diverged = sum(result["status"] == "diverged" for result in members)
        seeds = str(len(members)) + (f" ({diverged} diverged)" if diverged else "")
        cells = [mean_and_spread([read(result) for result in members], form) for _, read, form in COLUMNS]
        table.add_row(*(str(_setting(members[0])[key]) for key in varying), seeds, *cells)
    return table


def mean_and_spread(values: Sequence[float | None], form: str) -> str:
    """`mean ± standard deviation` (n - 1 in the denominator) of what was measured; the mean alone of one value."""
    measured = [value for value in values if value is not None]
    if not measured:
        return "-"
    mean = format(statistics.fmean(measured), form)
    return mean if len(measured) == 1 else f"{mean} ± {format(statistics.stdev(measured), form)}"


def _setting(result: Result) -> dict[str, Any]:
    """What decides a result, in words: the choices of groups, then what each key was set to."""
    values = {key: value for key, value in deciding(result["settings"]).items() if not key.endswith("_target_")}
    return {**result["choices"], **values}


def _varying(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys by which settings differ; a group whose choice tells all of its keys apart stands for them."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting if key != "seed"))
    several = [key for key in keys if len({json.dumps(setting.get(key)) for setting in settings}) > 1]
    by_choice = {key for key in several if "." in key and key.split(".")[0] in several}
    return [key for key in several if key not in by_choice] or ["method", "lr"]


def _scale(results: Sequence[Result]) -> str:
    """On what, and how long."""
    data = sorted({f"{result['data']['name']} ({result['data']['train']} training images)" for result in results})
    epochs = sorted({result["settings"]["max_epochs"] for result in results})
    return f"{', '.join(data)}, {', '.join(map(str, epochs))} epochs; mean ± standard deviation over seeds"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
