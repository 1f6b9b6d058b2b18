"""Does the gain of Backforward grow with depth?"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import numpy as np

from backforward_suite.report import statistics, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.finding import Figure, Finding, Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect
from backforward_suite.report.verdicts import Ground

QUESTION = "Does Backforward gain more on SGD the deeper the network?"
Place = tuple[float, ...]  # learning rate, depth
Cells = Mapping[Place, Mapping[str, Sequence[Run]]]


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare both rules at each depth, and fit how their ratio moves with it."""
    of, ground = common.by_word(claims), Ground.of(runs, scale)
    there = common.done(runs)
    cells = common.cells(there, "lr", "model.depth")
    ratios = {at: _ratio(arms, f"lr {at[0]:g}, depth {at[1]:g}") for at, arms in cells.items()}
    trends = [_trend(cells, lr) for lr in common.numbers(there, "lr")]
    judged = [verdicts.direction(of["grows"], trends, ground)]
    figures = [
        Figure(
            "bfp_depth",
            "Training loss of Backforward over that of SGD, by depth",
            "After the last epoch; geometric mean of the pairs with its 95 % interval, a line for each learning rate. "
            "At 1 the rules do not differ. If the gain grew with depth, the lines would fall. "
            "A diverged run counts as a guess.",
            partial(common.draw_over, ratios, "hidden layers", "training loss, BFP / SGD"),
        )
    ]
    tables = [_table(cells, ratios), _trend_table(trends)]
    return common.finding("bfp_depth", QUESTION, runs, claims, scale, judged, tables, figures)


def _ratio(arms: Mapping[str, Sequence[Run]], label: str) -> Effect:
    return common.effect(arms.get("bfp", []), arms.get("sgd", []), _loss, label, ratio=True)


def _loss(run: Run) -> float | None:
    return run.final("loss/train")


def _trend(cells: Cells, lr: float) -> Effect:
    """For each seed, by what factor the ratio of losses moves when the depth doubles (least squares on logarithms)."""
    by_depth: dict[float, dict[Hashable, float]] = {}
    for (at_lr, depth), arms in cells.items():
        if at_lr == lr:
            ours, theirs = (statistics.by_seed(arms.get(method, []), _loss) for method in ("bfp", "sgd"))
            by_depth[depth] = {
                seed: math.log(one / other) for seed, one in ours.items() if one and (other := theirs.get(seed))
            }
    seeds = sorted({int(str(seed)) for found in by_depth.values() for seed in found})
    slopes = []
    for seed in seeds:
        points = [(math.log2(depth), found[seed]) for depth, found in by_depth.items() if seed in found]
        if len(points) == len(by_depth) > 1:
            depths, logs = np.transpose(points)
            slopes.append(float(np.polyfit(depths, logs, deg=1)[0]))
    return Effect(f"lr {lr:g}", tuple(slopes), ratio=True, lost=len(seeds) - len(slopes))


def _table(cells: Cells, ratios: Mapping[Place, Effect]) -> Table:
    corrected = dict(zip(ratios, statistics.holm(list(ratios.values())), strict=True))
    rows = []
    for at, arms in cells.items():
        found = corrected[at]
        points = common.points(arms.get("bfp", []), arms.get("sgd", []), "accuracy/test")
        rows.append(
            {
                "lr": f"{at[0]:g}",
                "hidden layers": f"{at[1]:g}",
                "training loss, SGD": common.mean_cell(arms.get("sgd", []), _loss),
                "training loss, BFP": common.mean_cell(arms.get("bfp", []), _loss),
                "BFP / SGD": common.shown(found),
                "p": common.p_text(found.corrected_p),
                "test accuracy, BFP - SGD, points": common.shown(points),
            }
        )
    return common.table(
        "Backforward against SGD, by depth",
        rows,
        f"After the last epoch. {common.INTERVALS} {common.correction_note(len(rows))} Differences of accuracy are not "
        "corrected.",
    )


def _trend_table(trends: Sequence[Effect]) -> Table:
    rows = [
        {"lr": effect.label.removeprefix("lr "), "factor": common.shown(effect), "p": common.p_text(effect.corrected_p)}
        for effect in statistics.holm(trends)
    ]
    return common.table(
        "By what factor BFP / SGD moves when the depth doubles",
        rows,
        f"Under 1: the gain grows. Least squares in logarithms, for each seed. {common.INTERVALS} "
        f"{common.correction_note(len(rows))}",
    )
