"""Does covariate shift ask for smaller learning rates? The largest one that still trains, by update rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib.figure

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.finding import Estimate, Figure, Finding, Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect
from backforward_suite.report.verdicts import Ground

QUESTION = "Does Backforward train at larger learning rates than SGD?"
METHODS = ("sgd", "bfp", "bfp_poster", "sgd_repeat")
Arms = Mapping[str, Sequence[Run]]  # by method, over all learning rates


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare, seed by seed, the largest learning rate up to which an arm trains."""
    of, ground = common.by_word(claims), Ground.of(runs, scale)
    methods = common.arms(common.done(runs))
    arms = {name: methods[name] for name in METHODS if name in methods}
    ratios = [common.larger_lr(arms[name], arms["sgd"], name) for name in arms if name != "sgd" and "sgd" in arms]
    judged = [verdicts.direction(of["larger"], ratios, ground)]
    figures = [
        Figure(
            "bfp_max_lr",
            "Where training still works, by learning rate",
            "Left: training loss after the last epoch, median over seeds; a diverged run counts as a guess or worse. "
            "Right: share of seeds that train, that is, end below the loss of a guess.",
            partial(_draw, arms),
        )
    ]
    return common.finding(
        "bfp_max_lr", QUESTION, runs, claims, scale, judged, [_table(arms, ratios), _rates_table(arms)], figures
    )


def _table(arms: Arms, ratios: Sequence[Effect]) -> Table:
    tested = {effect.label: effect for effect in statistics.holm(ratios)}
    rows = []
    for name, runs in arms.items():
        largest = ["none" if lr is None else f"{lr:g}" for lr in common.largest_lr(runs).values()]
        found = tested.get(name)
        rows.append(
            {
                "rule": style.look(name).label,
                "largest lr that trains, by seed": ", ".join(largest),
                "/ SGD": None if found is None else common.shown(found),
                "p": None if found is None else common.p_text(found.corrected_p),
                "remark": None if found is None else found.note or None,
            }
        )
    return common.table(
        "Largest learning rate that trains",
        rows,
        "Trains: finished with a training loss below that of a guess, and so at all smaller rates of the grid. A limit "
        "lies between that rate and the next, which the interval of the ratio takes in: a step of the grid alone is "
        f"not told apart from no difference. {common.INTERVALS} "
        f"{common.correction_note(len(ratios))}",
    )


def _rates_table(arms: Arms) -> Table:
    rows = []
    for lr in common.numbers([run for runs in arms.values() for run in runs], "lr"):
        row: dict[str, object] = {"lr": f"{lr:g}"}
        for name, runs in arms.items():
            there = common.at(runs, lr=lr)
            trained = f"{sum(map(common.trains, there))} of {len(there)}"
            loss = statistics.quantile([_loss(run) for run in there], 0.5).value
            median = "infinite" if loss is None else f"{loss:.3g}"
            row[style.look(name).label] = f"{trained} ({median})" if there else None
        rows.append(row)
    return common.table("Runs that train, by learning rate", rows, "In brackets: median training loss, last epoch.")


def _loss(run: Run) -> float:
    """After the last epoch; one that was not measured counts as the worst."""
    loss = run.final("loss/train")
    return math.inf if loss is None else loss


def _draw(arms: Arms) -> matplotlib.figure.Figure:
    figure, axes = style.canvas(1, 2)
    lrs = common.numbers([run for runs in arms.values() for run in runs], "lr")
    for name, runs in arms.items():
        of, at = style.look(name), [common.at(runs, lr=lr) for lr in lrs]
        medians: list[Estimate | None] = [statistics.quantile([_loss(run) for run in there], 0.5) for there in at]
        trained: list[Estimate | None] = [statistics.share(sum(map(common.trains, there)), len(there)) for there in at]
        style.points(axes[0, 0], of, lrs, medians)
        axes[0, 1].plot(lrs, [None if x is None else x.value for x in trained], marker=of.marker, **of.line)
    for panel in axes[0]:
        style.at_values(panel, lrs)
        panel.set(xlabel="learning rate")
    axes[0, 0].set(yscale="log", ylabel="training loss (nats)")
    axes[0, 1].set(ylabel="share of seeds that train", ylim=(-0.05, 1.05))
    style.legend(figure)
    return figure
