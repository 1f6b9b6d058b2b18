"""Does Backforward in the first epochs alone help?"""

from __future__ import annotations

from backforward_suite.report.experiments._switch import switching

EXPERIMENT = switching(
    "bfp_warmup",
    "Does Backforward in the first epochs alone leave a lower training loss than SGD throughout?",
    "BFP until epoch {}, then SGD",
    "enough",
)
