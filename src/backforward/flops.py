"""Counts floating-point operations without changing the network."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import FlopCounterMode


class _NoModules:
    """Replaces torch's module tracker."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


class FlopCounter(FlopCounterMode):
    """Counts the floating-point operations of all calls within it; read `counter.get_total_flops()`.

    Torch's own counter also installs hooks on the modules; an engine would take the hooked network for a changed one.
    """

    def __init__(self, mapping: dict[Any, Any] | None = None) -> None:
        super().__init__(display=False, custom_mapping=mapping)
        self.mod_tracker = _NoModules()  # type: ignore[assignment]
