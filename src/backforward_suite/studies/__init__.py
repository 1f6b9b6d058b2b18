"""Studies: what a run does instead of training one network, such as a thousand single steps or a proposition.

A study is a callable from `Setting` to `Findings`, made from its config in `conf/study/`. It knows torch and the
library, not the training loop; it takes minutes, so it keeps no checkpoint.

What depends on the clock has a name that begins with `time/`, in `final` and among the columns: all the rest is a pure
function of the settings and can be compared bit for bit.
"""

from __future__ import annotations

from backforward_suite.studies.moments import Moments
from backforward_suite.studies.one_step import OneStep
from backforward_suite.studies.speed import Speed
from backforward_suite.studies.study import Findings, Setting, Study

__all__ = ["Findings", "Moments", "OneStep", "Setting", "Speed", "Study"]
