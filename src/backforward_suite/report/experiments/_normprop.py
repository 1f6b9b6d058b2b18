"""What the experiments on Normalization Propagation share besides: settings chosen, accuracies in percent, layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from backforward_suite.report import statistics
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

NORMS = ("none", "batch", "prop")
Read = Callable[[Run], float | None]


def values(runs: Iterable[Run], *path: str) -> list[object]:
    """The distinct values that a setting has among runs, in order."""
    return [key[0] for key in statistics.grouped(runs, *path)]


def chosen(runs: Sequence[Run], key: str = "lr") -> list[Run]:
    """The runs at the setting that did best on validation data."""
    best = statistics.choose(runs, key)
    return [] if best is None else list(best.runs)


def test_error(run: Run) -> float | None:
    """Percent of the test set that a run gets wrong; a diverged one guesses."""
    accuracy = run.final("accuracy/test")
    return None if accuracy is None else 100 * (1 - accuracy)


test_accuracy, validation_accuracy = common.percent("accuracy/test"), common.percent("accuracy/validation")


def sample(runs: Iterable[Run], read: Read, label: str, unit: str = "") -> Effect:
    """A number itself, a value a seed."""
    return Effect(label, tuple(number for run in runs if (number := read(run)) is not None), unit=unit)


def band(curves: Iterable[pd.Series[float]]) -> pd.DataFrame:
    """Mean of curves epoch by epoch, with its interval: columns `value`, `low`, `high` for `style.band`."""
    together = pd.concat(list(curves), axis="columns") if (curves := list(curves)) else pd.DataFrame()
    rows = {}
    for epoch, row in together.iterrows():
        found = statistics.mean(number for number in row if math.isfinite(number))
        rows[epoch] = (found.value, found.low, found.high)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"], dtype="float64")


def settled(curve: pd.Series[float], within: float) -> int | None:
    """The first epoch from which a curve stays so near to its last value; None of an empty one."""
    if curve.empty:
        return None
    far = curve.index[(curve - curve.iloc[-1]).abs() > within]
    return int(curve.index[0]) if not len(far) else int(curve.index[curve.index > far[-1]][0])


def short(layer: str) -> str:
    """A layer's name as a person says it: `conv2` of `model.conv2.conv`."""
    return layer.removeprefix("model.").removesuffix(".conv")
