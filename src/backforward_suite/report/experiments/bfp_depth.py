"""Does the gain of Backforward grow with depth?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backforward_suite.report import statistics
from backforward_suite.report.experiments._experiment import Cell, Compare, Drawing, Effects, Experiment, Part, layout
from backforward_suite.report.experiments._figures import over
from backforward_suite.report.experiments._measures import LOSS, TEST
from backforward_suite.report.experiments.bfp_schedule import lead
from backforward_suite.report.statistics import Effect


def deeper(depth: int, shallow: int) -> Callable[[Sequence[Cell]], list[Effect]]:
    """BFP / SGD in training loss at one depth over the same at another, for each learning rate."""

    def effects(cells: Sequence[Cell]) -> list[Effect]:
        at = {(cell.row["lr"], cell.row["model.depth"]): cell for cell in cells}
        return [
            statistics.paired(lead(cell), lead(at[lr, shallow]), f"lr {lr:g}", ratio=True)
            for (lr, layers), cell in at.items()
            if layers == depth and (lr, shallow) in at
        ]

    return effects


LEAD = "BFP / SGD in training loss, with {} hidden layers / with {}"
EXPERIMENT = Experiment(
    "bfp_depth",
    "Does Backforward gain more on SGD the deeper the network?",
    Part(
        layout("method", {"lr": "lr {:g}", "model.depth": "depth {}"}),
        (Compare(LOSS, "bfp", "sgd"), Compare(TEST, "bfp", "sgd")),
        title="Backforward against SGD, by depth",
        means=(LOSS, TEST),
        drawings=(
            Drawing(
                "loss",
                "Training loss of Backforward / SGD, by depth",
                "After the last epoch; geometric mean of the pairs with its 95 % interval, a line for each learning "
                "rate. Under 1 Backforward is ahead. Above, on a scale of its own, where its runs diverged: they count "
                "as a guess (a loss of 2.3, imputed).",
                over("model.depth", "hidden layers", "training loss, BFP / SGD"),
            ),
        ),
    ),
    Part(
        layout("method", {"lr": "lr {:g}", "model.depth": "depth {}"}),
        (
            Effects(LEAD.format("four", "one"), deeper(4, 1), "greater_impact"),
            Effects(LEAD.format("eight", "four"), deeper(8, 4), "deepest"),
        ),
        title="How the ratio of training losses moves with depth",
        note="Under 1: the gain grows. From one to four layers, and on to eight, since it turns between them.",
    ),
)
