"""Does Backforward reach a plateau at lr 0.1, and does a decaying learning rate mend it?"""

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

QUESTION = "Does Backforward reach a plateau at learning rate 0.1, and does decaying the rate mend it?"
SCHEDULES = {"constant": "constant", "halve": "halved every few epochs", "cosine": "cosine to zero"}
Arms = Mapping[str, Sequence[Run]]  # by method


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare the rules under each schedule, and each schedule with the constant rate."""
    of, ground = common.by_word(claims), Ground.of(runs, scale)
    found = common.arms(common.done(runs), "schedule")
    under: dict[str, Arms] = {name: common.arms(found[name]) for name in SCHEDULES if name in found}
    lead = [_ratio(arms.get("bfp", []), arms.get("sgd", []), name) for name, arms in under.items()]
    constant = under.get("constant", {})
    decay = {
        method: [
            _ratio(arms.get(method, []), constant.get(method, []), name)
            for name, arms in under.items()
            if name != "constant"
        ]
        for method in ("sgd", "bfp")
    }
    judged = [
        verdicts.direction(of["plateaus"], [effect for effect in lead if effect.label == "constant"], ground),
        verdicts.direction(of["mended"], decay["bfp"], ground),
    ]
    figures = [
        Figure(
            "bfp_schedule_curves",
            "Training loss at lr 0.1, by schedule",
            "Mean over seeds (of the logarithm) with its pointwise 95 % t interval. A plateau would show as a curve "
            "that flattens above that of the decaying rates.",
            partial(_draw, under),
        ),
        Figure(
            "bfp_schedule_ratio",
            "Training loss of Backforward over that of SGD, epoch by epoch",
            "Geometric mean of the pairs with its pointwise 95 % t interval; 1 is no difference.",
            partial(common.draw_ratios, {SCHEDULES[name]: arms for name, arms in under.items()}),
        ),
    ]
    tables = [_table(under, lead, decay)]
    return common.finding("bfp_schedule", QUESTION, runs, claims, scale, judged, tables, figures)


def _ratio(ours: Sequence[Run], theirs: Sequence[Run], label: str) -> Effect:
    return common.effect(ours, theirs, lambda run: run.final("loss/train"), label, ratio=True)


def _table(under: Mapping[str, Arms], lead: Sequence[Effect], decay: Mapping[str, Sequence[Effect]]) -> Table:
    leads = {effect.label: effect for effect in statistics.holm(lead)}
    gains = {method: {effect.label: effect for effect in statistics.holm(effects)} for method, effects in decay.items()}
    rows = []
    for name, arms in under.items():
        row: dict[str, object] = {"schedule": SCHEDULES[name]}
        for method in ("sgd", "bfp"):
            row[f"training loss, {style.look(method).label}"] = common.mean_cell(
                arms.get(method, []), lambda run: run.final("loss/train")
            )
        row["BFP / SGD"], row["p"] = common.shown(leads[name]), common.p_text(leads[name].corrected_p)
        for method in ("sgd", "bfp"):
            gain = gains[method].get(name)
            row[f"{style.look(method).label}, / constant"] = None if gain is None else common.shown(gain)
        rows.append(row)
    return common.table(
        "Training loss after the last epoch, lr 0.1",
        rows,
        f"{common.INTERVALS} {common.correction_note(len(lead))} The ratios to the constant rate are judged with "
        "Holm's correction over the decaying schedules.",
    )


def _draw(under: Mapping[str, Arms]) -> matplotlib.figure.Figure:
    figure, axes = style.canvas(1, 2, sharey=True)
    for panel, method in zip(axes[0], ("sgd", "bfp"), strict=True):
        for (name, words), dash in zip(SCHEDULES.items(), ("-", "--", ":"), strict=True):
            runs = under.get(name, {}).get(method, [])
            of = replace(style.look(method), label=words, dash=dash)
            style.band(panel, of, common.curve(runs, "loss/train", logs=True))
        panel.set(yscale="log", title=style.look(method).label, xlabel="epochs")
        if panel.lines:
            panel.legend()
    axes[0, 0].set_ylabel("training loss (nats)")
    return figure
