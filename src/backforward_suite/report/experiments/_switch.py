"""What the experiments share in which the update rule changes at some epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import matplotlib.figure

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.finding import Figure, Finding, Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect
from backforward_suite.report.verdicts import Ground

Arms = Mapping[str, Sequence[Run]]  # by what the arm is called


def examine(
    experiment: str, question: str, runs: Sequence[Run], claims: Sequence[Claim], scale: str, *, method: str, form: str
) -> Finding:
    """Compare training that changes its rule with SGD and Backforward throughout.

    Args:
        experiment: Its name; it has one claim.
        question: What it asks.
        runs: Its runs.
        claims: Its claims.
        scale: Of the runs.
        method: The rule that changes, `bfp_warmup` or `bfp_finetune`.
        form: What an arm is called, given the epoch at which it changes.
    """
    (claim,) = claims
    there = common.done(runs)
    methods = common.arms(there)
    changing = common.arms(methods.get(method, []), "method.at_epoch")
    base, whole = methods.get("sgd", []), methods.get("bfp", [])
    arms: dict[str, Sequence[Run]] = {form.format(epoch): members for epoch, members in changing.items()}
    effects = [_ratio(members, base, name) for name, members in arms.items()]
    if whole:
        arms["BFP throughout"] = whole
    judged = [verdicts.direction(claim, effects, Ground.of(runs, scale, () if effects else (method,)))]
    figures = [
        Figure(
            f"{experiment}_ratio",
            "Training loss over that of SGD throughout, epoch by epoch",
            "Geometric mean of the pairs with its pointwise 95 % t interval; 1 is no difference. Dotted lines: the "
            "epochs after which a rule changes.",
            partial(_draw, arms, base, sorted(int(epoch) for epoch in changing)),
        )
    ]
    return common.finding(experiment, question, runs, claims, scale, judged, [_table(arms, base, effects)], figures)


def _ratio(ours: Sequence[Run], theirs: Sequence[Run], label: str) -> Effect:
    return common.effect(ours, theirs, lambda run: run.final("loss/train"), label, ratio=True)


def _macs(run: Run) -> float | None:
    spent = statistics.spent(run, "macs")
    return None if spent is None or not len(spent) else float(spent.iloc[-1])


def _table(arms: Arms, base: Sequence[Run], effects: Sequence[Effect]) -> Table:
    corrected = {effect.label: effect for effect in statistics.holm(effects)}
    rows: list[dict[str, object]] = []
    for name, runs in {**({"SGD throughout": base} if base else {}), **arms}.items():
        row: dict[str, object] = {
            "rule": name,
            "training loss": common.mean_cell(runs, lambda run: run.final("loss/train")),
            "test accuracy": common.mean_cell(runs, lambda run: run.final("accuracy/test"), "%", 100),
        }
        if runs is not base:
            found = corrected.get(name)
            row["/ SGD"] = common.shown(found or _ratio(runs, base, name))
            row["p"] = None if found is None else common.p_text(found.corrected_p)
            row["- SGD, points"] = common.shown(common.points(runs, base, "accuracy/test"))
            row["arithmetic, / SGD"] = common.shown(common.effect(runs, base, _macs, "", ratio=True))
        rows.append(row)
    return common.table(
        "After the last epoch",
        rows,
        f"Ratios of training loss and arithmetic, differences of test accuracy, paired by seed. {common.INTERVALS} "
        f"{common.correction_note(len(effects))} Backforward throughout stands beside, not corrected; nor are "
        "accuracies.",
    )


def _draw(arms: Arms, base: Sequence[Run], changes: Sequence[int]) -> matplotlib.figure.Figure:
    figure, axes = style.canvas()
    panel = axes[0, 0]
    panel.axhline(1, color="0.35", linewidth=0.9)
    for epoch in changes:
        panel.axvline(epoch, color="0.6", linewidth=0.8, linestyle=":")
    names = [name for name in arms if name != "BFP throughout"]
    looks = {name: replace(look, label=name) for name, look in style.sequence(names).items()}
    looks["BFP throughout"] = replace(style.look("bfp"), label="BFP throughout")
    for name, runs in arms.items():
        style.band(panel, looks[name], common.ratio_curve(runs, base, "loss/train"))
    panel.set(xlabel="epochs", ylabel="training loss, / SGD")
    style.legend(figure)
    return figure
