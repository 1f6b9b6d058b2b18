"""Measure speed: medians over interleaved repeats, ratios within one run; a table on screen, outputs/bench.json.

python src/bench.py                   everything, on a quiet machine
python src/bench.py training rules    some benchmarks
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from backforward_suite import cli
from backforward_suite.arguments import Parser
from backforward_suite.atomic import whole

CONF = Path(__file__).resolve().parents[3] / "conf"

Rows = list[dict[str, Any]]


def _benchmark(name: str) -> Callable[[], Rows]:
    def measure() -> Rows:
        from backforward_suite.data import default_root

        module = import_module(f"backforward_suite.bench.{name}")
        rows: Rows = module.run() if name == "rules" else module.run(default_root())
        return rows

    return measure


BENCHMARKS = {name: _benchmark(name) for name in ("training", "sweep", "rules", "normprop", "diagnostics")}


def main() -> None:
    """Parse the command line, run the benchmarks, print and write their rows."""
    parser = Parser(description="Measure speed, on a quiet machine.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench.json"), help="the file of results")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in BENCHMARKS]:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    from backforward_suite.bench.common import machine

    console = Console()
    if not console.is_terminal:  # a file has no width to fit
        console = Console(width=160)
    measured: dict[str, Rows] = {}
    for name in given.names or BENCHMARKS:
        with console.status(f"measuring {name} ..."):
            measured[name] = BENCHMARKS[name]()
        console.print(table(name, measured[name]))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with whole(given.out) as file:
        json.dump({"machine": machine(), **measured}, file, indent=2)
    console.print(f"written to {given.out}", highlight=False)


def table(name: str, rows: Rows) -> Table:
    """Return rows as a table with a column for each key; fractions have three digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = Table(*(column.replace("_", " ") for column in columns), title=name, title_justify="left")
    for row in rows:
        shown.add_row(*(_cell(row.get(column)) for column in columns))
    return shown


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def command() -> int:
    """Run the command line; return its exit code."""
    return cli.run(main, CONF)
