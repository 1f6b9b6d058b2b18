"""Settings of studies."""

from __future__ import annotations

from collections.abc import Callable

from backforward_suite.studies import Setting

MakeSetting = Callable[..., Setting]
