"""What the report examines: the experiments of `conf/experiment`.

To add an experiment, or a question to one:

1.  Write the question into `claims.yaml`: `kind: question` if no paper states it, the sign that a yes has, the
    tolerance and why, `post_hoc: true` if results are known already. Commit it before the runs.
2.  Write `conf/experiment/NAME.yaml`, the sweep.
3.  Add an `Experiment` to a module here, and its name to `ORDER`. `_experiment` explains rows, arms, measures and how a
    comparison names the claims that it answers; `_measures` has the measures and `_figures` the figures. Verdicts,
    tables and the page follow from that.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from backforward_suite.errors import BadInput

if TYPE_CHECKING:
    from backforward_suite.report.experiments._experiment import Experiment

MODULES = (
    "bfp_one_step", "bfp_learning_rates", "bfp_variants", "bfp_shift", "witnesses",
    "np_moments", "np_training", "np_table_speed",
)  # fmt: skip
#: In the order of the page.
ORDER = (
    "bfp_one_step", "bfp_learning_rates", "bfp_weight_norm", "bfp_batch_size", "bfp_max_lr", "bfp_schedule",
    "bfp_depth", "bfp_warmup", "bfp_finetune", "bfp_norm", "bfp_parts", "bfp_rates", "bfp_to_loss", "bfp_witnesses",
    "np_moments", "np_jacobian", "np_recipe", "np_activations", "np_data_norm", "np_shift", "np_stability",
    "np_batch_size", "np_table", "np_speed", "np_witnesses",
)  # fmt: skip


def names() -> list[str]:
    """All experiments, in the order of the page."""
    return list(ORDER)


@cache
def _all() -> dict[str, Experiment]:
    return {each.name: each for module in MODULES for each in import_module(f"{__name__}.{module}").EXPERIMENTS}


def load(name: str) -> Experiment:
    """An experiment by its name.

    Raises:
        BadInput: There is no experiment of that name.
    """
    if name not in names():
        raise BadInput(f"{name}: no such experiment; there are {', '.join(names())}")
    return _all()[name]


def diagnostics_of(name: str) -> tuple[str, ...]:
    """The measures of `diagnostics.csv` that an experiment reads."""
    return load(name).diagnostics
