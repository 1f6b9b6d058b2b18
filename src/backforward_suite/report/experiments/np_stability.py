"""NormProp, Fig. 3: validation accuracy epoch by epoch under NormProp, BatchNorm and no normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from backforward_suite.report import verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments._experiment import (
    Compare,
    Drawing,
    Experiment,
    Found,
    Own,
    Part,
    Sample,
    layout,
)
from backforward_suite.report.experiments._figures import curves
from backforward_suite.report.experiments._measures import (
    PERCENT,
    VALIDATION,
    Measure,
    Runs,
    curve_of,
    done,
    images,
    settled,
)
from backforward_suite.report.experiments.np_data_norm import paper
from backforward_suite.report.ground import Ground
from backforward_suite.report.reading import Run

WITHIN = 1.0  # points: converged once validation accuracy stays this near to where it ends
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"}


def _accuracy(run: Run) -> pd.Series[float]:
    return 100 * curve_of(run, "accuracy/validation")


def accuracy_early(run: Run) -> float | None:
    """Mean validation accuracy over the first quarter of the epochs, two at least, in percent."""
    curve = _accuracy(run)
    first = curve.iloc[: max(2, math.ceil(len(curve) / 4))]
    return float(first.mean()) if len(first) else None


def unrest(run: Run) -> float | None:
    """Mean distance of validation accuracy from halfway between the epochs before and after; points.

    After the first quarter of the epochs. Steady progress, however fast, is none of it.
    """
    curve = _accuracy(run)
    off = (curve - (curve.shift(1) + curve.shift(-1)) / 2).abs()
    late = off.iloc[max(2, math.ceil(len(curve) / 4)) :].dropna()
    return float(late.mean()) if len(late) else None


def converged(run: Run) -> float | None:
    """The epoch from which validation accuracy stays within a point of its last value."""
    epoch = settled(_accuracy(run), WITHIN)
    return None if epoch is None else float(epoch)


def diverging(runs: Runs, claims: Mapping[str, Claim], scale: str) -> Found:
    """How many of the networks without norm diverge at NormProp's learning rate."""
    claim = claims["diverges"]
    plain = [run for run in done(runs) if run.choice("norm") == "none" and math.isclose(run.setting("lr"), 0.05)]
    gone = sum(run.status == "diverged" for run in plain)
    ground = Ground.of(runs, scale).of_data(claim)
    if plain and (images(plain) or 0) < claim.least_images:
        return Found([verdicts.too_short(claim, ground, f"{gone} of {len(plain)} seeds diverge", images(plain) or 0)])
    return Found([verdicts.share(claim, {"lr 0.05": (gone, len(plain))}, ground, what="share of seeds that diverge")])


EARLY = Measure(
    "validation accuracy in the first quarter of the epochs, %", accuracy_early, points="points", bounds=PERCENT
)
UNREST = Measure("validation accuracy off its trend, points", unrest, ratio=True)
CONVERGED = Measure("epochs until converged", converged)
EXPERIMENT = Experiment(
    "np_stability",
    "Does NormProp converge faster and more steadily than BatchNorm, each at its best learning rate?",
    Part(
        layout("norm", {"data": DATA}, chosen="lr"),
        (
            Compare(EARLY, "prop", "batch", "higher_early"),
            Compare(UNREST, "prop", "batch", "steadier other_sets"),
            Sample(CONVERGED, ("prop",), "converges", paper),
        ),
        title="NormProp against BatchNorm",
        note="Off its trend: mean distance of an epoch's validation accuracy from halfway between the epochs before "
        f"and after, after the first quarter. Converged: from when on it stays within {WITHIN:g} point of its "
        "last value.",
        means=(EARLY, VALIDATION, UNREST, CONVERGED),
        drawings=(
            Drawing(
                "curves",
                "Validation accuracy by epoch",
                "The paper's Fig. 3: mean over seeds, bands are 95 % intervals; each norm at the learning rate of its "
                "highest last validation accuracy.",
                curves("accuracy/validation", "validation accuracy, %", times=100),
            ),
        ),
    ),
    Own(diverging),
)
