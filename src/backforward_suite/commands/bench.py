"""Measure speed: medians over interleaved repeats, ratios within one run; a table on screen, outputs/bench.json.

python src/bench.py                   everything, on a quiet machine
python src/bench.py training rules    some of it
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from backforward_suite import cli
from backforward_suite.arguments import Parser
from backforward_suite.atomic import whole
from backforward_suite.hardware import cpu_count, cpu_model

CONF = Path(__file__).resolve().parents[3] / "conf"

Rows = list[dict[str, Any]]


def training() -> Rows:
    """Runs under Lightning against bare loops."""
    from backforward_suite.bench import training as bench
    from backforward_suite.data import default_root

    return bench.run(_train, default_root())


def sweep() -> Rows:
    """A sweep by the pool against bare loops."""
    from backforward_suite.bench import sweep as bench
    from backforward_suite.data import default_root

    return bench.run(CONF.parent / "src" / "train.py", default_root())


def diagnostics() -> Rows:
    """What diagnostics add to an epoch."""
    from backforward_suite.bench import diagnostics as bench
    from backforward_suite.data import default_root

    return bench.run(_train, default_root())


def _train(overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train one run from overrides in a folder."""
    from hydra import compose, initialize_config_dir

    from backforward_suite.run import train

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return train(compose("train", overrides=overrides), folder)


def rules() -> Rows:
    """Update rules and engines against plain SGD, beside the counted multiply-accumulates."""
    from backforward_suite.bench import rules as bench

    return bench.run()


def normprop() -> Rows:
    """NIN without norm, with BatchNorm and with NormProp."""
    from backforward_suite.bench import normprop as bench

    cases = bench.run()["cases"]
    return [
        {
            "case": case["case"],
            **{f"{arm}_ms": value for arm, value in case["milliseconds"].items()},
            **{name: ratio["median"] for name, ratio in case["ratios"].items()},
        }
        for case in cases
    ]


BENCHMARKS: dict[str, Callable[[], Rows]] = {
    "training": training,
    "sweep": sweep,
    "rules": rules,
    "normprop": normprop,
    "diagnostics": diagnostics,
}


def main() -> None:
    """Parse the command line, run the benchmarks, show and write what they gave."""
    parser = Parser(description="Measure speed, on a quiet machine.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench.json"), help="where the numbers go")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in BENCHMARKS]:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
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
    """Rows of equal keys as a table; fractions with three digits."""
    shown = Table(title=name, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        shown.add_column(column.replace("_", " "))
    for row in rows:
        shown.add_row(*(_cell(row.get(column)) for column in columns))
    return shown


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def command() -> int:
    """The command line; returns its exit code."""
    return cli.run(main, CONF)
