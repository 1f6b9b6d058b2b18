"""NormProp, Fig. 4: batch sizes 1, 50, 100 and 250."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib.figure

from backforward_suite.report import style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.experiments import _normprop as family
from backforward_suite.report.finding import Figure, Finding, Table
from backforward_suite.report.reading import Run

QUESTION = "Does NormProp train with batches of one, and do smaller batches do slightly better?"
Arms = Mapping[int, Sequence[Run]]  # by batch size: runs at the chosen learning rate
PUBLISHED = (1, 50, 100, 250)


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare test accuracies, each batch size at the learning rate that its validation accuracy chose."""
    sizes = [size for size in family.values(common.done(runs), "batch_size") if isinstance(size, int)]
    arms = {size: family.chosen(common.done(runs, batch_size=size)) for size in sizes}
    ground = verdicts.Ground.of(runs, scale, [f"batch size {size}" for size in PUBLISHED if size not in arms])
    steps = [
        common.points(arms[small], arms[large], "accuracy/test", f"{small} - {large}")
        for small, large in pairwise(sorted(arms))
    ]
    of_one = [common.points(arms.get(1, ()), arms.get(50, ()), "accuracy/test", "1 - 50")]
    judged = {
        "batch_one": lambda claim: verdicts.direction(claim, of_one, ground),
        "smaller_better": lambda claim: verdicts.direction(claim, steps, ground),
    }
    return common.finding(
        "np_batch_size", QUESTION, runs, claims, scale,
        [judged[word](claim) for word, claim in common.by_word(claims).items()],
        tables=[
            _table(arms),
            common.effects_table("Smaller less larger batch, test accuracy, points", steps, "batch sizes"),
        ],
        figures=[
            Figure(
                "np_batch_size_curves",
                "Validation accuracy by epoch, by batch size",
                "The paper's Fig. 4: mean over seeds, bands are 95 % intervals; each batch size at the learning rate "
                "of its highest last validation accuracy. With batches of one the input is normalised by the "
                "statistics of the training set, else by those of the mini-batch.",
                lambda: _draw(arms),
            )
        ],
    )  # fmt: skip


def _table(arms: Arms) -> Table:
    rows = [
        {
            "batch size": size,
            "lr": ", ".join(map(str, family.values(runs, "lr"))),
            "input normalised by": ", ".join(map(str, family.values(runs, "data_norm"))),
            "seeds": len(runs),
            "validation accuracy, %": common.estimate_of(runs, family.validation_accuracy),
            "test accuracy, %": common.estimate_of(runs, family.test_accuracy),
        }
        for size, runs in arms.items()
    ]
    return common.table("Accuracy by batch size", rows, "Means over seeds with 95 % intervals.")


def _draw(arms: Arms) -> matplotlib.figure.Figure:
    figure, panels = style.canvas()
    axes = panels[0, 0]
    for size, look in style.sequence(list(arms), "batch size {}").items():
        curves = [100 * run.curve("accuracy/validation") for run in arms[size]]
        style.band(axes, look, family.band(curve[curve.index > 0] for curve in curves))
    style.epochs(axes)
    axes.set_ylabel("validation accuracy, %")
    style.legend(figure)
    return figure
