"""Writes docs/zoo.md. Every number and name on it comes from a measured row."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

INTRO = """\
# The zoo

Networks and optimizers from elsewhere, and small networks written for one way each in which networks are built. This
page is written by `make zoo` from what it measured; `tests/zoo` has the lists and the checks.

A network is **exact** if all of this holds to the bit, in float32 on a CPU, over at least three batches with the
optimizers that the zoo gives it:

- the default engine leaves the same weights, buffers, attributes of modules and states of the random generators
  (torch, `random`, numpy) as the naive engine after each batch, and returns the same losses and outputs;
- one group (`groups=1`) leaves what a plain loop of forward, `backward()` and `optimizer.step()` leaves;
- `rule.prepare` changes nothing: weights, buffers, attributes, flags, hooks, generators, optimizer, input;
- written cases: the naive engine leaves what the definition gives, each pass computed on a copy of the network.

**wrong**: something differs. **refused**: the library says in one line why not. **crashed**: any other error.
"""


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last row of each mark, without a truncated last line."""
    rows: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["mark"]] = row
    return rows


def write(wanted: Mapping[str, Sequence[tuple[str, str]]], folder: Path, packages: Sequence[str], mark: str) -> str:
    """Return the page.

    Args:
        wanted: The networks of each list as (id, mark).
        folder: The folder of the rows.
        packages: Distributions whose versions the page shows.
        mark: The engine's mark, with which optimizers' rows start.
    """
    results, times = read(folder / "results.jsonl"), read(folder / "times.jsonl")
    optimizers = [row for row in read(folder / "optimizers.jsonl").values() if row["mark"].startswith(mark)]
    lists = {name: [results[m] for _, m in entries if m in results] for name, entries in wanted.items()}
    missing = {name: [id for id, m in entries if m not in results] for name, entries in wanted.items()}
    parts = [INTRO, _measured(lists, packages), _summary(lists, missing, optimizers)]
    if not times:
        parts.append("Times per step were not measured: they need a quiet machine (`make zoo TIMES=1`).\n")
    for name, rows in lists.items():
        if rows:
            parts.append(f"## {name[0].upper()}{name[1:]}\n\n{_table(rows, times)}")
    if optimizers:
        parts.append("## Optimizers\n\n" + _optimizers(optimizers))
    return "\n".join(parts)


def _measured(lists: Mapping[str, Rows], packages: Sequence[str]) -> str:
    days = sorted(
        datetime.fromtimestamp(row["when"], UTC).date().isoformat() for rows in lists.values() for row in rows
    )
    when = "nothing yet" if not days else days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    with_version = ", ".join(f"{name} {_version(name)}" for name in packages)
    return f"Measured {when} on {_processor()}, one thread; Python {platform.python_version()}, {with_version}.\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name} ({os.cpu_count()} cores)"


def _summary(lists: Mapping[str, Rows], missing: Mapping[str, list[str]], optimizers: Rows) -> str:
    words = ("exact", "refused", "wrong", "crashed")
    head = ["list", "networks", "exact", "of these on the naive engine", *words[1:], "not measured"]
    out = ["## Summary", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, rows in lists.items():
        count = Counter(row["verdict"] for row in rows)
        naive = sum(row["verdict"] == "exact" and row["engine"].startswith("naive") for row in rows)
        cells = [
            len(rows) + len(missing[name]),
            count["exact"],
            naive,
            *(count[word] for word in words[1:]),
            len(missing[name]),
        ]
        out.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    if optimizers:
        count = Counter(row["verdict"] for row in optimizers)
        told = (
            f"Optimizers: {len(optimizers)}, of which {count['equal']} equal one optimizer for each group bitwise, "
            f"{count['refused']} are refused at construction, {count['wrong']} are wrong."
        )
        out += ["", told]
    wrong = [row for rows in lists.values() for row in rows if row["verdict"] in {"wrong", "crashed"}]
    if wrong:
        out += ["", "What is wrong:", ""]
        out += [f"- `{row['id']}`: {_reason(row)}" for row in wrong]
    return "\n".join(out) + "\n"


def _table(rows: Rows, times: Mapping[str, dict[str, Any]]) -> str:
    timed = [times[row["mark"]] for row in rows if row["mark"] in times]
    out = []
    if timed:
        auto = statistics.median(row["auto"] / row["plain"] for row in timed)
        naive = statistics.median(row["naive"] / row["plain"] for row in timed)
        out += [f"Time per step divided by SGD's, median of {len(timed)} networks: {auto:.2f} (default engine), "
                f"{naive:.2f} (naive). Small networks and a shared machine: rough numbers.", ""]  # fmt: skip
    head = ["network", "what", "weights", "groups", "verdict", "engine", "why"]
    head += ["time / SGD", "naive / SGD"] if timed else []
    out += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"`{row['id']}`", row["about"], f"{row['weights']:,}" if row["groups"] else "", row["groups"] or ""]
        cells += [row["verdict"], row["engine"], _reason(row)]
        if timed:
            found = times.get(row["mark"])
            cells += [f"{found[name] / found['plain']:.2f}" if found else "" for name in ("auto", "naive")]
        out.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(out) + "\n"


def _reason(row: dict[str, Any]) -> str:
    parts = [row["refused"], row["crashed"], row["why"]]
    parts += [
        f"{kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for kind, names in row["wrong"].items()
    ]
    return "; ".join(part for part in parts if part)


def _optimizers(rows: Rows) -> str:
    out = ["| optimizer | package | verdict | reason |", "|---|---|---|---|"]
    out += [f"| `{row['optimizer']}` | {row['package']} | {row['verdict']} | {row['reason']} |" for row in rows]
    return "\n".join(out) + "\n"
