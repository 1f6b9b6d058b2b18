"""Committed results: pack the finished runs of a scale into a few text files, and unpack them into run folders.

    outputs/reference/<scale>/<experiment>.jsonl    one line a run, in natural order of names

A line holds `run` (its name), `result` (`result.json` without what identifies the machine and its user) and the text of
`metrics.csv`, `study.csv` and `diagnostics.csv`, the last with only the measures that the experiment reads. Unpacking
and packing again gives the same bytes. Weights are not kept.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from backforward_suite.atomic import remove_half_written, whole
from backforward_suite.errors import BadInput
from backforward_suite.report import experiments
from backforward_suite.report.reading import SCALES
from backforward_suite.runs import files, locks

LEFT_OUT = (
    ("files",),
    ("settings", "data", "root"),
    ("data", "files"),
    ("hardware", "system"),
    ("timing", "cuda_visible_devices"),
)
TABLES = ("metrics", "study", "diagnostics")
Line = dict[str, Any]


def scales_in(folder: Path) -> list[str]:
    """The scales with results in a folder (`outputs`, `outputs/reference`), the smallest first."""
    marks = ("*/*/result.json", "*.jsonl")
    return [scale for scale in SCALES if any(any((folder / scale).glob(mark)) for mark in marks)]


def pack(outputs: Path, scale: str, reference: Path) -> dict[str, int]:
    """Write the finished runs of a scale, one file an experiment; an experiment without runs keeps its file.

    Args:
        outputs: Contains `<scale>/<experiment>/<run>/`.
        scale: `smoke`, `small`, `medium` or `paper`.
        reference: The target of `<scale>/<experiment>.jsonl`.

    Returns:
        The number of runs packed, by experiment.

    Raises:
        BadInput: There is no finished run, or a result is damaged.
    """
    packed = {}
    for name in experiments.names():
        measures = experiments.diagnostics_of(name)
        lines = [line_of(folder, measures) for folder in _done(outputs / scale / name)]
        if lines:
            packed[name] = len(lines)
            _write(reference / scale / f"{name}.jsonl", lines)
    if not packed:
        raise BadInput(f"{outputs / scale}: no finished run here; make reproduce SCALE={scale} trains them")
    return packed


def unpack(reference: Path, scale: str, outputs: Path) -> dict[str, int]:
    """Make run folders from committed results; runs that are done there, or in progress, are left alone.

    Args:
        reference: Contains `<scale>/<experiment>.jsonl`.
        scale: `smoke`, `small`, `medium` or `paper`.
        outputs: The target of `<scale>/<experiment>/<run>/`.

    Returns:
        The number of runs made, by experiment.

    Raises:
        BadInput: There are no results of that scale, or a file is damaged.
    """
    files = sorted((reference / scale).glob("*.jsonl"))
    if not files:
        there = ", ".join(scales_in(reference)) or "none"
        raise BadInput(f"{reference / scale}: no committed results here; scales that have some: {there}")
    return {
        path.stem: sum(_place(line, outputs / scale / path.stem / line["run"]) for line in read(path)) for path in files
    }


def kept(reference: Path, scale: str, experiment: str) -> list[Line]:
    """Read the committed runs of an experiment; there may be none."""
    path = reference / scale / f"{experiment}.jsonl"
    return list(read(path)) if path.exists() else []


def seconds(reference: Path, scale: str, experiment: str) -> dict[str, float]:
    """Seconds of each committed run of an experiment, by the hash of its settings."""
    results = [line["result"] for line in kept(reference, scale, experiment)]
    return {result["settings_hash"]: float(result["timing"]["seconds"]) for result in results}


def line_of(folder: Path, measures: Iterable[str]) -> Line:
    """What is kept of a run.

    Args:
        folder: The folder of a finished run.
        measures: The measures of `diagnostics.csv` to keep.
    """
    result = copy.deepcopy(files.read_result(folder))
    assert result is not None
    for *parts, key in LEFT_OUT:
        node: Any = result
        for part in parts:
            node = node.get(part, {})
        node.pop(key, None)
    line: Line = {"run": folder.name, "result": result}
    for table in TABLES:
        path = folder / f"{table}.csv"
        if path.exists():
            text = path.read_bytes().decode()
            line[table] = _only(text, frozenset(measures)) if table == "diagnostics" else text
    return line


def read(path: Path) -> Iterator[Line]:
    """The lines of a file.

    Raises:
        BadInput: One is damaged.
    """
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text)
                if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*", line["run"]):  # it becomes a folder
                    raise ValueError("its run has no name")
                files.check_result(line["result"])
                if line["result"]["status"] not in files.DONE:
                    raise ValueError("its run is not done")
                float(line["result"]["timing"]["seconds"])
                if not all(isinstance(line.get(table, ""), str) for table in TABLES):
                    raise ValueError("a table is no text")
                if not isinstance(line["result"]["settings_hash"], str):
                    raise ValueError("its settings have no hash")  # noqa: TRY004
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise BadInput(f"{path}, line {number}, is damaged ({error}); take the file from git again") from None
            yield line


def _write(path: Path, lines: Iterable[Line]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_half_written(path.parent, [path.name])
    with whole(path) as file:
        for line in lines:
            file.write(json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n")


def _done(root: Path) -> list[Path]:
    folders = [folder for folder in files.result_folders(root) if (folder / "result.json").exists()]
    return [folder for folder in folders if (files.read_result(folder) or {}).get("status") in files.DONE]


def _only(text: str, measures: frozenset[str]) -> str:
    """The rows of these measures, unchanged."""
    rows = csv.reader(io.StringIO(text))
    head = next(rows, [])
    column = head.index("measure") if "measure" in head else 0
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([head, *(row for row in rows if row[column] in measures)])
    return file.getvalue()


def _place(line: Line, folder: Path) -> bool:
    """Make a run's folder, the result last; return whether it was made."""
    if (folder / "result.json").exists():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / locks.LOCK, timeout=0):
            for table in TABLES:
                if table in line:
                    with whole(folder / f"{table}.csv", "wb") as file:
                        file.write(line[table].encode())
            files.write_result(folder, line["result"])
    except Timeout:
        return False
    return True
