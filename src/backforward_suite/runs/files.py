"""The files of a run's folder: results, curves, plans.

    outputs/<name>/<run name>/
        .hydra/          the composed config and the overrides
        events.out.*     TensorBoard
        metrics.csv      one row per epoch, row 0 before training
        diagnostics.csv  with diagnostics=cheap|full: one row per number
        study.csv        of a study, instead of metrics.csv: one row per measurement
        last.ckpt        where a half-done run resumes; best.ckpt: the epoch of best validation accuracy
        run.log          the output of a run in a sweep
        result.json      written last: the result of a finished run, or the cause of a failure
        .lock            locked by the process that trains here
    outputs/<name>/sweep.json   the runs that sweeps of that name have planned

Needs the standard library alone: reports read folders with this module.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from backforward_suite.atomic import whole
from backforward_suite.errors import BadInput

DONE = ("finished", "diverged")
TABLES = ("metrics.csv", "diagnostics.csv", "study.csv")
WRITTEN = (*TABLES, "last.ckpt", "best.ckpt", "result.json")  # by the run, each whole or not at all

Result = dict[str, Any]


def write_metrics(folder: Path, rows: list[dict[str, float | int | None]]) -> None:
    """Write `metrics.csv`."""
    write_rows(folder / "metrics.csv", rows)


def write_rows(path: Path, rows: Sequence[Mapping[str, float | int | str | None]]) -> None:
    """Write a table: numbers in full precision, an empty cell where a row lacks a key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole(path) as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_metrics(folder: Path) -> list[dict[str, float | None]]:
    """Read `metrics.csv`; return no rows if there is no file, raise BadInput if it is damaged."""
    path = folder / "metrics.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: float(cell) if cell else None for key, cell in row.items()} for row in csv.DictReader(file)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, TypeError, OSError, csv.Error) as error:
        raise BadInput(f"{path} is damaged ({error}); delete its folder to run it again") from None


def epochs_done(folder: Path) -> int:
    """The number of epochs in `metrics.csv`; 0 if it is damaged."""
    try:
        return max(0, len(read_metrics(folder)) - 1)
    except BadInput:
        return 0


class Measured(NamedTuple):
    """A row of `diagnostics.csv`.

    Attributes:
        epoch: The epoch of the batch, from 1; 0 is before training.
        step: Batches trained on before the measurement, over all epochs.
        measure: The quantity, as `group/quantity`.
        layer: The layer's name in the network; empty for the whole network.
        update: The update within the batch, from 1, if the rule makes several.
        value: May be `nan` or infinite.
    """

    epoch: int
    step: int
    measure: str
    layer: str
    update: int
    value: float


def write_diagnostics(folder: Path, rows: list[Measured]) -> None:
    """Write `diagnostics.csv`."""
    with whole(folder / "diagnostics.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Measured._fields)
        writer.writerows(rows)


def read_diagnostics(folder: Path) -> list[Measured]:
    """Read `diagnostics.csv`; return no rows if there is no file."""
    try:
        with (folder / "diagnostics.csv").open(newline="", encoding="utf-8") as file:
            return [
                Measured(int(epoch), int(step), measure, layer, int(update), float(value))
                for epoch, step, measure, layer, update, value in list(csv.reader(file))[1:]
            ]
    except FileNotFoundError:
        return []


def write_result(folder: Path, result: Result) -> None:
    """Write `result.json` with a checksum of its values."""
    plain = json.loads(json.dumps(result, default=str))
    with whole(folder / "result.json") as file:
        json.dump({**plain, "checksum": _checksum(plain)}, file, indent=2)
        file.write("\n")


def _checksum(result: Mapping[str, Any]) -> str:
    """SHA-256 of the values, independent of their order and layout."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def read_result(folder: Path) -> Result | None:
    """Read `result.json`; return None if there is none.

    Raises:
        BadInput: The file cannot be read, is damaged, or was edited.
    """
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        check_result(result)
        checksum = result.pop("checksum", None)  # older versions wrote none
        if checksum is not None and checksum != _checksum(result):
            raise ValueError("it does not match its checksum")
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise BadInput(f"{folder} is a file, but must be the folder of a run; move it away") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadInput(f"{path} is damaged ({reason}); delete it to run this again") from None
    return result  # type: ignore[no-any-return]


def has_checksum(folder: Path) -> bool:
    """Whether `result.json` has a checksum; older versions wrote none."""
    return "checksum" in json.loads((folder / "result.json").read_text(encoding="utf-8"))


def sums_of_tables(folder: Path) -> dict[str, str]:
    """SHA-256 of each table of a run."""
    paths = [folder / name for name in TABLES]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def changed_tables(folder: Path, result: Mapping[str, Any]) -> str:
    """The tables that have changed since the run ended, in words; empty if there are none."""
    kept, now = result.get("files", {}), sums_of_tables(folder)
    changed = [
        f"{name} {'has changed' if name in now else 'is missing'}" for name in kept if now.get(name) != kept[name]
    ]
    return ", ".join(changed)


_MAPPINGS = ("settings", "choices", "final", "best", "data", "code", "hardware", "timing", "files")


def check_result(result: object) -> None:
    """Raise ValueError unless a result has the types that readers rely on."""
    if not isinstance(result, dict) or not isinstance(result.get("status"), str):
        raise ValueError("no status in it")  # noqa: TRY004
    for key in _MAPPINGS:
        if not isinstance(result.get(key, {}), dict) and (key, result[key]) != ("best", None):
            raise ValueError(f"{key} is no mapping")
    if not isinstance(result.get("settings_hash", ""), str):
        raise ValueError("settings_hash is no text")  # noqa: TRY004
    for group in ("final", "best"):
        for key, value in (result.get(group) or {}).items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f"{group}: {key} is no number")  # noqa: TRY004


def check_complete(folder: Path, result: Result) -> None:
    """Raise BadInput if a finished run's result lacks a key that is shown."""
    lacking = [key for key in ("settings", "settings_hash", "choices", "final", "data", "timing") if key not in result]
    numbers = isinstance(result.get("timing", {}).get("seconds"), int | float)
    if lacking or not numbers or not {"name", "train"} <= result["data"].keys() or "seed" not in result["settings"]:
        what = ", ".join(lacking) or "timing, data or settings"
        raise BadInput(f"{folder / 'result.json'} is damaged ({what} missing); delete it to run this again")


def result_folders(root: Path) -> list[Path]:
    """Folders of runs below `root`, by name in natural order (lr0.05 before lr0.1, seed2 before seed10)."""
    marks = ("result.json", "metrics.csv", "run.log", "last.ckpt")
    found = {path.parent for mark in marks for path in root.rglob(mark)}
    return sorted(found, key=lambda path: natural(str(path)))


def natural(text: str) -> list[Any]:
    """A sort key that orders numbers inside text by value."""
    parts = filter(None, re.split(r"(\d+(?:\.\d+)?)", text))
    return [(0, float(part)) if part[0].isdigit() else (1, part) for part in parts]


def _done(folder: Path) -> Result | None:
    """The result of a run that is done, whatever its settings; a damaged one counts as none."""
    with suppress(BadInput):
        result = read_result(folder)
        return result if result is not None and result["status"] in DONE else None
    return None


def is_done(folder: Path) -> bool:
    """Whether a folder holds a run that is done, whatever its settings."""
    return _done(folder) is not None


def done_below(root: Path) -> dict[str, Path]:
    """Folders of the runs below `root` that are done, by the hash of their settings."""
    folders = [path.parent for path in root.rglob("result.json")]
    return {str(result["settings_hash"]): folder for folder in folders if (result := _done(folder)) is not None}


def read_plan(root: Path) -> dict[str, list[str]]:
    """Read the overrides of each run that sweeps have planned in a folder, by name; raise BadInput if it is damaged."""
    path = root / "sweep.json"
    try:
        planned: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return dict(planned)
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{path} is damaged ({error}); delete it: the next sweep writes it again") from None


def objective(result: Mapping[str, Any]) -> float | None:
    """The number by which sweepers choose settings: validation accuracy after the last epoch."""
    accuracy: float | None = result.get("final", {}).get("accuracy/validation")
    return accuracy


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log that are not empty; none if it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()][-count:]
