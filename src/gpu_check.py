"""Check and measure on a GPU with one command: a table on screen, every number in outputs/gpu_check.json.

python src/gpu_check.py                       everything that 8 minutes allow, the most telling first
python src/gpu_check.py --only capture epoch  some of it
python src/gpu_check.py --dry-run             the same way on a CPU at toy size, without figures

Runs from a bare checkout, where nothing but torch and numpy is installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
for place in (REPOSITORY, REPOSITORY / "src"):  # a bare checkout; processes that this one starts come here too
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

Row = dict[str, Any]
MINUTES = 7.0  # a row that was begun in time may end later
GRACE = 45.0  # seconds after which a part that should have ended is ended


@dataclass(frozen=True)
class CheckPart:
    """A check or a benchmark.

    Attributes:
        home: Its module.
        room: Seconds that must be left for it to be begun.
        check: Whether it passes or fails; else it measures.
    """

    home: str
    room: float
    check: bool


# The most telling first.
PARTS = {
    "capture": CheckPart("tests.helpers.gpu_checks", 20, check=True),
    "rules": CheckPart("tests.helpers.gpu_checks", 20, check=True),
    "normprop": CheckPart("tests.helpers.gpu_checks", 10, check=True),
    "memory": CheckPart("tests.helpers.gpu_checks", 10, check=True),
    "training": CheckPart("tests.helpers.gpu_checks", 30, check=True),
    "ddp": CheckPart("tests.helpers.gpu_checks", 30, check=True),
    "epoch": CheckPart("backforward_suite.bench.gpu", 60, check=False),
    "steps": CheckPart("backforward_suite.bench.gpu", 30, check=False),
    "run": CheckPart("backforward_suite.bench.gpu", 40, check=False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the parts, show and write what they gave; return 1 if one failed."""
    given = parsed(arguments)
    try:
        import torch

        from backforward_suite.atomic import whole
        from backforward_suite.bench.gpu import Conditions
    except ModuleNotFoundError as error:
        return refused(f"{error.name} is not installed, and nothing here goes without it")
    if not given.dry_run and not torch.cuda.is_available():
        return refused("torch sees no CUDA device here; give --dry-run to go through all of it on the CPU")
    out = given.out or default_out(given.dry_run)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return refused(f"--out={out}: {error.strerror}")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        return refused(f"--out={out} cannot be written; give a file in a folder of yours")
    began = time.monotonic()
    due = began + 60 * given.minutes
    device = torch.device("cpu" if given.dry_run else "cuda")
    setting = Conditions(device, given.dry_run, given.data, due)
    found: dict[str, Any] = {"dry_run": given.dry_run, "minutes": given.minutes, "machine": machine()}
    found["parts"] = {name: {"status": "not run"} for name in PARTS if name in given.only}
    for name in found["parts"]:
        room = 0 if given.dry_run else PARTS[name].room
        if time.monotonic() + room < due:
            print(f"{name} ...", flush=True)
            found["parts"][name] = (run if given.dry_run else apart)(name, PARTS[name], setting)
        found["seconds"] = round(time.monotonic() - began, 1)
        with whole(out) as file:  # after each part: what was found stays if this is cut off
            json.dump(found, file, indent=1)
    show(found["parts"])
    if given.dry_run:
        print("a dry run on the CPU at toy size: it tells that all of it runs, nothing of a GPU")
    print(f"written to {out}")
    return int(any(part["status"] == "failed" for part in found["parts"].values()))


class OneLine(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        """Without the usage, which --help shows."""
        sys.exit(refused(message))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, or an exit with one line."""
    parser = OneLine(description="Check and measure on a GPU.")
    parser.add_argument("--only", nargs="+", metavar="part", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all of it (default {MINUTES:g})")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at toy size, without figures")
    parser.add_argument("--out", type=Path, help="the file of results (default $OUT/gpu_check.json, else outputs/)")
    data = os.environ.get("BACKFORWARD_DATA") or REPOSITORY / "data"
    parser.add_argument("--data", type=Path, default=Path(data), help="the folder of data sets")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.only if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not (math.isfinite(given.minutes) and given.minutes > 0):
        parser.error(f"--minutes={given.minutes:g}: a number above 0 is right")
    return given


def default_out(dry_run: bool = False) -> Path:
    """Where results go unless told: $OUT may be a folder, as where jobs are given one, or the file itself."""
    if not os.environ.get("OUT"):
        return REPOSITORY / "outputs" / ("gpu_check_dry_run.json" if dry_run else "gpu_check.json")
    place = Path(os.environ["OUT"])
    return place if place.suffix == ".json" else place / "gpu_check.json"


def run(name: str, part: CheckPart, setting: Any) -> dict[str, Any]:
    """A part's status, what it came to, and its rows; whatever it raises is in it."""
    from backforward_suite.bench.gpu import last_line

    rows: list[Row] = []
    began = time.monotonic()
    outcome: dict[str, Any] = {}
    try:
        call: Callable[[Any, list[Row]], str | None] = getattr(importlib.import_module(part.home), name)
        outcome = {"status": status_of(part, rows_of(call, setting, rows, outcome)), **outcome}
    except ModuleNotFoundError as error:
        outcome = {"status": "skipped", "reason": f"{error.name} is not installed"}
    except Exception as error:
        outcome = {"status": "failed", "error": last_line(error)}
    return {**outcome, "seconds": round(time.monotonic() - began, 1), "rows": rows}


def apart(name: str, part: CheckPart, setting: Any) -> dict[str, Any]:
    """The same in a process of its own: what breaks the GPU's context, crashes or hangs leaves the others whole."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, name, part, setting))
    began = time.monotonic()
    process.start()
    sender.close()
    fault = "its process did not end in time"
    try:
        if receiver.poll(max(0.0, setting.due - began) + GRACE):
            outcome: dict[str, Any] = receiver.recv()
            process.join(GRACE)
            return outcome
    except EOFError:
        process.join(GRACE)
        fault = f"its process ended with exit code {process.exitcode}"
    finally:
        if process.is_alive():
            process.kill()
        process.join()
    return {"status": "failed", "error": fault, "seconds": round(time.monotonic() - began, 1), "rows": []}


def _send(sender: Connection, name: str, part: CheckPart, setting: Any) -> None:
    sender.send(run(name, part, setting))


def rows_of(call: Callable[..., str | None], setting: Any, rows: list[Row], outcome: dict[str, Any]) -> list[Row]:
    """Let a part fill its rows; keep what it says of them."""
    if summary := call(setting, rows):
        outcome["summary"] = summary
    if faults := [row["error"] for row in rows if "error" in row]:
        outcome["error"] = faults[0]
    return rows


def status_of(part: CheckPart, rows: list[Row]) -> str:
    """A check fails with any row; a benchmark only if nothing was measured, as not every size fits every GPU."""
    of_each = [row["status"] for row in rows]
    if part.check and "failed" in of_each:
        return "failed"
    done = "passed" if part.check else "measured"
    if done in of_each:
        return done
    return "failed" if "failed" in of_each else "not run"


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    import torch

    from backforward_suite.hardware import cpu_count, cpu_model

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": [{"name": gpu.name, "gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpu": cpu_model(),
        "cores": cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def show(parts: dict[str, dict[str, Any]]) -> None:
    """A line for each part, as a table where rich is installed."""
    heads = ("part", "status", "seconds", "what")
    lines = [
        (name, part["status"], str(part.get("seconds", "")), "; ".join(part[key] for key in SAID if key in part))
        for name, part in parts.items()
    ]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        for name, status, seconds, said in (heads, *lines):
            print(f"{name:9} {status:9} {seconds:>7}  {said}".rstrip())
        return
    table = Table(*heads)
    for line in lines:
        table.add_row(*map(Text, line))  # as it is: errors have brackets
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


SAID = ("summary", "error", "reason")


def refused(line: str) -> int:
    """Say in one line what cannot be done; the exit code for it."""
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
