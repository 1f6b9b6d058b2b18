"""Does Backforward reach a plateau at lr 0.1, and does a decaying learning rate mitigate it?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from backforward_suite.report import statistics
from backforward_suite.report.experiments._experiment import Cell, Compare, Drawing, Effects, Experiment, Part, layout
from backforward_suite.report.experiments._figures import curves, ratios
from backforward_suite.report.experiments._measures import LOSS, TEST, curve_of
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

SCHEDULES = {"constant": "constant rate", "halve": "rate halved every few epochs", "cosine": "cosine to zero"}


def lead(cell: Cell, share: float = 1.0) -> Mapping[Hashable, float | None]:
    """By seed, training loss of Backforward over that of SGD after a share of the epochs."""

    def read(run: Run) -> float | None:
        if share == 1:
            return run.final("loss/train")  # a diverged run's is a guess's
        curve = curve_of(run, "loss/train")
        return float(curve.iloc[max(0, round(share * len(curve)) - 1)]) if len(curve) else None

    ours, theirs = (statistics.by_seed(cell.arms.get(rule, []), read) for rule in ("bfp", "sgd"))
    return {seed: one / other if one and (other := theirs.get(seed)) else None for seed, one in ours.items()}


def later(cells: Sequence[Cell]) -> list[Effect]:
    """The lead at the end over that at half of the epochs."""
    return [statistics.paired(lead(cell), lead(cell, 0.5), cell.label, ratio=True) for cell in cells]


def under_decay(cells: Sequence[Cell]) -> list[Effect]:
    """The lead under each decaying schedule over that at the constant rate."""
    constant = [cell for cell in cells if cell.row["schedule"] == "constant"]
    return [
        statistics.paired(lead(cell), lead(base), cell.label, ratio=True)
        for base in constant
        for cell in cells
        if cell is not base
    ]


EXPERIMENT = Experiment(
    "bfp_schedule",
    "Are Backforward and SGD alike at learning rate 0.1, and does Backforward lead by more where the rate decays?",
    Part(
        layout("method", {"schedule": SCHEDULES}),
        (
            Compare(LOSS, "bfp", "sgd", "similar"),
            Effects("BFP / SGD in training loss, last epoch / half of the epochs", later, "plateau"),
            Effects("BFP / SGD in training loss, under decay / at the constant rate", under_decay, "mitigated"),
            Compare(TEST, "bfp", "sgd"),
        ),
        title="At lr 0.1, by schedule",
        means=(LOSS, TEST),
        drawings=(
            Drawing(
                "curves",
                "Training loss at lr 0.1, by schedule",
                "Mean over seeds (of the logarithm) with its pointwise 95 % t interval.",
                curves("loss/train", "training loss (nats)", logs=True),
            ),
            Drawing(
                "ratio",
                "Training loss of Backforward / SGD, epoch by epoch",
                "Geometric mean of the pairs with its pointwise 95 % t interval. Under 1 Backforward leads.",
                ratios("sgd", "training loss, BFP / SGD"),
            ),
        ),
    ),
)
