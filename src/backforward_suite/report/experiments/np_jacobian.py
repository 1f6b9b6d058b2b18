"""NormProp 4.3.1: does the Jacobian factor J help to train with larger learning rates without diverging?"""

from __future__ import annotations

from functools import partial

from backforward_suite.report.experiments._experiment import Compare, Drawing, Experiment, Part, layout, limits
from backforward_suite.report.experiments._figures import by_lr
from backforward_suite.report.experiments._measures import LARGEST, TEST, VALIDATION

FACTORS = {"none": "no factor", "paper": "J = 1.21, as printed", "exact": "exact J"}

EXPERIMENT = Experiment(
    "np_jacobian",
    "Does the Jacobian factor allow larger learning rates without diverging, and does NormProp work without it?",
    Part(
        layout("norm.jacobian_factor"),
        (Compare(LARGEST, lambda arm: arm in ("paper", "exact"), "none", "larger_lr"),),
        title="The largest learning rate that trains, against that without the factor",
        names=FACTORS,
        tables=partial(limits, names=FACTORS),
        drawings=(
            Drawing(
                "lr",
                "Where training still works, with and without the factor",
                "Above: validation accuracy after the last epoch, median over seeds with their whole range; a diverged "
                "run counts as a guess. Below: share of seeds that train (end below the loss of a guess), with its "
                "95 % interval.",
                by_lr(VALIDATION),
            ),
        ),
    ),
    Part(
        layout("norm.jacobian_factor", chosen="lr"),
        (Compare(TEST, ("none",), "exact", "works_without"),),
        title="Without the factor against with it, each at its best learning rate",
        names=FACTORS,
        means=(VALIDATION, TEST),
    ),
)
