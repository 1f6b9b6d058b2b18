"""Tables of strings, and the description of the runs behind an experiment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from backforward_suite.report.finding import Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

INTERVALS = (
    "Mean [95 % interval] over seeds: Student's t; for fewer than 10 values or heavy tails the wider of it and the BCa "
    "bootstrap."
)


def hardware(runs: Iterable[Run]) -> str:
    """Devices and threads that the runs used, each combination once."""
    told = []
    for run in runs:
        threads = run.result.get("timing", {}).get("threads")
        told.append(run.hardware + (f", {threads} thread{'' if threads == 1 else 's'} a run" if threads else ""))
    return "; ".join(dict.fromkeys(told))


def setting_of(runs: Sequence[Run]) -> str:
    """Data, epochs, seeds and width of the runs, in one line."""
    origins = (run.result.get("data", {}) for run in runs)
    data = dict.fromkeys(f"{of.get('name')} ({of.get('train'):,} training images)" for of in origins if of.get("train"))
    epochs, seeds = sorted({int(run.setting("max_epochs", 0)) for run in runs}), {run.seed for run in runs}
    widths = sorted({run.setting("model.width") for run in runs if run.setting("model.width")})
    parts = [
        ", ".join(data),
        f"{', '.join(map(str, epochs))} {'epoch' if epochs == [1] else 'epochs'}",
        f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}",
        f"NIN at width {', '.join(f'{width:g}' for width in widths)}" if widths else "",
    ]
    return "; ".join(filter(None, parts))


def table(title: str, rows: Sequence[Mapping[str, object]], note: str = "") -> Table:
    """A table of strings; a row without a column, or with None in it, gets a dash."""
    frame = pd.DataFrame([{key: "-" if cell is None else str(cell) for key, cell in row.items()} for row in rows])
    return Table(title, frame.fillna("-"), note.strip())


def shown(found: Effect) -> str | None:
    """An effect in a table: its estimate and the number of pairs it lacks, or its note if it has no values."""
    if not found.values:
        return found.note or None
    lacks = f" ({len(found.values)} of {len(found.values) + found.lost} pairs)" if found.lost else ""
    return f"{found.estimate()}{lacks}"
