"""The files of a run's folder: results, curves, plans.

    outputs/<name>/<run name>/
        .hydra/          the composed config and the overrides
        events.out.*     TensorBoard
        metrics.csv      one row an epoch, row 0 before training
        diagnostics.csv  with diagnostics=cheap|full: one row a number
        study.csv        of a study, instead of metrics.csv: one row a measurement
        last.ckpt        where a half-done run goes on; best.ckpt: the epoch of best validation accuracy
        run.log          what the run printed, when it ran in a sweep
        result.json      written last and whole: the run is done, or why it failed
        .lock            held by the process that trains here
    outputs/<name>/sweep.json   what the sweeps of that name have planned

Needs the standard library alone: reports read folders with this module.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from backforward_suite.atomic import whole
from backforward_suite.errors import BadInput

DONE = ("finished", "diverged")
TABLES = ("metrics.csv", "diagnostics.csv", "study.csv")
WRITTEN = (*TABLES, "last.ckpt", "best.ckpt", "result.json")  # by a run itself, each whole or not at all

Result = dict[str, Any]


def write_metrics(folder: Path, rows: list[dict[str, float | int | None]]) -> None:
    """Write `metrics.csv`: one row an epoch, numbers in full precision, an empty cell where nothing was measured."""
    _write_rows(folder / "metrics.csv", rows)


def write_study(folder: Path, rows: Sequence[Mapping[str, float | int | str | None]]) -> None:
    """Write `study.csv`: one row a measurement, as the study defines them; an empty cell where a key has no say."""
    _write_rows(folder / "study.csv", rows)


def _write_rows(path: Path, rows: Sequence[Mapping[str, float | int | str | None]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole(path) as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_metrics(folder: Path) -> list[dict[str, float | None]]:
    """Read `metrics.csv`; no file, no rows.

    Raises:
        BadInput: The file is damaged.
    """
    path = folder / "metrics.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: float(cell) if cell else None for key, cell in row.items()} for row in csv.DictReader(file)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, TypeError, OSError, csv.Error) as error:
        raise BadInput(f"{path} is damaged ({error}); delete its folder to run it again") from None


def epochs_done(folder: Path) -> int:
    """How many epochs stand in `metrics.csv`; none in a damaged one."""
    try:
        return max(0, len(read_metrics(folder)) - 1)
    except BadInput:
        return 0


class Measured(NamedTuple):
    """A row of `diagnostics.csv`.

    Attributes:
        epoch: As in `metrics.csv`: the epoch, from 1, in which the batch lies; 0 is before training.
        step: Batches trained on before it was measured, over all epochs.
        measure: What was measured, as `group/quantity`.
        layer: The layer's name in the network; empty: of the whole network.
        update: Which update of the batch, from 1, where the rule makes several.
        value: In full precision; may be `nan` or infinite.
    """

    epoch: int
    step: int
    measure: str
    layer: str
    update: int
    value: float


def write_diagnostics(folder: Path, rows: list[Measured]) -> None:
    """Write `diagnostics.csv`: one row a number."""
    with whole(folder / "diagnostics.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Measured._fields)
        writer.writerows(rows)


def read_diagnostics(folder: Path) -> list[Measured]:
    """Read `diagnostics.csv`; no file, no rows."""
    try:
        with (folder / "diagnostics.csv").open(newline="", encoding="utf-8") as file:
            return [
                Measured(int(epoch), int(step), measure, layer, int(update), float(value))
                for epoch, step, measure, layer, update, value in list(csv.reader(file))[1:]
            ]
    except FileNotFoundError:
        return []


def write_result(folder: Path, result: Result) -> None:
    """Write `result.json`, with a checksum over all that stands in it."""
    plain = json.loads(json.dumps(result, default=str))
    with whole(folder / "result.json") as file:
        json.dump({**plain, "checksum": _checksum(plain)}, file, indent=2)
        file.write("\n")


def _checksum(result: Mapping[str, Any]) -> str:
    """SHA-256 over the values, whatever their order and layout."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def read_result(folder: Path) -> Result | None:
    """Read `result.json`; None where there is none.

    Raises:
        BadInput: The file cannot be read, is damaged, or was edited.
    """
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        check_result(result)
        checksum = result.pop("checksum", None)  # None: of an older version
        if checksum is not None and checksum != _checksum(result):
            raise ValueError("it does not match its checksum")
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise BadInput(f"{folder} is a file, where the folder of a run should be; move it away") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadInput(f"{path} is damaged ({reason}); delete it to have this run done again") from None
    return result  # type: ignore[no-any-return]


def has_checksum(folder: Path) -> bool:
    """Whether `result.json` has one; an older version wrote none."""
    return "checksum" in json.loads((folder / "result.json").read_text(encoding="utf-8"))


def sums_of_tables(folder: Path) -> dict[str, str]:
    """SHA-256 of each table of a run."""
    paths = [folder / name for name in TABLES]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def changed_tables(folder: Path, result: Mapping[str, Any]) -> str:
    """Which tables are not what they were when the run ended, in words; empty if none."""
    kept, now = result.get("files", {}), sums_of_tables(folder)
    changed = [
        f"{name} {'has changed' if name in now else 'is missing'}" for name in kept if now.get(name) != kept[name]
    ]
    return ", ".join(changed)


_MAPPINGS = ("settings", "choices", "final", "best", "data", "code", "hardware", "timing", "files")


def check_result(result: object) -> None:
    """Raise ValueError unless a result is of the right types, as far as readers rely on them."""
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
    """Raise BadInput if a finished run's result lacks what is shown of it."""
    lacking = [key for key in ("settings", "settings_hash", "choices", "final", "data", "timing") if key not in result]
    numbers = isinstance(result.get("timing", {}).get("seconds"), int | float)
    if lacking or not numbers or not {"name", "train"} <= result["data"].keys() or "seed" not in result["settings"]:
        what = ", ".join(lacking) or "timing, data or settings"
        raise BadInput(f"{folder / 'result.json'} is damaged ({what} missing); delete it to have this run done again")


def result_folders(root: Path) -> list[Path]:
    """Folders of runs below `root`, by name in natural order (lr0.05 before lr0.1, seed2 before seed10)."""
    marks = ("result.json", "metrics.csv", "run.log", "last.ckpt")
    found = {path.parent for mark in marks for path in root.rglob(mark)}
    return sorted(found, key=lambda path: natural(str(path)))


def natural(text: str) -> list[Any]:
    """A sort key that orders numbers inside text by value."""
    return [(0, float(part)) if number else (1, part) for number, part in _split_numbers(text)]


def _split_numbers(text: str) -> Iterator[tuple[bool, str]]:
    for part in re.split(r"(\d+(?:\.\d+)?)", text):
        if part:
            yield part[0].isdigit(), part


def is_done(folder: Path) -> bool:
    """Whether a run's folder holds a result, whatever its settings."""
    with suppress(BadInput):  # a damaged result is none
        result = read_result(folder)
        return result is not None and result["status"] in DONE
    return False


def done_below(root: Path) -> dict[str, Path]:
    """Folders of the runs below `root` that are done, by the hash of their settings."""
    found = {}
    for path in root.rglob("result.json"):
        with suppress(BadInput):  # a damaged one is no run to share
            result = read_result(path.parent)
            if result is not None and result["status"] in DONE:
                found[str(result["settings_hash"])] = path.parent
    return found


def read_plan(root: Path) -> dict[str, list[str]]:
    """Read what sweeps have planned in a folder: by run name, its overrides; no plan, no runs.

    Raises:
        BadInput: The file is damaged.
    """
    path = root / "sweep.json"
    try:
        planned: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return dict(planned)
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{path} is damaged ({error}); delete it, and the next sweep writes it anew") from None


def objective(result: Mapping[str, Any]) -> float | None:
    """The number by which settings are chosen: accuracy on the validation set after the last epoch."""
    accuracy: float | None = result.get("final", {}).get("accuracy/validation")
    return accuracy


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log that are not empty."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
    except OSError:  # there is none, or a folder has its name
        return []
    return [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()][-count:]
