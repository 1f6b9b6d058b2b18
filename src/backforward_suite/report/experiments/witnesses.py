"""Accuracy and shift under BatchNorm with noise and under every other norm, on an MLP and on NIN."""

from __future__ import annotations

from collections.abc import Sequence

import scipy.stats

from backforward_suite.report import statistics, style
from backforward_suite.report.experiments._experiment import Cell, Compare, Drawing, Effects, Experiment, Part, layout
from backforward_suite.report.experiments._figures import Axes, Looks, by_row
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


def _induced(run: Run) -> float | None:
    """The induced shift, mean over the layers above the first and over the times at which it was measured."""
    rows = run.diagnostics
    rows = rows[(rows["measure"] == INDUCED) & (rows["update"] == 1)]
    values = rows[rows["layer"] != rows["layer"].iloc[0]]["value"].dropna() if len(rows) else rows
    return float(values.mean()) if len(values) else None


SHIFT = Measure("induced shift / its gradient's norm", _induced, ratio=True)


def _correlation(cells: Sequence[Cell]) -> list[Effect]:
    """For each seed, Spearman's correlation of shift and test accuracy over the norms, plus a half."""
    rows = []
    for cell in cells:
        shifts, scores = ({arm: statistics.by_seed(runs, measure.read) for arm, runs in cell.arms.items()}
                          for measure in (SHIFT, TEST))  # fmt: skip
        values = []
        for seed in sorted({seed for of in shifts.values() for seed in of}, key=str):
            pairs = [(of.get(seed), scores[arm].get(seed)) for arm, of in shifts.items()]
            known = [pair for pair in pairs if None not in pair]
            if len(known) >= 5:
                values.append(float(scipy.stats.spearmanr(*zip(*known, strict=True)).statistic) + 0.5)
        if values:
            rows.append(Effect(cell.label, tuple(values)))
    return rows


def _against(panel: Axes, cell: Cell, looks: Looks) -> None:
    """Test accuracy over induced shift, a marker for each norm."""
    for arm, runs in cell.arms.items():
        shift = SHIFT.mean(runs).value
        if shift is not None:
            style.interval(panel, looks[arm], shift, TEST.mean(runs), label=looks[arm].label)


def _witnesses(name: str, network: str) -> Experiment:
    """Every norm under SGD at the rate that validation accuracy chose, with its induced shift."""
    return Experiment(
        name,
        f"Do norms with less shift train better on {network}, and what about BatchNorm with added noise?",
        Part(
            layout("norm", chosen="lr"),
            Compare(TEST, "noisy_batch", "batch", "noisy_as_well"),
            Compare(SHIFT, "noisy_batch", "batch", "noisy_shifts_more"),
            Effects("Spearman's correlation of shift and accuracy over norms, + .5", _correlation, "explains"),
            Compare(TEST, lambda _: True, "none"),
            Drawing(
                "shift",
                "Test accuracy over induced shift",
                "Each norm at the learning rate with its best validation accuracy; 95 % intervals over seeds.",
                by_row(_against, TEST.name, SHIFT.name),
            ),
            title="Noisy BatchNorm against BatchNorm, and all norms",
            names=NAMES,
            means=(TEST, SHIFT),
        ),
        diagnostics=(INDUCED,),
        notes=("Norms, settings and tolerances were committed before the runs, in 62654bd.",),
    )


EXPERIMENTS = (
    _witnesses("bfp_witnesses", "an MLP of three hidden layers"),
    _witnesses("np_witnesses", "NIN"),
)
