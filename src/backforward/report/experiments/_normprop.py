"""What the experiments on Normalization Propagation share: runs by arm, curves over seeds, effects, findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import pandas as pd

from backforward.report import statistics
from backforward.report.finding import Estimate, Table
from backforward.report.reading import Run
from backforward.report.statistics import Effect
from backforward.runs import DONE

NORMS = ("none", "batch", "prop")
Read = Callable[[Run], float | None]


# --- runs ------------------------------------------------------------------------------------------------------------


def done(runs: Iterable[Run], **settings: object) -> list[Run]:
    """The finished and diverged ones of some settings: `norm="prop"`, `batch_size=50`, `data__augment="flip"`.

    Two underscores stand for a dot. A key that names a group of choices is compared with the choice.
    """
    wanted = {key.replace("__", "."): value for key, value in settings.items()}
    return [
        run
        for run in runs
        if run.status in DONE and all((run.choice(key) or run.setting(key)) == value for key, value in wanted.items())
    ]


def values(runs: Iterable[Run], *path: str) -> list[object]:
    """The distinct values that a setting has among runs, in order."""
    return [key[0] for key in statistics.grouped(runs, *path)]


def chosen(runs: Sequence[Run], key: str = "lr") -> list[Run]:
    """The runs at the setting that did best on validation data."""
    best = statistics.choose(runs, key)
    return [] if best is None else list(best.runs)


def percent(key: str) -> Read:
    """Reads a share after the last epoch, in percent."""

    def read(run: Run) -> float | None:
        share = run.final(key)
        return None if share is None else 100 * share

    return read


def test_error(run: Run) -> float | None:
    """Percent of the test set that a run gets wrong; a diverged one guesses."""
    accuracy = run.final("accuracy/test")
    return None if accuracy is None else 100 * (1 - accuracy)


test_accuracy, validation_accuracy = percent("accuracy/test"), percent("accuracy/validation")


# --- estimates -------------------------------------------------------------------------------------------------------


def over_seeds(runs: Iterable[Run], read: Read, unit: str = "") -> Estimate:
    """Mean over seeds, with its interval."""
    return statistics.mean((number for run in runs if (number := read(run)) is not None), unit)


def difference(ours: Iterable[Run], theirs: Iterable[Run], read: Read, label: str, unit: str = "points") -> Effect:
    """Ours less theirs, seed by seed."""
    return statistics.paired(statistics.by_seed(ours, read), statistics.by_seed(theirs, read), label, unit=unit)


def ratio(ours: Iterable[Run], theirs: Iterable[Run], read: Read, label: str) -> Effect:
    """Ours over theirs, seed by seed."""
    return statistics.paired(statistics.by_seed(ours, read), statistics.by_seed(theirs, read), label, ratio=True)


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


# --- words -----------------------------------------------------------------------------------------------------------


def short(layer: str) -> str:
    """A layer's name as a person says it: `conv2` of `model.conv2.conv`."""
    return layer.removeprefix("model.").removesuffix(".conv")


def effects_table(title: str, effects: Sequence[Effect], heading: str, note: str = "") -> Table:
    """A row an effect: what it is, its interval, p as Holm corrects it over the rows."""
    rows = [
        [effect.label, str(effect.estimate()), str(len(effect.values)), _p(effect.corrected_p), effect.note]
        for effect in statistics.holm(effects)
    ]
    frame = pd.DataFrame(rows, columns=[heading, "difference [95 %]", "pairs", "p, corrected", "remark"])
    if not frame["remark"].any():
        frame = frame.drop(columns="remark")
    corrected = "p by Student's t test, Holm's correction over the rows of this table."
    return Table(title, frame, " ".join(filter(None, [note, corrected])))


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def described(estimate: Estimate) -> str:
    """An estimate as a cell; empty where nothing was measured."""
    return "" if estimate.value is None else str(estimate)


def runs_by(runs: Iterable[Run], key: str) -> Mapping[Hashable, list[Run]]:
    """Runs by one setting."""
    return {setting[0]: members for setting, members in statistics.grouped(runs, key).items()}
