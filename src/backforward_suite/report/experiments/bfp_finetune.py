"""Does Backforward in the last epochs help?"""

from __future__ import annotations

from collections.abc import Sequence

from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _switch
from backforward_suite.report.finding import Finding
from backforward_suite.report.reading import Run

QUESTION = "Does Backforward in the last epochs alone leave a lower training loss than SGD throughout?"


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare SGD first, Backforward afterwards with either throughout."""
    form = "SGD until epoch {}, then BFP"
    return _switch.examine("bfp_finetune", QUESTION, runs, claims, scale, method="bfp_finetune", form=form)
