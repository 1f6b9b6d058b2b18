"""How normalisation behaves without covariate shift: {SGD, Backforward} x {no norm, BatchNorm, NormProp}."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.figure
import pandas as pd

from backforward_suite.report import style
from backforward_suite.report.experiments._experiment import (
    Cell,
    Compare,
    Data,
    Drawing,
    Effects,
    Experiment,
    Part,
    layout,
)
from backforward_suite.report.experiments._figures import panels, reached
from backforward_suite.report.experiments._measures import LOSS, TEST, Read, Runs
from backforward_suite.report.experiments._tables import table
from backforward_suite.report.finding import Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

APPLIED, INDUCED = "shift/applied_relative", "shift/induced_relative"
NETWORKS = {"mlp": "MLP", "nin": "NIN"}
MEANING = {
    INDUCED: "Induced shift: what updating the layers below does to a layer's gradient.",
    APPLIED: "Applied shift: how far the gradient that a layer steps along is from the one that it then faces.",
}
NOTHING = 1e-3  # of a gradient's norm; single precision leaves some millionths


def arm(run: Run) -> str:
    """Such as `bfp + batch`."""
    return f"{run.choice('method')}{style.RULES_AND_NORMS}{run.choice('norm')}"


def shifts(run: Run, measure: str) -> pd.Series[float]:
    """By layer, in forward order: the median over the times at which the first update of a batch was looked at."""
    rows = run.diagnostics
    rows = rows[(rows["measure"] == measure) & (rows["update"] == 1)]
    found: pd.Series[float] = rows.groupby("layer", sort=False)["value"].median()
    return found


def over_seeds(runs: Runs, measure: str) -> pd.Series[float]:
    """By layer, the mean over seeds."""
    found = [of_run for run in runs if len(of_run := shifts(run, measure))]
    together: pd.Series[float] = pd.concat(found, axis=1).mean(axis=1) if found else pd.Series(dtype="float64")
    return together


def _largest(run: Run) -> float | None:
    found = shifts(run, APPLIED).dropna()
    return float(found.max()) if len(found) else None


def _mean(run: Run) -> float | None:
    """The mean over all layers but the first, which nothing lies below."""
    found = shifts(run, APPLIED).iloc[1:].dropna()
    return float(found.mean()) if len(found) else None


def of_all(label: str, runs: Runs, read: Read) -> Effect:
    """A value of each run, at whatever learning rate."""
    values = tuple(value for run in runs if (value := read(run)) is not None)
    return Effect(label, values, note="" if values or not runs else "no diagnostics")


def removed(cells: Sequence[Cell]) -> list[Effect]:
    """The largest applied shift of exact Backforward, over both networks."""
    runs = [run for cell in cells for run in cell.arms.get("bfp", [])]
    return [of_all("BFP", runs, _largest)] if runs else []


def stale(cells: Sequence[Cell]) -> list[Effect]:
    """The mean applied shift of plain SGD above the first layer, by network."""
    return [of_all(cell.label, cell.arms["sgd"], _mean) for cell in cells if "sgd" in cell.arms]


def shift_tables(cells: Sequence[Cell]) -> list[Table]:
    """Both shifts of each layer, by network."""
    tables = []
    for cell in cells:
        for measure, meaning in MEANING.items():
            columns = {style.look(name).label: over_seeds(runs, measure) for name, runs in cell.arms.items()}
            frame = pd.DataFrame({name: column for name, column in columns.items() if len(column)})
            rows = [
                {"layer": layer} | {name: None if pd.isna(value) else f"{value:.2g}" for name, value in row.items()}
                for layer, row in frame.iterrows()
            ]
            note = f"{meaning} As a share of that gradient's norm; median over epochs, mean over seeds."
            tables.append(table(f"{meaning.partition(':')[0]} of each layer, {cell.label}", rows, note))
    return [each for each in tables if len(each.frame)]


def draw_shift(data: Data) -> matplotlib.figure.Figure:
    """Applied shift by layer, a panel for each network; what counts as none is named, not drawn."""
    figure, axes = panels(len(data.cells))
    for panel, cell in zip(axes, data.cells, strict=True):
        for name, runs in cell.arms.items():
            found, of = over_seeds(runs, APPLIED), style.look(name)
            if not len(found):
                continue
            places = list(range(1, len(found) + 1))
            panel.set_xticks(places)
            there = found.where(found > NOTHING)
            label = of.label if there.notna().any() else f"{of.label}: 0"
            values = there.to_list() if there.notna().any() else [math.nan] * len(places)
            panel.plot(places, values, marker=of.marker, label=label, **of.line)
        panel.set(title=cell.label, xlabel="layer", ylim=(0, None))
    axes[0].set_ylabel("applied shift / gradient norm")
    style.legend(figure)
    return figure


EXPERIMENT = Experiment(
    "bfp_norm",
    "Does Backforward remove covariate shift, and does normalisation still help where it has?",
    Part(
        layout("method", {"model": NETWORKS}, where=lambda run: run.choice("norm") == "none"),
        (
            Effects("largest applied shift of any layer / its gradient's norm", removed, "removes_shift"),
            Effects("applied shift of layers above the first / their gradient's norm", stale, "stale"),
        ),
        title="The shift without norm: Backforward, and plain SGD by network",
    ),
    Part(
        layout(arm, {"model": NETWORKS}, chosen="lr"),
        (
            Compare(TEST, "bfp + none", "sgd + batch", "replaces_norm"),
            Compare(TEST, "bfp + batch", "bfp + none", "norm_adds_nothing"),
            Compare(TEST, "bfp + none", "sgd + none"),
            Compare(TEST, "bfp + batch", "sgd + batch"),
            Compare(TEST, "bfp + prop", "sgd + prop"),
            Compare(TEST, "sgd + batch", "sgd + none"),
        ),
        title="Differences of test accuracy",
        means=(LOSS, TEST),
        tables=shift_tables,
        drawings=(
            Drawing(
                "accuracy",
                "Test accuracy by update rule and normalisation",
                "Each arm at the learning rate that its validation accuracy chose; mean over seeds with 95 % "
                "intervals. The vertical scales differ.",
                reached(TEST, free=True),
            ),
            Drawing(
                "shift",
                "Applied shift of each layer, as a share of its gradient",
                "How far the gradient that a layer steps along is from the one that it faces once the layers below "
                "have moved. Median over the epochs, mean over seeds; none at the first layer. What is under a "
                "thousandth is not drawn: under exact Backforward all of it, which the legend says.",
                draw_shift,
            ),
        ),
    ),
    diagnostics=(APPLIED, INDUCED),
)
