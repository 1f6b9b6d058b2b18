"""The figures: a function for each kind returns what draws it from a part's `Data`, and the table of limits.

`page.draw` adds the legend, the style and the stamp.
"""

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
from backforward_suite.report.experiments._experiment import Cell, Data, called
from backforward_suite.report.experiments._measures import Measure, largest_lr, trains
from backforward_suite.report.experiments._tables import table
from backforward_suite.report.finding import Estimate, Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import LEVEL, Currency, Effect
from backforward_suite.report.style import Look

Axes = matplotlib.axes.Axes
Looks = Mapping[str, Look]
Draw = Callable[[Data], matplotlib.figure.Figure]


# --- panels ----------------------------------------------------------------------------------------------------------


def panels(
    count: int, ylabel: str = "", *, sharex: bool = False, sharey: bool = False
) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    """A figure with this number of panels, two in a row, and the label of the vertical axis at each row's first."""
    columns = min(2, max(1, count))
    figure, axes = style.canvas(max(1, -(-count // columns)), columns, sharex=sharex, sharey=sharey)
    for spare in list(axes.flat)[count:]:
        spare.set_visible(False)
    found = list(axes.flat)[:count]
    for panel in found[::2]:
        panel.set_ylabel(ylabel)
    return figure, found


def by_row(draw: Callable[[Axes, Cell, Looks], None], ylabel: str, xlabel: str = "", *, sharey: bool = False) -> Draw:
    """A panel for each row.

    Args:
        draw: Draws a row into its panel, given the looks of all arms.
        ylabel: Of the vertical axes.
        xlabel: Of the horizontal axes; without one they count epochs.
        sharey: Whether all panels have the same vertical scale.
    """

    def drawn(data: Data) -> matplotlib.figure.Figure:
        figure, axes = panels(len(data.cells), ylabel, sharey=sharey)
        for panel, cell in zip(axes, data.cells, strict=True):
            draw(panel, cell, data.looks())
            panel.set_title(cell.label if len(cell.label) < 30 else cell.label.replace(", ", ",\n"))
            if xlabel:
                panel.set_xlabel(xlabel)
            else:
                style.epochs(panel)
        return figure

    return drawn


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
    """The mean of a curve over seeds with its pointwise t interval, for `style.band`.

    Args:
        runs: The runs of one arm, one a seed.
        key: The curve.
        currency: Of the horizontal axis; the mean over seeds if they differ (seconds).
        logs: Average logarithms, which suits a loss on a logarithmic axis.
        times: A factor of the values.
        whole: Place each value at the end of its epoch, as published ones are, even if it is a mean over the epoch.

    Returns:
        Index: the cost. Columns `value`, `low`, `high`. Epochs that some run does not have are left out.
    """
    curves = [run.curve(key) for run in runs]
    found = [statistics.spent(run, currency) if whole else statistics.located(run, key, currency) for run in runs]
    costs = [cost for cost in found if cost is not None]
    frame = pointwise([values * times for values in curves] if len(costs) == len(curves) else [], logs=logs)
    if len(frame):
        frame.index = pd.concat(costs, axis=1).loc[frame.index].mean(axis=1).to_numpy()
    return frame


def pointwise(curves: Sequence[pd.Series[float]], *, logs: bool = False) -> pd.DataFrame:
    """The mean of curves, epoch by epoch, with its t interval; epochs that one of them lacks are left out."""
    values = pd.concat(list(curves), axis=1, join="inner") if curves else pd.DataFrame()
    values = values[np.isfinite(values).all(axis=1)]
    if logs:
        values = np.log(values[(values > 0).all(axis=1)])
    if values.empty:
        return pd.DataFrame(columns=["value", "low", "high"], dtype="float64")
    centre, n = values.mean(axis=1), values.shape[1]
    width = float(scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1)) / math.sqrt(n) if n > 1 else math.nan
    reach = width * values.std(axis=1, ddof=1)
    frame = pd.DataFrame({"value": centre, "low": centre - reach, "high": centre + reach}, dtype="float64")
    return np.exp(frame) if logs else frame


def curves(
    key: str,
    ylabel: str,
    *,
    times: float = 1.0,
    logs: bool = False,
    arms: Sequence[str] = (),
    free: bool = False,
    extra: Callable[[Axes, Cell], None] = lambda *_: None,
) -> Draw:
    """A curve epoch by epoch: a panel for each row, a line for each arm.

    Args:
        key: The column of `metrics.csv`.
        ylabel: Its name.
        times: A factor of the values.
        logs: Use a logarithmic axis, and means of logarithms.
        arms: Draw only these.
        free: Give each panel a vertical scale of its own.
        extra: Draws further things into a panel.
    """

    def draw(panel: Axes, cell: Cell, looks: Looks) -> None:
        for arm, runs in cell.arms.items():
            if not arms or arm in arms:
                style.band(panel, looks[arm], curve(runs, key, logs=logs, times=times))
        extra(panel, cell)
        if logs:
            panel.set_yscale("log")

    return by_row(draw, ylabel, sharey=not free)


def ratios(theirs: str, ylabel: str, *, key: str = "loss/train", changes: str = "") -> Draw:
    """The curve of each arm over that of `theirs`: geometric means of the pairs, a panel for each row.

    Args:
        theirs: The arm that all others are compared with.
        ylabel: The name of the ratio.
        key: The column of `metrics.csv`.
        changes: A setting that holds an epoch, to be marked.
    """

    def draw(panel: Axes, cell: Cell, looks: Looks) -> None:
        panel.axhline(1, color="0.35", linewidth=0.9)
        for epoch in {run.setting(changes) for runs in cell.arms.values() for run in runs if changes} - {None}:
            panel.axvline(epoch, color="0.6", linewidth=0.8, linestyle=":")
        others = {run.seed: run.curve(key) for run in cell.arms.get(theirs, [])}
        for arm, runs in cell.arms.items():
            pairs = [run.curve(key) / others[run.seed] for run in runs if run.seed in others]
            if arm != theirs:
                style.band(panel, looks[arm], pointwise(pairs, logs=True))

    return by_row(draw, ylabel, sharey=True)


# --- effects ---------------------------------------------------------------------------------------------------------


def over(key: str, xlabel: str, ylabel: str) -> Draw:
    """The first comparison over a numeric setting, with a line for each value of the other setting.

    If some ratios are far above all others (a diverged run counts as a guess), they get a panel of their own, so that
    the rest can still be read.
    """

    def draw(data: Data) -> matplotlib.figure.Figure:
        estimates = {effect.label: effect.estimate() for effect in data.effects[0]}
        places = sorted({float(cell.row[key]) for cell in data.cells})
        lines: dict[tuple[object, ...], dict[float, Estimate | None]] = {}
        imputed = set()
        for cell in data.cells:
            line, place = tuple(value for name, value in cell.row.items() if name != key), float(cell.row[key])
            lines.setdefault(line, {})[place] = estimates.get(cell.label)
            if any(run.status == "diverged" for runs in cell.arms.values() for run in runs):
                imputed.add((line, place))
        found = [each for line in lines.values() for each in line.values() if each is not None]
        values = [each.value for each in found if each.value is not None]
        split = bool(values) and max(values) > 3 * min(values)
        figure, axes = style.canvas(
            2 if split else 1, 1, sharex=True, panel=(style.PANEL[0], 2.0 if split else style.PANEL[1])
        )
        claim = data.claims[0]
        for number, panel in enumerate(reversed(axes[:, 0])):
            if claim is not None and claim.tolerance and number == 0:
                panel.axhspan(1 / (1 + claim.tolerance), 1 + claim.tolerance, color="0.93", zorder=0)
            panel.axhline(1, color="0.35", linewidth=0.9)
            for line, look in style.sequence(list(lines)).items():
                of, row = replace(look, label=f"lr {line[0]:g}" if line else ""), lines[line]
                style.points(panel, of, places, [row.get(place) for place in places])
                guessed = {at: each.value for at, each in sorted(row.items())
                           if each is not None and each.value is not None and (line, at) in imputed}  # fmt: skip
                if guessed:
                    style.published(panel, of, [*guessed], [*guessed.values()], "with diverged runs, imputed")
            style.at_values(panel, places)
            if split and number == 1:
                style.log_ticks(panel)
                panel.set_ylim(1.5, 1.3 * max(values))
            elif split and min(values) < 2:
                ends = [end for each in found for end in (each.value, each.low, each.high) if end is not None]
                near = [1.0, *(end for end in ends if end < 2)]
                margin = 0.1 * (max(near) - min(near))
                panel.set_ylim(min(near) - margin, max(near) + margin)
        axes[-1, 0].set_xlabel(xlabel)
        figure.supylabel(ylabel, fontsize=style.STYLE["axes.labelsize"])
        return figure

    return draw


def forest(xlabel: str, arm: str = "prop") -> Draw:
    """The rows of the first comparison below each other, around no difference; published values are hollow."""

    def draw(data: Data) -> matplotlib.figure.Figure:
        effects, claim, look = data.effects[0], data.claims[0], style.look(arm)
        figure, axes = style.canvas(panel=(3.4, 0.8 + 0.38 * max(1, len(effects))))
        panel, equal = axes[0, 0], effects[0].equality if effects else 0.0
        style.forest(panel, rows_of(effects), look, zero=equal, tolerance=claim.tolerance if claim else None)
        for place, effect in enumerate(effects):
            if claim is not None and effect.label in claim.published:
                name = "published" if place == 0 else "_"
                style.published(panel, look, [claim.number(effect.label)], [place + 0.28], name)
        panel.set_xlabel(xlabel)
        return figure

    return draw


def rows_of(effects: Sequence[Effect]) -> list[tuple[str, Estimate | None]]:
    """Labels and estimates, for `style.forest`."""
    return [(effect.label, effect.estimate() if effect.values else None) for effect in effects]


def reached(measure: Measure, *, free: bool = False, published: Mapping[str, float] | None = None) -> Draw:
    """What each arm reached in each row, with intervals, side by side.

    Args:
        measure: What is drawn.
        free: Give each row a panel with a vertical scale of its own.
        published: Published numbers by row and arm, as in `{"CIFAR-10, NormProp": 9.11}`.
    """

    def draw(data: Data) -> matplotlib.figure.Figure:
        groups = [[cell] for cell in data.cells] if free else [list(data.cells)]
        figure, axes = panels(len(groups), measure.name)
        looks = data.looks()
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
        return figure

    return draw


def by_lr(measure: Measure, *, logs: bool = False) -> Draw:
    """Over the learning rate: the median of a number with the range over seeds, and the share of seeds that train."""

    def draw(data: Data) -> matplotlib.figure.Figure:
        figure, axes = style.canvas(2, 1, sharex=True, panel=(style.PANEL[0], 2.1))
        looks = data.looks()
        arms = {arm: runs for cell in data.cells for arm, runs in cell.arms.items()}
        lrs = sorted({float(run.setting("lr")) for runs in arms.values() for run in runs})
        for k, (arm, runs) in enumerate(arms.items()):
            places = [(1 + 0.012 * (k - (len(arms) - 1) / 2)) * lr for lr in lrs]
            there = [[run for run in runs if math.isclose(run.setting("lr"), lr)] for lr in lrs]
            shares: list[Estimate | None] = [
                statistics.share(sum(map(trains, at)), len(at)) if at else None for at in there
            ]
            style.points(axes[0, 0], looks[arm], places, [_range(measure, at) if at else None for at in there])
            style.points(axes[1, 0], looks[arm], places, shares)
        for panel in axes[:, 0]:
            style.at_values(panel, lrs)
        axes[0, 0].set_ylabel(measure.name.replace(" after", "\nafter"))
        if logs:
            axes[0, 0].set_yscale("log")
        axes[1, 0].set(xlabel="learning rate", ylabel="share of seeds that train", ylim=(-0.05, 1.05))
        return figure

    return draw


def _range(measure: Measure, runs: Sequence[Run]) -> Estimate:
    """The median over seeds with their range; few seeds allow no more."""
    values = [math.inf if (value := measure.read(run)) is None else value for run in runs]
    finite = [value for value in values if math.isfinite(value)]
    return replace(statistics.quantile(values, 0.5), low=min(finite, default=None), high=max(finite, default=None))


def limits(cells: Sequence[Cell], names: Mapping[str, str] | None = None) -> list[Table]:
    """For each arm and seed, the largest learning rate up to which all of the grid train."""
    rows = [
        {
            "arm": called(arm, names or {}),
            "largest learning rate that trains, by seed": ", ".join(
                "none" if lr is None else f"{lr:g}" for lr in largest_lr(runs).values()
            ),
            "diverged": f"{sum(run.status == 'diverged' for run in runs)} of {len(runs)} runs",
        }
        for cell in cells
        for arm, runs in cell.arms.items()
    ]
    note = (
        "A rate trains if the run finishes with a training loss below that of a guess, and so do all smaller rates of "
        "the grid. The limit lies between that rate and the next; ratios are between the geometric middles."
    )
    return [table("Where training ends", rows, note)]
