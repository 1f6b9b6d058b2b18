"""NormProp, Fig. 1: input normalised by statistics of the whole training set, or of each mini-batch."""

from __future__ import annotations

import matplotlib.axes

from backforward_suite.report import style
from backforward_suite.report.claims import claims_of
from backforward_suite.report.experiments._experiment import Cell, Compare, Drawing, Experiment, Part, Sample, layout
from backforward_suite.report.experiments._figures import curves
from backforward_suite.report.experiments._measures import PERCENT, VALIDATION, Measure, curve_of
from backforward_suite.report.reading import Run


def best_accuracy(run: Run) -> float | None:
    """The highest validation accuracy of all epochs, percent."""
    curve = curve_of(run, "accuracy/validation")
    return 100 * float(curve.max()) if len(curve) else None


def gap(run: Run) -> float | None:
    """Test less training loss after the last epoch, nats."""
    test, train = run.final("loss/test"), run.final("loss/train")
    return None if test is None or train is None or run.status == "diverged" else test - train


def paper(run: Run) -> bool:
    """Whether a run has the paper's images, epochs, width and validation set (the test set)."""
    whole = run.result.get("data", {}).get("train") == 45_000 and run.setting("max_epochs") >= 50
    return bool(whole and run.setting("model.width") == 1 and run.setting("data.protocol") == "paper")


def mark_best(panel: matplotlib.axes.Axes, cell: Cell) -> None:
    """The published best, in the panel that it belongs to."""
    if cell.row["batch_size"] == 50:
        number = claims_of("np_data_norm")["best"].number("batch 50, mini-batch")
        style.mark_published(panel, number, f"published: {number:g} %")


BEST = Measure("best validation accuracy, %", best_accuracy, points="points", bounds=PERCENT)
GAP = Measure("gap, test less training loss", gap, "nats", points="nats")
EXPERIMENT = Experiment(
    "np_data_norm",
    "Does it matter whether the network's input is normalised by the whole training set or by the mini-batch?",
    Part(
        layout("data_norm", {"batch_size": "batch {}"}),
        (
            Compare(VALIDATION, "batch", "global", "unaffected"),
            Compare(BEST, "batch", "global"),
            Compare(GAP, "batch", "global", "regularises"),
            Sample(BEST, ("batch",), "best", paper),
        ),
        title="Mini-batch against whole set",
        names={"batch": "mini-batch", "global": "whole training set"},
        means=(VALIDATION, BEST, GAP),
        drawings=(
            Drawing(
                "curves",
                "Validation accuracy by epoch, by normalisation of the input",
                "The paper's Fig. 1: mean over seeds, bands are 95 % intervals. Horizontal line: the paper's best.",
                curves("accuracy/validation", "validation accuracy, %", times=100, beside=mark_best),
            ),
        ),
    ),
)
