"""NormProp, Fig. 4: batch sizes 1, 50, 100 and 250."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from backforward_suite.report.experiments._experiment import Cell, Compare, Drawing, Effects, Experiment, Part, layout
from backforward_suite.report.experiments._figures import curves
from backforward_suite.report.experiments._measures import TEST, VALIDATION
from backforward_suite.report.statistics import Effect


def neighbours(cells: Sequence[Cell]) -> list[Effect]:
    """Each batch size against the next larger one."""
    return [
        TEST.compare(cell.arms[small], cell.arms[large], f"{small} - {large}")
        for cell in cells
        for small, large in pairwise(sorted(cell.arms, key=int))
    ]


EXPERIMENT = Experiment(
    "np_batch_size",
    "Does NormProp train with batches of one, is it unaffected by the batch size, and do smaller ones do better?",
    Part(
        layout("batch_size", chosen="lr"),
        (
            Compare(TEST, "1", "50", "batch_one"),
            Effects("test accuracy, points, smaller batch - larger batch", neighbours, "unaffected smaller_better"),
        ),
        title="Smaller against larger batches",
        names={"1": "batch 1", "50": "batch 50", "100": "batch 100", "250": "batch 250"},
        means=(VALIDATION, TEST),
        drawings=(
            Drawing(
                "curves",
                "Validation accuracy by epoch, by batch size",
                "The paper's Fig. 4: mean over seeds, bands are 95 % intervals; each batch size at the learning rate "
                "of its highest last validation accuracy. With batches of one the input is normalised by the "
                "statistics of the training set, else by those of the mini-batch.",
                curves("accuracy/validation", "validation accuracy, %", times=100),
            ),
        ),
    ),
)
