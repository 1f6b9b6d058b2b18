"""NormProp, Fig. 3: validation accuracy epoch by epoch under NormProp, BatchNorm and no normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.figure
import pandas as pd

from backforward_suite.report import style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.experiments import _normprop as family
from backforward_suite.report.finding import Figure, Finding, Table
from backforward_suite.report.reading import Run

QUESTION = "Does NormProp converge faster and more steadily than BatchNorm, each at its best learning rate?"
CURVE = "accuracy/validation"
WITHIN = 1.0  # points: converged once validation accuracy stays this near to where it ends


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare the curves of each norm at the learning rate that its last validation accuracy chose."""
    arms = {norm: family.chosen(common.done(runs, norm=norm)) for norm in family.NORMS}
    missing = [norm for norm in ("batch", "prop") if not arms[norm]]
    ground = verdicts.Ground.of(runs, scale, missing)
    early = common.effect(arms["prop"], arms["batch"], accuracy_early, "NormProp - BatchNorm", unit="points")
    steady = common.effect(arms["prop"], arms["batch"], unrest, "NormProp / BatchNorm", ratio=True)
    epochs = family.sample(arms["prop"], converged, "prop", "epochs")
    judged = {
        "higher_early": lambda claim: verdicts.direction(claim, [early], ground),
        "steadier": lambda claim: verdicts.direction(claim, [steady], ground),
        "converges": lambda claim: verdicts.value(claim, [epochs], ground),
    }
    return common.finding(
        "np_stability", QUESTION, runs, claims, scale,
        [judged[word](claim) for word, claim in common.by_word(claims).items()],
        tables=[_table(arms)],
        figures=[
            Figure(
                "np_stability_curves",
                "Validation accuracy by epoch",
                "The paper's Fig. 3: mean over seeds, bands are 95 % intervals; each norm at the learning rate of its "
                "highest last validation accuracy.",
                lambda: _draw(arms),
            )
        ],
    )  # fmt: skip


def _curve(run: Run) -> pd.Series[float]:
    curve = 100 * run.curve(CURVE)
    return curve[curve.index > 0]


def accuracy_early(run: Run) -> float | None:
    """Mean validation accuracy over the first quarter of the epochs, two at least, in percent."""
    curve = _curve(run)
    first = curve.iloc[: max(2, math.ceil(len(curve) / 4))]
    return float(first.mean()) if len(first) else None


def unrest(run: Run) -> float | None:
    """Mean distance of validation accuracy from halfway between the epochs before and after; points.

    After the first quarter of the epochs. Steady progress, however fast, is none of it.
    """
    curve = _curve(run)
    off = (curve - (curve.shift(1) + curve.shift(-1)) / 2).abs()
    late = off.iloc[max(2, math.ceil(len(curve) / 4)) :].dropna()
    return float(late.mean()) if len(late) else None


def converged(run: Run) -> float | None:
    """The epoch from which validation accuracy stays within a point of its last value."""
    epoch = family.settled(_curve(run), WITHIN)
    return None if epoch is None else float(epoch)


def _table(arms: Mapping[str, Sequence[Run]]) -> Table:
    rows = [
        {
            "norm": style.look(norm).label,
            "lr": ", ".join(map(str, family.values(runs, "lr"))),
            "seeds": len(runs),
            "early accuracy, %": common.estimate_of(runs, accuracy_early),
            "last accuracy, %": common.estimate_of(runs, family.validation_accuracy),
            "off its trend, points": common.estimate_of(runs, unrest),
            "converged after epochs": common.estimate_of(runs, converged),
        }
        for norm, runs in arms.items()
        if runs
    ]
    note = (
        "On validation data, 95 % intervals over seeds. Early: mean over the first quarter of the epochs. Off its "
        "trend: mean distance from halfway between the epochs before and after, after that quarter. Converged: from "
        f"when on it stays within {WITHIN:g} point of its last value."
    )
    return common.table("Speed and steadiness", rows, note)


def _draw(arms: Mapping[str, Sequence[Run]]) -> matplotlib.figure.Figure:
    figure, panels = style.canvas()
    axes = panels[0, 0]
    for norm, runs in arms.items():
        style.band(axes, style.look(norm), family.band(map(_curve, runs)))
    style.epochs(axes)
    axes.set_ylabel("validation accuracy, %")
    style.legend(figure)
    return figure
