"""Check and measure on a GPU with one command: a line for each part, every number in outputs/gpu_check.json.

python src/gpu_check.py                       all that 7 minutes allow, the most important parts first
python src/gpu_check.py --only capture epoch  some parts
python src/gpu_check.py --dry-run             the same code on a CPU at toy size, without times

Runs from a bare checkout with nothing but torch and numpy installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
for folder in (REPOSITORY, REPOSITORY / "src"):  # for a bare checkout, and for the processes started here
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

GRACE = 45.0  # seconds after the deadline until a part is killed
CHECKS, BENCHMARKS = "tests.helpers.gpu_checks", "backforward_suite.bench.gpu"
PARTS = dict.fromkeys(("capture", "rules", "normprop", "memory", "training", "ddp"), CHECKS)
PARTS |= dict.fromkeys(("epoch", "run"), BENCHMARKS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the parts, print and write the results; return 1 if one failed."""
    given = parsed(arguments)
    try:
        import torch

        from backforward_suite.atomic import whole
        from backforward_suite.bench.common import machine
        from backforward_suite.bench.gpu import Conditions
    except ModuleNotFoundError as error:
        return refused(f"{error.name} is not installed")
    if not given.dry_run and not torch.cuda.is_available():
        return refused("torch sees no CUDA device; --dry-run executes every part on the CPU")
    try:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.open("a").close()
    except OSError as error:
        return refused(f"--out={given.out}: {error.strerror}; give a file in a folder of yours")
    due = time.monotonic() + 60 * given.minutes
    setting = Conditions(torch.device("cpu" if given.dry_run else "cuda"), given.dry_run, given.data, due)
    parts: dict[str, Any] = {name: {"status": "not run"} for name in PARTS if name in given.only}
    for name in parts:
        if not setting.late:
            print(f"{name} ...", flush=True)
            parts[name] = (run if given.dry_run else apart)(name, PARTS[name], setting)
        with whole(given.out) as file:  # after each part, so that an interruption loses nothing
            json.dump({"dry_run": given.dry_run, "machine": machine(), "parts": parts}, file, indent=1)
    for name, part in parts.items():
        remarks = "; ".join(part[key] for key in ("summary", "error", "reason") if part.get(key))
        print(f"{name:9} {part['status']:9} {part.get('seconds', ''):>6}  {remarks}".rstrip())
    if given.dry_run:
        print("this was a dry run on the CPU at toy size: it shows that every part runs, nothing about a GPU")
    print(f"written to {given.out}")
    return int(any(part["status"] == "failed" for part in parts.values()))


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit without printing the usage."""
        sys.exit(refused(message))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's values, or exit with one line."""
    parser = OneLine(description="Check and measure on a GPU.")
    parser.add_argument("--only", nargs="+", metavar="part", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all parts (default 7)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at toy size, without times")
    parser.add_argument("--out", type=Path, help="the file of results (default gpu_check.json in $OUT or outputs/)")
    data = os.environ.get("BACKFORWARD_DATA") or REPOSITORY / "data"
    parser.add_argument("--data", type=Path, default=Path(data), help="the folder of data sets")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.only if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not 0 < given.minutes < float("inf"):
        parser.error(f"--minutes={given.minutes:g}: must be a number > 0")
    outputs = Path(os.environ.get("OUT") or REPOSITORY / "outputs")
    given.out = given.out or outputs / f"gpu_check{'_dry_run' * given.dry_run}.json"
    return given


def run(name: str, home: str, setting: Any) -> dict[str, Any]:
    """Run a part; return its status, its rows, and a summary or the error that it raised."""
    from backforward_suite.bench.gpu import last_line

    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    outcome: dict[str, Any] = {}
    try:
        summary = getattr(importlib.import_module(home), name)(setting, rows)
        if setting.dry_run and home == BENCHMARKS:  # times at toy size mean nothing
            rows = [{key: value for key, value in row.items() if not isinstance(value, float)} for row in rows]
            summary = None
        outcome = {"status": status_of(rows, home == CHECKS), "summary": summary}
        outcome["error"] = next((row["error"] for row in rows if "error" in row), None)
    except ModuleNotFoundError as error:
        outcome = {"status": "skipped", "reason": f"{error.name} is not installed"}
    except Exception as error:
        outcome = {"status": "failed", "error": last_line(error)}
    return {**outcome, "seconds": round(time.monotonic() - began, 1), "rows": rows}


def apart(name: str, home: str, setting: Any) -> dict[str, Any]:
    """Run a part in its own process: a crash, a hang or a broken CUDA context does not affect the other parts."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, name, home, setting))
    process.start()
    sender.close()
    fault = "its process did not end in time"
    try:
        if receiver.poll(max(0.0, setting.due - time.monotonic()) + GRACE):
            outcome: dict[str, Any] = receiver.recv()
            process.join(GRACE)
            return outcome
    except EOFError:
        process.join(GRACE)
        fault = f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return {"status": "failed", "error": fault, "rows": []}


def _send(sender: Connection, name: str, home: str, setting: Any) -> None:
    sender.send(run(name, home, setting))


def status_of(rows: list[dict[str, Any]], check: bool) -> str:
    """Judge a part by its rows: one failed row fails a check, but no benchmark, as not every size fits every GPU."""
    statuses = {row["status"] for row in rows}
    done = statuses & {"passed", "measured"}
    if "failed" in statuses and (check or not done):
        return "failed"
    return done.pop() if done else "not run"


def refused(line: str) -> int:
    """Print one line of error; return the exit code."""
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
