"""What experiments draw: a function for each kind of figure, made from what a part has (`Data`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import matplotlib.axes
import matplotlib.figure
import numpy as np
import pandas as pd
import scipy.stats

from backforward_suite.report import statistics, style
from backforward_suite.report.experiments._experiment import Cell, Data
from backforward_suite.report.experiments._measures import Measure, trains
from backforward_suite.report.finding import Estimate
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import LEVEL, Currency

Draw = Callable[[Data], matplotlib.figure.Figure]


# --- curves ----------------------------------------------------------------------------------------------------------


def curve(
    runs: Sequence[Run],
    key: str,
    currency: Currency = "epochs",
    *,
    logs: bool = False,
    times: float = 1.0,
    whole: bool = False,
) -> pd.DataFrame:
    """A curve's mean over seeds with its pointwise t interval, for `style.band`.

    Args:
        runs: One arm's, one a seed.
        key: The curve.
        currency: Of the horizontal axis; where seeds differ (seconds) their mean.
        logs: Average logarithms, as suits a loss on a logarithmic axis.
        times: A factor of the values.
        whole: Draw each value at its epoch's end, as published ones are, though it may be a mean over the epoch.

    Returns:
        Index: what was spent. Columns `value`, `low`, `high`. Epochs that some run does not have are left out.
    """
    empty = pd.DataFrame(columns=["value", "low", "high"], dtype="float64")
    curves = [run.curve(key) for run in runs]
    found = [statistics.spent(run, currency) if whole else statistics.located(run, key, currency) for run in runs]
    costs = [cost for cost in found if cost is not None]
    if not curves or len(costs) < len(curves):
        return empty
    values = pd.concat(curves, axis=1, join="inner") * times
    values = values[np.isfinite(values).all(axis=1)]
    if logs:
        values = np.log(values[(values > 0).all(axis=1)])
    if values.empty:
        return empty
    frame = _pointwise(values)
    frame = np.exp(frame) if logs else frame
    frame.index = pd.concat(costs, axis=1).loc[frame.index].mean(axis=1).to_numpy()
    return frame


def ratio_curve(ours: Sequence[Run], theirs: Sequence[Run], key: str) -> pd.DataFrame:
    """One arm's curve over another's: geometric mean of the pairs with its pointwise t interval, by whole epochs."""
    others = {run.seed: run.curve(key) for run in theirs}
    pairs = [run.curve(key) / others[run.seed] for run in ours if run.seed in others]
    logs = np.log(pd.concat(pairs, axis=1, join="inner")) if pairs else pd.DataFrame()
    return np.exp(_pointwise(logs[np.isfinite(logs).all(axis=1)]))


def mean_curve(curves: Sequence[pd.Series[float]]) -> pd.DataFrame:
    """Mean of curves epoch by epoch with its pointwise t interval; epochs that one of them lacks are left out."""
    values = pd.concat(list(curves), axis=1, join="inner") if curves else pd.DataFrame()
    return _pointwise(values[np.isfinite(values).all(axis=1)])


def _pointwise(values: pd.DataFrame) -> pd.DataFrame:
    """Mean over the columns of each row, with its t interval."""
    centre, n = values.mean(axis=1), values.shape[1]
    width = float(scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1)) / math.sqrt(n) if n > 1 else math.nan
    reach = width * values.std(axis=1, ddof=1)
    return pd.DataFrame({"value": centre, "low": centre - reach, "high": centre + reach}, dtype="float64")


def panels(
    count: int, *, sharex: bool = False, sharey: bool = False
) -> tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]:
    """A figure of so many panels, two in a row."""
    columns = min(2, max(1, count))
    figure, axes = style.canvas(max(1, -(-count // columns)), columns, sharex=sharex, sharey=sharey)
    for spare in list(axes.flat)[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat)[:count]


def curves(
    key: str,
    ylabel: str,
    *,
    times: float = 1.0,
    logs: bool = False,
    arms: Sequence[str] = (),
    free: bool = False,
    beside: Callable[[matplotlib.axes.Axes, Cell], None] | None = None,
) -> Draw:
    """A curve epoch by epoch: a panel for each row, a line for each arm.

    Args:
        key: The column of `metrics.csv`.
        ylabel: What it is.
        times: A factor of the values.
        logs: Logarithmic, as are the means.
        arms: Only these.
        free: Let each panel have a vertical scale of its own.
        beside: Draws what else belongs into a panel.
    """

    def draw(data: Data) -> matplotlib.figure.Figure:
        figure, axes = panels(len(data.cells), sharey=not free)
        looks = data.looks()
        for panel, cell in zip(axes, data.cells, strict=True):
            for arm, runs in cell.arms.items():
                if not arms or arm in arms:
                    style.band(panel, looks[arm], curve(runs, key, logs=logs, times=times))
            if beside is not None:
                beside(panel, cell)
            panel.set(title=cell.label)
            if logs:
                panel.set_yscale("log")
            style.epochs(panel)
        _label_rows(axes, ylabel)
        style.legend(figure)
        return figure

    return draw


def ratios(theirs: str, ylabel: str, *, key: str = "loss/train", changes: str = "") -> Draw:
    """One arm's curve over another's, epoch by epoch: a panel for each row, a line for each arm.

    Args:
        theirs: The arm that all others are compared with.
        ylabel: What the ratio is.
        key: The column of `metrics.csv`.
        changes: A setting that holds an epoch, to be marked.
    """

    def draw(data: Data) -> matplotlib.figure.Figure:
        figure, axes = panels(len(data.cells), sharey=True)
        looks = data.looks()
        for panel, cell in zip(axes, data.cells, strict=True):
            panel.axhline(1, color="0.35", linewidth=0.9)
            marks = {run.setting(changes) for runs in cell.arms.values() for run in runs if changes}
            for epoch in marks - {None}:
                panel.axvline(epoch, color="0.6", linewidth=0.8, linestyle=":")
            for arm, runs in cell.arms.items():
                if arm != theirs:
                    style.band(panel, looks[arm], ratio_curve(runs, cell.arms.get(theirs, []), key))
            panel.set(title=cell.label)
            style.epochs(panel)
        _label_rows(axes, ylabel)
        style.legend(figure)
        return figure

    return draw


def _label_rows(axes: Sequence[matplotlib.axes.Axes], ylabel: str) -> None:
    for panel in axes[::2]:
        panel.set_ylabel(ylabel)


# --- effects ---------------------------------------------------------------------------------------------------------


def over(key: str, xlabel: str, ylabel: str, source: int = 0) -> Draw:
    """A comparison over a setting that is a number, a line for each value of the other setting.

    A row that is far from all others (a run that diverged counts as a guess) has a panel of its own, so that it does
    not press the rest flat.
    """

    def draw(data: Data) -> matplotlib.figure.Figure:
        cells = {effect.label: effect.estimate() for effect in data.effects[source]}
        places = sorted({float(cell.row[key]) for cell in data.cells})
        others = {cell.label: tuple(value for name, value in cell.row.items() if name != key) for cell in data.cells}
        lines = list(dict.fromkeys(others.values()))
        found = {(others[cell.label], float(cell.row[key])): cells.get(cell.label) for cell in data.cells}
        imputed = {
            (others[cell.label], float(cell.row[key]))
            for cell in data.cells
            if any(run.status == "diverged" for runs in cell.arms.values() for run in runs)
        }
        values = [estimate.value for estimate in found.values() if estimate is not None and estimate.value is not None]
        split = bool(values) and max(values) > 3 * min(values)
        figure, axes = style.canvas(
            2 if split else 1, 1, sharex=True, panel=(style.PANEL[0], 2.0 if split else style.PANEL[1])
        )
        claim = data.claim(source)
        near = [value for value in values if value < 2]
        for number, panel in enumerate(reversed(axes[:, 0])):
            if claim is not None and claim.tolerance and number == 0:
                panel.axhspan(1 / (1 + claim.tolerance), 1 + claim.tolerance, color="0.93", zorder=0)
            panel.axhline(1, color="0.35", linewidth=0.9)
            looks = style.sequence(lines, "{}")
            for line, look in looks.items():
                of = replace(look, label=f"lr {line[0]:g}" if line else "")
                row = [found.get((line, place)) for place in places]
                style.points(panel, of, places, row)
                guessed = [(place, each.value) for place, each in zip(places, row, strict=True)
                           if each is not None and each.value is not None and (line, place) in imputed]  # fmt: skip
                if guessed:
                    name = "with diverged runs, imputed"
                    style.published(panel, of, [at for at, _ in guessed], [value for _, value in guessed], name)
            style.at_values(panel, places)
            if split and number == 1:
                style.log_ticks(panel)
                panel.set_ylim(1.5, 1.3 * max(values))
            elif split and near:
                ends = [end for each in found.values() if each is not None for end in (each.low, each.high)
                        if end is not None and end < 2]  # fmt: skip
                low, high = min([1.0, *near, *ends]), max([1.0, *near, *ends])
                panel.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        axes[-1, 0].set_xlabel(xlabel)
        figure.supylabel(ylabel, fontsize=style.STYLE["axes.labelsize"])
        style.legend(figure)
        return figure

    return draw


def forest(xlabel: str, source: int = 0, arm: str = "prop") -> Draw:
    """A comparison, its rows below each other around no difference, with published values as hollow markers."""

    def draw(data: Data) -> matplotlib.figure.Figure:
        effects, claim = data.effects[source], data.claim(source)
        figure, axes = style.canvas(panel=(3.4, 0.8 + 0.38 * max(1, len(effects))))
        panel, look = axes[0, 0], style.look(arm)
        rows = [(effect.label, effect.estimate() if effect.values else None) for effect in effects]
        equal = effects[0].equality if effects else 0.0
        style.forest(panel, rows, look, zero=equal, tolerance=claim.tolerance if claim else None)
        for place, (label, _) in enumerate(rows):
            if claim is not None and label in claim.published:
                style.published(panel, look, [claim.number(label)], [place + 0.28], "published" if place == 0 else "_")
        panel.set_xlabel(xlabel)
        style.legend(figure)
        return figure

    return draw


def reached(
    measure: Measure, *, free: bool = False, arms: Sequence[str] = (), published: Mapping[str, float] | None = None
) -> Draw:
    """What each arm reached in each row, with intervals, side by side.

    Args:
        measure: What is drawn.
        free: A panel, with a vertical scale of its own, for each row.
        arms: Only these.
        published: Published numbers by row and arm, as in `{"CIFAR-10, NormProp": 9.11}`.
    """

    def draw(data: Data) -> matplotlib.figure.Figure:
        groups = [[cell] for cell in data.cells] if free else [list(data.cells)]
        figure, axes = panels(len(groups))
        looks = data.looks(arms)
        width = 0.7 / max(1, len(looks))
        for panel, cells in zip(axes, groups, strict=True):
            for k, (arm, look) in enumerate(looks.items()):
                for place, cell in enumerate(cells):
                    at, runs = place + (k - (len(looks) - 1) / 2) * width, cell.arms.get(arm, [])
                    if runs:
                        style.interval(panel, look, at, measure.mean(runs), label=look.label)
                    number = (published or {}).get(", ".join(filter(None, [cell.label, look.label])))
                    if number is not None:
                        style.published(panel, look, [at + 0.3 * width], [number], f"published: {look.label}")
            panel.set_xticks(range(len(cells)), [cell.label.replace(" ", "\n") for cell in cells])
            panel.set_xlim(-0.5, len(cells) - 0.5)
            panel.grid(visible=False, axis="x")
        _label_rows(axes, measure.name)
        style.legend(figure)
        return figure

    return draw


def by_lr(measure: Measure, *, logs: bool = False) -> Draw:
    """Over the learning rate: the median of a number over seeds, and the share of seeds that train."""

    def draw(data: Data) -> matplotlib.figure.Figure:
        figure, axes = style.canvas(2, 1, sharex=True, panel=(style.PANEL[0], 2.1))
        looks = data.looks()
        arms = {arm: runs for cell in data.cells for arm, runs in cell.arms.items()}
        lrs = sorted({float(run.setting("lr")) for runs in arms.values() for run in runs})
        for k, (arm, runs) in enumerate(arms.items()):
            nudge = 1 + 0.012 * (k - (len(arms) - 1) / 2)
            there = [[run for run in runs if math.isclose(run.setting("lr"), lr)] for lr in lrs]
            medians = [statistics.quantile([_number(measure, run) for run in at], 0.5) if at else None for at in there]
            shares: list[Estimate | None] = [
                statistics.share(sum(map(trains, at)), len(at)) if at else None for at in there
            ]
            spread = [None if found is None else _range(found, [_number(measure, run) for run in at])
                      for found, at in zip(medians, there, strict=True)]  # fmt: skip
            style.points(axes[0, 0], looks[arm], [nudge * lr for lr in lrs], spread)
            style.points(axes[1, 0], looks[arm], [nudge * lr for lr in lrs], shares)
        for panel in axes[:, 0]:
            style.at_values(panel, lrs)
        axes[0, 0].set_ylabel(measure.name.replace(" after", "\nafter"))
        if logs:
            axes[0, 0].set_yscale("log")
        axes[1, 0].set(xlabel="learning rate", ylabel="share of seeds that train", ylim=(-0.05, 1.05))
        style.legend(figure)
        return figure

    return draw


def _number(measure: Measure, run: Run) -> float:
    value = measure.read(run)
    return math.inf if value is None else value


def _range(median: Estimate, values: Sequence[float]) -> Estimate:
    """A median with the range of all seeds, which is what few of them can show."""
    finite = [value for value in values if math.isfinite(value)]
    return replace(median, low=min(finite, default=None), high=max(finite, default=None))
