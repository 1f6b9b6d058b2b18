"""NormProp, Fig. 1: input normalised by statistics of the whole training set, or of each mini-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.figure

from backforward_suite.report import style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.experiments import _normprop as family
from backforward_suite.report.finding import Figure, Finding, Table
from backforward_suite.report.reading import Run

QUESTION = "Is it better to normalise the network's input by the mini-batch than by the whole training set?"
KINDS = {"global": "whole training set", "batch": "mini-batch"}
Arms = Mapping[int, Mapping[str, Sequence[Run]]]  # by batch size and data norm


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare last validation accuracies at each batch size."""
    ended = common.done(runs)
    sizes = [size for size in family.values(ended, "batch_size") if isinstance(size, int)]
    arms = {size: {kind: common.done(ended, batch_size=size, data_norm=kind) for kind in KINDS} for size in sizes}
    ground = verdicts.Ground.of(
        runs, scale, [f"batch {size}, {kind}" for size, by in arms.items() for kind in KINDS if not by[kind]]
    )
    effects = [
        common.points(by["batch"], by["global"], "accuracy/validation", f"batch {size}") for size, by in arms.items()
    ]
    best = family.sample(arms.get(50, {}).get("batch", ()), best_accuracy, "batch 50 batch", "%")
    judged = {
        "batch_better": lambda claim: verdicts.direction(claim, effects, ground),
        "best": lambda claim: verdicts.value(claim, [best], ground),
    }
    words = common.by_word(claims)
    published = words["best"].published.get("batch 50 batch") if "best" in words else None
    return common.finding(
        "np_data_norm", QUESTION, runs, claims, scale,
        [judged[word](claim) for word, claim in words.items()],
        tables=[
            _table(arms),
            common.effects_table("Mini-batch less whole set, last validation accuracy, points", effects, "batch size"),
        ],
        figures=[
            Figure(
                "np_data_norm_curves",
                "Validation accuracy by epoch, by normalisation of the input",
                "The paper's Fig. 1: mean over seeds, bands are 95 % intervals. Horizontal line: the paper's best.",
                lambda: _draw(arms, published),
            )
        ],
    )  # fmt: skip


def best_accuracy(run: Run) -> float | None:
    """The highest validation accuracy of all epochs, percent."""
    curve = run.curve("accuracy/validation")
    return 100 * float(curve.max()) if len(curve) else None


def _table(arms: Arms) -> Table:
    rows = [
        {
            "batch size": size,
            "input normalised by": KINDS[kind],
            "lr": ", ".join(map(str, family.values(runs, "lr"))),
            "seeds": len(runs),
            "last accuracy, %": common.estimate_of(runs, family.validation_accuracy),
            "best accuracy, %": common.estimate_of(runs, best_accuracy),
        }
        for size, by in arms.items()
        for kind, runs in by.items()
        if runs
    ]
    return common.table("Validation accuracy", rows, "Means over seeds with 95 % intervals.")


def _draw(arms: Arms, published: float | None) -> matplotlib.figure.Figure:
    figure, panels = style.canvas(1, max(1, len(arms)), sharey=True)
    looks = style.looks(["global", "data batch"], {"global": KINDS["global"], "data batch": KINDS["batch"]})
    for axes, (size, by) in zip(panels[0], arms.items(), strict=False):
        for kind, look in zip(KINDS, looks.values(), strict=True):
            curves = [100 * run.curve("accuracy/validation") for run in by[kind]]
            style.band(axes, look, family.band(curve[curve.index > 0] for curve in curves))
        if published is not None and size == 50:
            style.mark_published(axes, published, f"published: {published:g} %")
        axes.set_title(f"batch size {size}")
        style.epochs(axes)
    panels[0, 0].set_ylabel("validation accuracy, %")
    style.legend(figure)
    return figure
