"""What the referee examines: a module for each experiment, named as its config in `conf/experiment`.

To add an experiment, or a question to one:

1.  Write what is asked into `claims.yaml`: `kind: question` where no paper states it, the sign that a yes has, the
    tolerance and why, `post_hoc: true` if results are known already. Commit it before the runs.
2.  Write `conf/experiment/NAME.yaml`, the sweep.
3.  Write `NAME.py` here with an `EXPERIMENT`, and put its name into `ORDER`. `_experiment` says what a module holds:
    rows, arms, a measure, and the words of the claims that a comparison answers. `_measures` has measures and how to
    make one, `_figures` what can be drawn. Verdicts, tables and the page follow from that.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from backforward_suite.errors import BadInput
from backforward_suite.report.experiments._experiment import Experiment

#: In the order of the page.
ORDER = (
    "bfp_one_step",
    "bfp_learning_rates",
    "bfp_weight_norm",
    "bfp_batch_size",
    "bfp_max_lr",
    "bfp_schedule",
    "bfp_depth",
    "bfp_warmup",
    "bfp_finetune",
    "bfp_norm",
    "bfp_parts",
    "bfp_rates",
    "bfp_to_loss",
    "bfp_witnesses",
    "np_moments",
    "np_jacobian",
    "np_recipe",
    "np_activations",
    "np_data_norm",
    "np_shift",
    "np_stability",
    "np_batch_size",
    "np_table",
    "np_speed",
    "np_witnesses",
)


def names() -> list[str]:
    """The experiments that can be examined, in the order of the page."""
    return list(ORDER)


def load(name: str) -> Experiment:
    """An experiment by its name.

    Raises:
        BadInput: There is none of that name.
    """
    if name not in names():
        raise BadInput(f"{name}: no such experiment; there are {', '.join(names())}")
    return cast(Experiment, import_module(f"{__name__}.{name}").EXPERIMENT)


def diagnostics_of(name: str) -> tuple[str, ...]:
    """The measures of `diagnostics.csv` that an experiment reads."""
    return load(name).diagnostics
