"""Is the norm of the weights larger without covariate shift, and does that cost generalisation?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib.figure
import numpy as np

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.experiments.bfp_learning_rates import Arms, by_lr, draw_published, label
from backforward_suite.report.finding import Figure, Finding, Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect
from backforward_suite.report.verdicts import Ground

QUESTION = "Is the norm of the weights larger without covariate shift, and the gap between test and training with it?"
NORM = "weight_norm/sum"  # the sum of the tensors' norms: what the published logs have


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Judge the claims by the runs of `bfp_learning_rates`."""
    of, at, ground = common.by_word(claims), by_lr(common.done(runs)), Ground.of(runs, scale)
    larger = [_larger(arms, "bfp", lr) for lr, arms in at.items()]
    equal = [_at_equal_loss(arms, "bfp", lr) for lr, arms in at.items()]
    gaps = [common.effect(arms.get("bfp", []), arms.get("sgd", []), gap, label(lr)) for lr, arms in at.items()]
    judged = [
        verdicts.direction(of["larger"], larger, ground),
        verdicts.direction(of["at_equal_loss"], equal, ground),
        verdicts.direction(of["regularising"], gaps, ground),
    ]
    tables = [_norm_table(at, larger, equal, of["larger"]), _gap_table(at, gaps)]
    figures = [
        Figure(
            "bfp_weight_norm_curves",
            "Norm of the weights, epoch by epoch",
            "Sum of the L2 norms of the four tensors. Lines: mean over seeds with its pointwise 95 % t interval; "
            "hollow markers: the published runs (one seed).",
            partial(_draw_norms, at),
        ),
        Figure(
            "bfp_weight_norm_loss",
            "Norm of the weights against training loss",
            "The same norms where training stands equally far. Arms on one line differ in progress alone. Mean over "
            "seeds, epoch by epoch.",
            partial(_draw_against_loss, at),
        ),
    ]
    return common.finding("bfp_weight_norm", QUESTION, runs, claims, scale, judged, tables, figures)


def gap(run: Run) -> float | None:
    """Test less training loss after the last epoch, nats. The training loss is the mean over that epoch."""
    test, train = run.final("loss/test"), run.final("loss/train")
    return None if test is None or train is None or run.status == "diverged" else test - train


def norm(run: Run) -> float | None:
    """Sum of the tensors' norms after the last epoch; a diverged run's is of no weights that count, and left out."""
    return None if run.status == "diverged" else run.final(NORM)


def norm_at(run: Run, level: float) -> float | None:
    """The norm where the training loss first was at a level, on the straight line between epochs."""
    epochs, norms = statistics.cost_of(run, level), run.curve(NORM)
    return None if epochs is None or not len(norms) else float(np.interp(epochs, norms.index, norms))


def _larger(arms: Arms, arm: str, lr: float) -> Effect:
    return common.effect(arms.get(arm, []), arms.get("sgd", []), norm, label(lr), ratio=True)


def _at_equal_loss(arms: Arms, arm: str, lr: float) -> Effect:
    ours, theirs = arms.get(arm, []), arms.get("sgd", [])
    level = common.common_level([*ours, *theirs]) if ours and theirs else None
    if level is None:
        return Effect(label(lr), (), ratio=True, note="no loss that all runs reach" if ours and theirs else "")
    return common.effect(ours, theirs, partial(norm_at, level=level), label(lr), ratio=True)


# --- tables and figures ----------------------------------------------------------------------------------------------


def _norm_table(at: Mapping[float, Arms], larger: Sequence[Effect], equal: Sequence[Effect], claim: Claim) -> Table:
    rows = []
    tested = zip(at.items(), statistics.holm(larger), statistics.holm(equal), strict=True)
    for (lr, arms), ours, level in tested:
        both = [*arms.get("sgd", []), *arms.get("bfp", [])]
        loss = common.common_level(both)
        rows.append(
            {
                "lr": f"{lr:g}",
                "SGD": common.mean_cell(arms.get("sgd", []), norm),
                "BFP / SGD, last epoch": common.shown(ours),
                "p": common.p_text(ours.corrected_p),
                "published loop / SGD, last epoch": common.shown(_larger(arms, "bfp_poster", lr)),
                "published, epoch 10": claim.published.get(label(lr)),
                "at training loss": None if loss is None else f"{loss:g}",
                "BFP / SGD there": common.shown(level),
                "p there": common.p_text(level.corrected_p),
                "published loop / SGD there": common.shown(_at_equal_loss(arms, "bfp_poster", lr)),
            }
        )
    return common.table(
        "Norm of the weights (sum of the tensors' norms)",
        rows,
        f"{common.INTERVALS} {common.correction_note(len(rows))} A diverged run has no norm. Ratios of the published "
        "loop are not corrected.",
    )


def _gap_table(at: Mapping[float, Arms], gaps: Sequence[Effect]) -> Table:
    rows = []
    for (lr, arms), found in zip(at.items(), statistics.holm(gaps), strict=True):
        row: dict[str, object] = {"lr": f"{lr:g}"}
        for arm in ("sgd", "bfp", "bfp_poster"):
            row[style.look(arm).label] = common.mean_cell(arms.get(arm, []), gap)
        poster = common.effect(arms.get("bfp_poster", []), arms.get("sgd", []), gap, "")
        row |= {"BFP - SGD": common.shown(found), "p": common.p_text(found.corrected_p)}
        rows.append(row | {"published loop - SGD": common.shown(poster)})
    return common.table(
        "Generalisation gap: test less training loss after the last epoch, nats",
        rows,
        f"{common.INTERVALS} {common.correction_note(len(rows))} A diverged run has no gap. Differences of the "
        "published loop are not corrected.",
    )


def _draw_norms(at: Mapping[float, Arms]) -> matplotlib.figure.Figure:
    figure, panels = common.panels(len(at))
    for panel, (lr, arms) in zip(panels, at.items(), strict=True):
        last = 0.0
        for arm, runs in arms.items():
            frame = common.curve(runs, NORM)
            last = max([last, *frame.index])
            style.band(panel, style.look(arm), frame)
        draw_published(panel, lr, "weight_norm", last)
        panel.set(title=f"lr {lr:g}", xlabel="epochs", ylabel="norm of the weights")
    style.legend(figure)
    return figure


def _draw_against_loss(at: Mapping[float, Arms]) -> matplotlib.figure.Figure:
    figure, panels = common.panels(len(at))
    for panel, (lr, arms) in zip(panels, at.items(), strict=True):
        for arm, runs in arms.items():
            losses, norms = common.curve(runs, "loss/train", logs=True), common.curve(runs, NORM)
            if losses.empty or norms.empty:
                continue
            # A mean over an epoch stands beside the norm in its middle.
            between, of = np.interp(losses.index, norms.index, norms["value"]), style.look(arm)
            panel.plot(losses["value"], between, marker=of.marker, markersize=3, label=of.label, **of.line)
        panel.set(title=f"lr {lr:g}", xlabel="training loss (nats)", ylabel="norm of the weights", xscale="log")
        panel.invert_xaxis()
    style.legend(figure)
    return figure
