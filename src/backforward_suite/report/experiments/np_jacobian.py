"""NormProp 3.4: does the Jacobian factor J allow larger learning rates without diverging?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.figure

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.experiments import _normprop as family
from backforward_suite.report.finding import Estimate, Figure, Finding, Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

QUESTION = "Does the Jacobian factor allow larger learning rates without diverging?"
FACTORS = {"none": "no factor", "paper": "J = 1.21, as printed", "exact": "exact J"}
Arms = Mapping[str, Sequence[Run]]  # by factor, over all learning rates


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare the largest learning rate that trains with and without the factor, seed by seed."""
    arms = {factor: common.done(runs, norm__jacobian_factor=factor) for factor in FACTORS}
    ground = verdicts.Ground.of(runs, scale, [FACTORS[factor] for factor in ("none", "exact") if not arms[factor]])
    largest = [
        common.larger_lr(arms[factor], arms["none"], f"{factor} / none")
        for factor in ("exact", "paper")
        if arms[factor]
    ] or [Effect("exact / none", ())]
    gains = _gains(arms)
    return common.finding(
        "np_jacobian", QUESTION, runs, claims, scale,
        [verdicts.direction(claim, largest, ground) for claim in claims],
        tables=[
            _table(arms),
            common.effects_table("Exact J less no factor, validation accuracy, points", gains, "lr"),
        ],
        figures=[
            Figure(
                "np_jacobian_lr",
                "Where training still works, with and without the factor",
                "After the last epoch, by learning rate; means over seeds with 95 % intervals. A diverged run counts "
                "as a guess.",
                lambda: _draw(arms),
            )
        ],
    )  # fmt: skip


def _gains(arms: Arms) -> list[Effect]:
    with_it, without = arms["exact"], arms["none"]
    return [
        common.points(common.at(with_it, lr=lr), common.at(without, lr=lr), "accuracy/validation", f"{lr:g}")
        for lr in common.numbers(with_it, "lr")
        if common.at(without, lr=lr)
    ]


def _table(arms: Arms) -> Table:
    rows = []
    for factor, runs in arms.items():
        largest = [lr for lr in common.largest_lr(runs).values() if lr is not None]
        best = family.chosen(runs)
        if runs:
            rows.append(
                {
                    "factor": FACTORS[factor],
                    "runs": len(runs),
                    "diverged": str(sum(run.status == "diverged" for run in runs)),
                    "trained": str(sum(map(common.trains, runs))),
                    "largest lr that trains, by seed": ", ".join(f"{lr:g}" for lr in largest) or "none",
                    "best lr": ", ".join(map(str, family.values(best, "lr"))),
                    "test accuracy there, %": common.estimate_of(best, family.test_accuracy),
                }
            )
    note = (
        "Diverged: the loss became infinite or no number. Trained: finished with a training loss below a guess's. "
        "Largest: of the grid, all smaller ones training too. Best: by validation accuracy."
    )
    return common.table("Learning rates", rows, note)


def _draw(arms: Arms) -> matplotlib.figure.Figure:
    figure, panels = style.canvas(1, 2)
    names = ["J none", "J paper", "prop"]
    looks = style.looks(names, dict(zip(names, FACTORS.values(), strict=True)))
    rates: list[float] = []
    for runs, look in zip(arms.values(), looks.values(), strict=True):
        by_lr = {lr: common.at(runs, lr=lr) for lr in common.numbers(runs, "lr")}
        rates += by_lr
        trained = [statistics.share(sum(map(common.trains, members)), len(members)) for members in by_lr.values()]
        accuracy: list[Estimate | None] = [
            common.estimate_of(members, family.validation_accuracy) for members in by_lr.values()
        ]
        style.points(panels[0, 0], look, list(by_lr), accuracy)
        panels[0, 1].plot(list(by_lr), [each.value for each in trained], marker=look.marker, **look.line)
    for axes, label in zip(panels[0], ("validation accuracy, %", "share of seeds that train"), strict=True):
        style.at_values(axes, rates)
        axes.set(xlabel="learning rate", ylabel=label)
        axes.tick_params(axis="x", rotation=45)
    panels[0, 1].set_ylim(-0.05, 1.05)
    style.legend(figure)
    return figure
