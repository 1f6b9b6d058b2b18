"""Is Backforward in the first epochs enough?"""

from __future__ import annotations

from collections.abc import Sequence

from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _switch
from backforward_suite.report.finding import Finding
from backforward_suite.report.reading import Run

QUESTION = "Is Backforward in the first epochs alone enough for a lower training loss than SGD's?"


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare Backforward first, SGD afterwards with either throughout."""
    form = "BFP until epoch {}, then SGD"
    return _switch.examine("bfp_warmup", QUESTION, runs, claims, scale, method="bfp_warmup", form=form)
