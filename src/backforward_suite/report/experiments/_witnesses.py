"""What the two experiments on the witnesses beside BatchNorm share: the norms, accuracy and shift of each."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.figure
import scipy.stats

from backforward_suite.report import statistics, style
from backforward_suite.report.experiments._experiment import (
    Cell,
    Compare,
    Data,
    Drawing,
    Effects,
    Experiment,
    Part,
    called,
    layout,
)
from backforward_suite.report.experiments._figures import panels
from backforward_suite.report.experiments._measures import TEST, Measure
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

INDUCED = "shift/induced_relative"
NAMES = {
    "noisy_batch": "noisy BatchNorm",
    "layer": "layer norm",
    "group": "group norm",
    "weight": "weight norm",
    "weight_standardization": "scaled weight standardisation",
    "selu": "SELU",
}


def induced(run: Run) -> float | None:
    """The induced shift, mean over the layers above the first and over the times at which it was measured."""
    rows = run.diagnostics
    if not len(rows):
        return None
    rows = rows[(rows["measure"] == INDUCED) & (rows["update"] == 1)]
    above = rows[rows["layer"] != rows["layer"].iloc[0]] if len(rows) else rows
    values = above["value"].dropna()
    return float(values.mean()) if len(values) else None


SHIFT = Measure("induced shift / its gradient's norm", induced, ratio=True)


def correlation(cells: Sequence[Cell]) -> list[Effect]:
    """Spearman's correlation of shift and test accuracy over the norms, plus a half, a value a seed."""
    rows = []
    for cell in cells:
        shifts = {arm: statistics.by_seed(runs, SHIFT.read) for arm, runs in cell.arms.items()}
        scores = {arm: statistics.by_seed(runs, TEST.read) for arm, runs in cell.arms.items()}
        values = []
        for seed in sorted({seed for of in shifts.values() for seed in of}, key=str):
            pairs = [(of.get(seed), scores[arm].get(seed)) for arm, of in shifts.items()]
            known = [(shift, score) for shift, score in pairs if shift is not None and score is not None]
            if len(known) >= 5:
                values.append(float(scipy.stats.spearmanr(*zip(*known, strict=True)).statistic) + 0.5)
        if values:
            rows.append(Effect(cell.label, tuple(values)))
    return rows


def against(data: Data) -> matplotlib.figure.Figure:
    """Test accuracy over induced shift, a marker for each norm."""
    figure, axes = panels(max(1, len(data.cells)))
    looks = data.looks()
    for panel, cell in zip(axes, data.cells, strict=False):
        for arm, runs in cell.arms.items():
            shift, score = SHIFT.mean(runs), TEST.mean(runs)
            if shift.value is not None and score.value is not None:
                style.interval(panel, looks[arm], shift.value, score, label=called(arm, NAMES))
        panel.set(xlabel=SHIFT.name, ylabel=TEST.name)
    style.legend(figure)
    return figure


def witnesses(name: str, network: str) -> Experiment:
    """Every norm under SGD at the rate that validation accuracy chose, with its induced shift.

    Args:
        name: Of the experiment.
        network: Which network it is, in words.
    """
    return Experiment(
        name,
        f"Does a norm train better the less its layers' inputs shift, noisy BatchNorm among them, on {network}?",
        Part(
            layout("norm", chosen="lr"),
            (
                Compare(TEST, "noisy_batch", "batch", "noisy_as_well"),
                Compare(SHIFT, "noisy_batch", "batch", "noisy_shifts_more"),
                Effects("Spearman's correlation of shift and accuracy over norms, + .5", correlation, "explains"),
                Compare(TEST, lambda _: True, "none"),
            ),
            title="Noisy BatchNorm against BatchNorm, and all norms",
            names=NAMES,
            means=(TEST, SHIFT),
            drawings=(
                Drawing(
                    "shift",
                    "Test accuracy over induced shift",
                    "Each norm at the learning rate that validation accuracy chose; 95 % intervals over seeds.",
                    against,
                ),
            ),
        ),
        diagnostics=(INDUCED,),
        notes=("Norms, settings and tolerances were committed before the runs, in 62654bd.",),
    )
