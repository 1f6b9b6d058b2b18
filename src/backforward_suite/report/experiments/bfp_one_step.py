"""One step at learning rate 1 on four images: does it learn them?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import matplotlib.figure
import numpy as np
import pandas as pd

from backforward_suite.report import statistics, style
from backforward_suite.report.claims import claims_of
from backforward_suite.report.experiments._experiment import (
    Cell,
    Data,
    Drawing,
    Effects,
    Experiment,
    Layout,
    Part,
    Words,
    layout,
)
from backforward_suite.report.experiments._figures import Axes, Looks, by_row, panels
from backforward_suite.report.experiments._tables import table
from backforward_suite.report.finding import Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect, how_often

PUBLISHED = {"model.init": "he", "data_norm": "channel"}  # in the published runs; the paper names no setting
BELOW = float(claims_of("bfp_one_step")["learns_batch"].arguments["loss_below"])  # such a loss counts as learnt
FLOOR = 1e-8  # where curves are cut: in single precision a loss under 6e-8 comes out as 0
GUESS = math.log(10)
METHODS = ("sgd", "bfp", "bfp_poster", "sgd_repeat")
SETTINGS: Mapping[str, Words] = {
    "model.init": {"he": "He's initial weights", "default": "PyTorch's initial weights"},
    "data_norm": {
        "channel": "standardised inputs", "global": "inputs standardised by pixel", "none": "raw pixels",
    },
}  # fmt: skip
Losses = Mapping[str, pd.DataFrame]  # for each method: index draw, a column for each width; undefined losses infinite


def _steps(hidden: bool) -> Layout:
    """A row for each setting, the published one first, of networks with or without a hidden layer."""

    def where(run: Run) -> bool:
        return (run.setting("model.depth", 1) > 0) == hidden and {"width", "draw", "loss_after"} <= set(run.study)

    return layout("method", SETTINGS, where=where)


def _losses(cell: Cell) -> Losses:
    frames = {method: cell.arms[method][0].study for method in METHODS if method in cell.arms}
    return {
        method: frame.pivot_table(index="draw", columns="width", values="loss_after", dropna=False).fillna(math.inf)
        for method, frame in frames.items()
    }


def _toy(cells: Sequence[Cell]) -> Losses:
    """The losses in the published runs' setting."""
    return next((_losses(cell) for cell in cells if cell.row == PUBLISHED), {})


def _counts(hits: pd.DataFrame) -> list[Effect]:
    """How often something happened, by width."""
    return [how_often(f"width {width}", int(hits[width].sum()), len(hits)) for width in hits.columns]


def _ends(method: str, happens: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Sequence[Cell]], list[Effect]]:
    """How often the loss of a method is such, in the published runs' setting."""
    return lambda cells: _counts(happens(_toy(cells).get(method, pd.DataFrame())))


def _single(cells: Sequence[Cell]) -> list[Effect]:
    found = _counts(_toy(cells).get("sgd", pd.DataFrame()) < BELOW)
    return [replace(each, label="single layer") for each in found[:1]]  # it has no hidden width


def _pairs(of_method: Losses, holds: Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame]) -> list[Effect]:
    """In how many networks something holds of the losses under Backforward and SGD."""
    empty = pd.DataFrame()
    return _counts(holds(*of_method.get("bfp", empty).align(of_method.get("sgd", empty), join="inner")))


def _won(of_method: Losses) -> list[Effect]:
    """Backforward ends below SGD; equal losses, such as two of exactly 0, are not below."""
    return _pairs(of_method, lambda ours, theirs: ours < theirs)


def _tied(of_method: Losses) -> dict[str, str]:
    """Both end at a loss of exactly 0."""
    found = _pairs(of_method, lambda ours, theirs: (ours == 0) & (theirs == 0))
    return {each.label: f"{sum(each.values):.0f} of {len(each.values)}" for each in found}


def _table(cells: Sequence[Cell]) -> list[Table]:
    rows = []
    for cell in cells:
        of_method = _losses(cell)
        won, tied = {each.label: each.estimate() for each in _won(of_method)}, _tied(of_method)
        init, inputs = cell.label.split(", ")
        for method, losses in of_method.items():
            for learnt in _counts(losses < BELOW):
                width = int(learnt.label.removeprefix("width "))
                ours = learnt.label if method == "bfp" else ""
                rows.append(
                    {
                        "initial weights": init,
                        "inputs": inputs,
                        "rule": style.look(method).label,
                        "width": width,
                        "median": _median(losses[width]),
                        "10 %": _plain(losses[width], 0.1),
                        "90 %": _plain(losses[width], 0.9),
                        f"loss under {BELOW:g}": learnt.estimate(),
                        "below SGD": won.get(ours),
                        "both exactly 0": tied.get(ours),
                    }
                )
    note = (
        "Quantiles over fresh networks, each with four images of its own, the same for every rule. Medians have the 95 "
        "% interval of order statistics, shares Wilson's 95 % interval. The first setting is that of the published "
        "runs."
    )
    return [table("Loss after one step", rows, note)]


def _median(values: pd.Series[float]) -> str:
    found = statistics.quantile(values, 0.5)
    return "infinite" if found.value is None else str(found)


def _plain(values: pd.Series[float], q: float) -> str:
    value = float(np.quantile(values, q, method="inverted_cdf"))
    return f"{value:.2g}" if math.isfinite(value) else "infinite"


def _tail(cells: Sequence[Cell]) -> list[str]:
    """What a median hides, and how often nothing can be told apart."""
    toy = _toy(cells)
    if not {"bfp", "sgd"} <= set(toy):
        return []
    width = 256 if 256 in toy["bfp"].columns else toy["bfp"].columns[-1]
    told = [
        f"{style.look(method).label} median {_plain(toy[method][width], 0.5)}, 90th percentile "
        f"{_plain(toy[method][width], 0.9)}"
        for method in ("bfp", "sgd")
        if width in toy[method]
    ]
    return [
        f"Loss after the step at width {width}, in the published runs' setting: {'; '.join(told)}. In "
        f"{_tied(toy).get(f'width {width}', '0 of 0')} networks both rules end at a loss of exactly 0, which counts "
        "for neither."
    ]


# --- figures ---------------------------------------------------------------------------------------------------------


def _draw_widths(panel: Axes, cell: Cell, looks: Looks) -> None:
    for method, losses in _losses(cell).items():
        drawn = losses.clip(lower=FLOOR)
        widths = [float(width) for width in losses.columns]
        style.points(panel, looks[method], widths, [statistics.quantile(drawn[w], 0.5) for w in losses.columns])
        style.at_values(panel, widths)
    panel.set_yscale("log")


def _draw_distribution(data: Data) -> matplotlib.figure.Figure:
    toy = _toy(data.cells)
    widths = sorted({width for losses in toy.values() for width in losses.columns})
    figure, axes = panels(max(1, len(widths)), "share of networks", sharex=True, sharey=True)
    for panel, width in zip(axes, widths, strict=False):
        panel.axvline(BELOW, color="0.3", linewidth=0.9, linestyle=":")
        panel.axvline(GUESS, color="0.75", linewidth=0.9)
        for method, losses in toy.items():
            if width in losses:
                values, of = np.sort(losses[width].to_numpy()), style.look(method)
                shares = np.arange(1, len(values) + 1) / len(values)
                there = np.isfinite(values)
                drawn = np.maximum(values[there], FLOOR)
                panel.plot(drawn, shares[there], marker=of.marker, markevery=0.1, label=of.label, **of.line)
        panel.set(xscale="log", title=f"hidden width {width}", ylim=(0, 1))
    for panel in axes[-2:]:
        panel.set_xlabel("loss after the step (nats)")
    return figure


LEARNT = f"share of networks whose loss after the step is under {BELOW:g}"
LOWER = "share of networks whose loss is lower than after SGD's step"
ABOVE = "share of networks whose loss after the step is above that of a guess"
EXPERIMENTS = (
    Experiment(
        "bfp_one_step",
        "Does one step of Backforward at learning rate 1 learn a batch of four images?",
        Part(_steps(hidden=False), Effects(LEARNT, _single, "single_layer")),
        Part(
            _steps(hidden=True),
            Effects(LEARNT, _ends("bfp", lambda losses: losses < BELOW), "learns_batch"),
            Effects(LOWER, lambda cells: _won(_toy(cells)), "below_sgd"),
            Effects(ABOVE, _ends("sgd", lambda losses: losses > GUESS), "sgd_fails"),
            Drawing(
                "widths",
                "Loss on four images after one step at lr 1, by hidden width",
                "Median over fresh networks with its 95 % interval, 0 drawn at 1e-8. The first panel is the published "
                "runs' setting, which is judged at width 256. The next figure shows how far losses scatter.",
                by_row(_draw_widths, "loss after the step (nats)", "hidden width", sharey=True),
            ),
            Drawing(
                "distribution",
                "How the loss after one step is distributed",
                "Cumulative share of fresh networks by their loss after the step (0 is drawn at 1e-8), in the "
                f"published runs' setting. Dotted line: {BELOW:g}, below which a batch counts as learnt; grey line: a "
                "guess among ten classes.",
                _draw_distribution,
            ),
            tables=_table,
            notes=_tail,
        ),
    ),
)
