"""The witnesses beside BatchNorm, on NIN."""

from __future__ import annotations

from backforward_suite.report.experiments._witnesses import witnesses

EXPERIMENT = witnesses("np_witnesses", "NIN")
