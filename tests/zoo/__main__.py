"""Compares engines on the whole zoo and writes docs/zoo.md.

    PYTHONPATH=src python -m tests.zoo [--only WORD] [--times] [--page]       # make zoo

Each network's row is appended to outputs/zoo/results.jsonl at once. A second call measures only rows that are missing
or that another engine, other versions or another definition of the network gave. `--times` then times the exact
networks one after the other; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tests.oracles import definition
from tests.zoo import check, networks, page
from tests.zoo.cases import CASES
from tests.zoo.entry import Entry

import backforward_suite._torchvision  # noqa: F401  (before anything imports torchvision)

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = ROOT / "outputs" / "zoo"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy")
LISTS: dict[str, Callable[[], list[Entry]]] = {
    "written cases": lambda: CASES,
    "transformers": networks.transformers,
    "torchvision": networks.torchvision,
    "timm": networks.timm,
}


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# Modules of the library that no network of the zoo uses.
_APART = {"__init__", "loops", "probes", "shift"}


@functools.cache
def engine_mark() -> str:
    """Return a digest of what every row depends on: the code of the engine and the check, the packages' versions."""
    files = [path for path in sorted((ROOT / "src" / "backforward").glob("*.py")) if path.stem not in _APART]
    return _digest([code_of(path.read_text()) for path in [*files, Path(check.__file__)]] + [*map(_version, PACKAGES)])


def code_of(text: str) -> str:
    """Return a module's syntax tree without comments, docstrings and line numbers."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _version(package: str) -> str:
    return f"{package} {version(package)}"


@functools.cache
def _cases_source() -> str:
    return _digest(path.read_text() for path in sorted(Path(__file__).parent.glob("cases/*.py")))


def mark_of(entry: Entry) -> str:
    """Return a digest of everything that a network's row depends on."""
    build = repr(entry.build.args) if isinstance(entry.build, functools.partial) else _cases_source()
    return _digest([engine_mark(), entry.id, build, repr(entry.groups), repr(entry.optimizers)])


def measure(entry: Entry) -> dict[str, Any]:
    """Run all checks of a network; for a written case also compare the naive engine with the definition."""
    row = check.check(entry)
    if entry in CASES and entry.oracle and row.verdict in {"exact", "wrong"}:
        trace, _ = check.train(entry, entry.optimizers[0], engine="naive")
        if names := definition.compare(entry, entry.optimizers[0], trace):
            row.wrong["definition"] = names
    return asdict(row) | {"verdict": row.verdict}


def run(path: Path, entries: Iterable[Entry], work: Callable[[Entry], dict[str, Any]]) -> None:
    """Do the work for all networks that have no row yet."""
    for entry in entries:
        mark = mark_of(entry)
        if mark not in page.read(path):  # read each time: several processes may share the work
            began = time.time()
            row = work(entry) | {"id": entry.id, "mark": mark, "when": int(began)}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{time.time() - began:6.1f} s  {entry.id}: {row.get('verdict', 'timed')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="part of a network's id")
    parser.add_argument("--times", action="store_true", help="time the exact networks (on a quiet machine)")
    parser.add_argument("--page", action="store_true", help="write the page from what there is, and stop")
    given = parser.parse_args()
    torch.set_num_threads(1)
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    lists = {name: entries() for name, entries in LISTS.items()}
    if not given.page:
        entries = [entry for some in lists.values() for entry in some if given.only in entry.id]
        run(OUTPUTS / "results.jsonl", entries, measure)
        if not given.only:
            _optimizers(OUTPUTS / "optimizers.jsonl")
        if given.times:
            rows = page.read(OUTPUTS / "results.jsonl")
            exact = [entry for entry in entries if rows[mark_of(entry)]["verdict"] == "exact"]
            run(OUTPUTS / "times.jsonl", exact, check.time_steps)
    wanted = {name: [(entry.id, mark_of(entry)) for entry in entries] for name, entries in lists.items()}
    (ROOT / "docs" / "zoo.md").write_text(page.write(wanted, OUTPUTS, PACKAGES, engine_mark()))


def _optimizers(path: Path) -> None:
    """Check all optimizers unless their rows exist."""
    from tests.zoo.optimizers import check_all

    if not any(mark.startswith(engine_mark()) for mark in page.read(path)):
        rows = [row._asdict() for row in check_all()]
        marked = [row | {"mark": f"{engine_mark()} {row['package']} {row['optimizer']}"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in marked))


if __name__ == "__main__":
    main()
