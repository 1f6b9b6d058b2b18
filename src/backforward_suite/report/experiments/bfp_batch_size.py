"""Does the effect of Backforward depend on learning rate and batch size?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.finding import Figure, Finding, Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect
from backforward_suite.report.verdicts import Ground

QUESTION = "Does Backforward converge faster than SGD whatever the learning rate and the batch size?"
METHODS = ("sgd", "bfp")
Cells = Mapping[tuple[float, ...], Mapping[str, Sequence[Run]]]  # by learning rate and batch size


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare both rules at each learning rate and batch size, and at the best of each rule."""
    of, ground = common.by_word(claims), Ground.of(runs, scale)
    there = common.done(runs)
    cells = common.cells(there, "lr", "batch_size")
    costs = [common.cost_effect(arms.get("bfp", []), arms.get("sgd", []), label(at)) for at, arms in cells.items()]
    judged = [verdicts.direction(of["faster"], costs, ground)]
    figures = [
        Figure(
            "bfp_batch_size",
            "Epochs to a training loss, Backforward over SGD",
            "By batch size, a line for each learning rate; geometric mean of the pairs with its 95 % interval. At 1 "
            "the rules do not differ; the grey region counts as no difference.",
            partial(
                common.draw_over,
                dict(zip(cells, costs, strict=True)),
                "batch size",
                "epochs, BFP / SGD",
                of["faster"].tolerance or 0.0,
            ),
        )
    ]
    tables = [_table(cells, costs), _best_table(there)]
    return common.finding("bfp_batch_size", QUESTION, runs, claims, scale, judged, tables, figures)


def label(at: tuple[float, ...]) -> str:
    """A row's label."""
    return f"lr {at[0]:g}, batch {at[1]:g}"


def _table(cells: Cells, costs: Sequence[Effect]) -> Table:
    rows = []
    for (at, arms), cost in zip(cells.items(), statistics.holm(costs), strict=True):
        ours, theirs = arms.get("bfp", []), arms.get("sgd", [])
        level = common.common_level([*ours, *theirs]) if ours and theirs else None
        final = common.effect(ours, theirs, lambda run: run.final("loss/train"), "", ratio=True)
        rows.append(
            {
                "lr": f"{at[0]:g}",
                "batch": f"{at[1]:g}",
                "at training loss": None if level is None else f"{level:g}",
                "epochs, BFP / SGD": common.shown(cost),
                "p": common.p_text(cost.corrected_p),
                "training loss, SGD": common.mean_cell(theirs, lambda run: run.final("loss/train")),
                "BFP / SGD": common.shown(final),
                "pairs": len(final.values),
            }
        )
    return common.table(
        "Backforward against SGD, by learning rate and batch size",
        rows,
        "Epochs to the lowest of a fixed row of losses that all runs of both rules reach; the last columns are after "
        f"the last epoch, not corrected. {common.INTERVALS} {common.correction_note(len(rows))}",
    )


def _best_table(runs: Sequence[Run]) -> Table:
    """Each rule at the setting that its validation accuracy chose."""
    arms = common.arms(runs)
    best = {name: statistics.choose(arms.get(name, []), "lr", "batch_size") for name in METHODS}
    rows = []
    for name, found in best.items():
        if found is None:
            continue
        lr, batch = found.setting
        row: dict[str, object] = {
            "rule": style.look(name).label,
            "lr": lr,
            "batch": batch,
            "chosen among": found.tried,
            "validation accuracy": f"{100 * found.score:.2f} %",
            "test accuracy": common.mean_cell(found.runs, lambda run: run.final("accuracy/test"), "%", 100),
        }
        base = best["sgd"]
        if name != "sgd" and base is not None:
            row["- SGD, points"] = common.points(found.runs, base.runs, "accuracy/test").estimate()
        rows.append(row)
    return common.table(
        "Each rule at its best setting",
        rows,
        f"Chosen by validation accuracy after the last epoch, mean over seeds; the test set was read once. "
        f"{common.INTERVALS}",
    )
