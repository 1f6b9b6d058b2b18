"""Studies: what a run does instead of training one network, such as a thousand single steps.

A study is a callable from `Setting` to `Findings`, made from its config in `conf/study/`. It uses torch and the library
but not the training loop. It takes minutes and keeps no checkpoint.

Numbers that depend on the clock have names that begin with `time/`, in `final` and in the columns. Everything else is a
pure function of the settings and can be compared bit for bit.
"""

from __future__ import annotations

from backforward_suite.studies.moments import Moments
from backforward_suite.studies.one_step import OneStep
from backforward_suite.studies.speed import Speed
from backforward_suite.studies.study import Findings, Setting, Study

__all__ = ["Findings", "Moments", "OneStep", "Setting", "Speed", "Study"]
