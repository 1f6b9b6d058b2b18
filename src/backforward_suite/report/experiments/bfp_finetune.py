"""Does Backforward in the last epochs help?"""

from __future__ import annotations

from backforward_suite.report.experiments._switch import switching

EXPERIMENT = switching(
    "bfp_finetune",
    "Does Backforward in the last epochs alone leave a lower training loss than SGD throughout?",
    "SGD until epoch {}, then BFP",
    "better",
)
