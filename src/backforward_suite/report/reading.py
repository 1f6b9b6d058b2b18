"""Runs as reports read them: result.json, metrics.csv, diagnostics.csv and study.csv of a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from backforward_suite.errors import BadInput
from backforward_suite.runs import files
from backforward_suite.runs.files import Result, natural, read_plan, result_folders

SCALES = ("smoke", "small", "medium", "paper")


@dataclass(frozen=True, eq=False)
class Run:
    """One run: a training, or a study.

    A diverged run is a result. `final` gives it the accuracy of a guess (1 / classes), and as loss the larger of a
    uniform guess's (log of the number of classes) and the highest that it recorded. Its curves are as recorded.

    Attributes:
        folder: The run's folder, whose name is the run's.
        result: The content of `result.json`.
        frames: Its tables `metrics`, `diagnostics` and `study`, if they do not come from files.
    """

    folder: Path
    result: Result
    frames: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's name, such as `bfp-lr0.05-seed3`."""
        return self.folder.name

    @property
    def status(self) -> str:
        """`finished`, `diverged` or `failed`."""
        return str(self.result["status"])

    @property
    def seed(self) -> int:
        """Seed of initial weights and sample order: runs of one seed are pairs."""
        return int(self.setting("seed", 0))

    @property
    def hardware(self) -> str:
        """The machine it ran on."""
        return str(self.result.get("hardware", {}).get("device", "unknown hardware"))

    @property
    def data(self) -> str:
        """Name of its data set; empty if it needed none."""
        return str(self.result.get("data", {}).get("name", ""))

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """`metrics.csv`: a row an epoch, row 0 before training."""
        return self._frame("metrics")

    @cached_property
    def diagnostics(self) -> pd.DataFrame:
        """`diagnostics.csv`: a row a number. An empty layer is `""`."""
        return self._frame("diagnostics")

    @cached_property
    def study(self) -> pd.DataFrame:
        """`study.csv`; its columns depend on the study."""
        return self._frame("study")

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting by its dotted key, such as `model.depth`."""
        value: Any = self.result.get("settings", {})
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    def choice(self, group: str) -> str:
        """The choice in a config group, such as `bfp` in `method`; empty without one."""
        return str(self.result.get("choices", {}).get(group, ""))

    @property
    def images(self) -> int:
        """Training images that its settings ask for, each epoch counted."""
        return int(self.result.get("data", {}).get("train") or 0) * int(self.setting("max_epochs") or 0)

    @property
    def width(self) -> float:
        """Width of its network, 1 if it has none to choose."""
        return float(self.setting("model.width") or 1)

    @property
    def core_seconds(self) -> float:
        """Seconds of training times threads."""
        timing = self.result.get("timing", {})
        return float(timing.get("training_seconds") or 0) * float(timing.get("threads") or 1)

    def final(self, key: str) -> float | None:
        """A number after the last epoch, such as `accuracy/test`; None if it was not measured."""
        if self.status == "diverged" and key.startswith(("loss/", "accuracy/")):
            classes = int(self.result.get("data", {}).get("classes") or 10)
            if key.startswith("accuracy/"):
                return 1 / classes
            seen = self.curve(key)
            finite = seen[seen < math.inf]
            return max(math.log(classes), float(finite.max()) if len(finite) else 0.0)
        value = self.result.get("final", {}).get(key)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def curve(self, key: str) -> pd.Series[float]:
        """A column of `metrics.csv` by epoch, without the epochs at which it was not measured."""
        if key not in self.metrics:
            return pd.Series([], index=pd.Index([], dtype="int64", name="epoch"), dtype="float64", name=key)
        by_epoch = self.metrics.set_index("epoch")[key].astype("float64").dropna()
        by_epoch.index = by_epoch.index.astype("int64")
        return by_epoch

    def _frame(self, kind: str) -> pd.DataFrame:
        if kind in self.frames:
            return self.frames[kind]
        try:
            kept = self.result.get("files", {}).get(f"{kind}.csv")
            if kept is not None and files.sums_of_tables(self.folder).get(f"{kind}.csv") != kept:
                raise ValueError("its checksum differs from that in result.json")
            return _READERS[kind](self.folder)
        except (ValueError, TypeError, OSError) as error:  # pandas' own are ValueErrors
            cause = str(error).partition("\n")[0]
            raise BadInput(
                f"{self.folder / kind}.csv is damaged ({cause}); delete its folder to run it again"
            ) from None


def _read_metrics(folder: Path) -> pd.DataFrame:
    rows = files.read_metrics(folder)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["epoch", "step", "lr"])


def _read_diagnostics(folder: Path) -> pd.DataFrame:
    return pd.DataFrame(files.read_diagnostics(folder), columns=list(files.Measured._fields))


def _read_study(folder: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(folder / "study.csv")
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return pd.DataFrame()


_READERS = {"metrics": _read_metrics, "diagnostics": _read_diagnostics, "study": _read_study}


def refuse_mixed_data(runs: Iterable[Run]) -> None:
    """Raise BadInput if runs with equal data settings were trained on different data, which must not be averaged."""
    seen: dict[str, Run] = {}
    for run in runs:
        content = run.result.get("data", {}).get("sha256")
        if content is None:
            continue
        asked = {key: value for key, value in (run.setting("data") or {}).items() if key not in ("root", "augment")}
        other = seen.setdefault(json.dumps(asked, sort_keys=True, default=str), run)
        if other.result["data"]["sha256"] != content:
            raise BadInput(f"{run.folder} and {other.folder.name} were trained on different data of one name; "
                           "delete those of the old data")  # fmt: skip


def planned_and_not_done(runs: Iterable[Run]) -> tuple[str, ...]:
    """Names of the runs that sweeps planned in the folders of these runs and that have no result yet."""
    roots = {run.folder.parent for run in runs}
    return tuple(sorted((name for root in roots for name in _not_done(root)), key=natural))


def _not_done(root: Path) -> set[str]:
    planned = read_plan(root)
    return planned.keys() - {folder.name for folder in result_folders(root)} if planned else set()


def read_runs(folder: Path) -> list[Run]:
    """Read the ended runs below a folder, in natural order; none if the folder does not exist.

    A run whose result cannot be read counts as failed, with the cause.
    """
    found = []
    for place in result_folders(folder):
        try:
            result = files.read_result(place)
        except BadInput as error:
            result = {"status": "failed", "cause": str(error), "settings": {}}
        if result is not None:
            found.append(Run(place, result))
    return found
