"""What the referee examines: a module for each experiment, named as its config in `conf/experiment`.

Each has `QUESTION: str` and `examine(runs, claims, scale) -> Finding`, and may name the `DIAGNOSTICS` that it reads
(measures of `diagnostics.csv`), which are then kept among the committed results.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from backforward_suite.errors import BadInput
from backforward_suite.report.claims import Claim
from backforward_suite.report.finding import Finding
from backforward_suite.report.reading import Run

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
)


class Experiment(Protocol):
    """What the module of an experiment offers."""

    QUESTION: str

    def examine(self, runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
        """Judge the experiment's claims by its runs, of which some or all may be missing."""
        ...


def names() -> list[str]:
    """The experiments that can be examined, in the order of the page."""
    return list(ORDER)


def load(name: str) -> Experiment:
    """The module of an experiment.

    Raises:
        BadInput: There is none of that name.
    """
    if name not in names():
        raise BadInput(f"{name}: no such experiment; there are {', '.join(names())}")
    return cast(Experiment, import_module(f"{__name__}.{name}"))


def diagnostics_of(name: str) -> tuple[str, ...]:
    """The measures of `diagnostics.csv` that an experiment reads."""
    return tuple(getattr(load(name), "DIAGNOSTICS", ()))
