"""The witnesses beside BatchNorm, on an MLP."""

from __future__ import annotations

from backforward_suite.report.experiments._witnesses import witnesses

EXPERIMENT = witnesses("bfp_witnesses", "an MLP of three hidden layers")
