"""Counting arithmetic without touching the network."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import FlopCounterMode


class _NoModules:
    """Stands for torch's tracker of modules."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


class FlopCounter(FlopCounterMode):
    """Counts floating-point operations of all that runs within it: `counter.get_total_flops()`.

    Torch's own counter also tells modules apart. For that it hooks them, and a network with hooks is another one to an
    engine that looks for what has changed.

    Args:
        mapping: Further operations, as torch's `custom_mapping`.
    """

    def __init__(self, mapping: dict[Any, Any] | None = None) -> None:
        super().__init__(display=False, custom_mapping=mapping)
        self.mod_tracker = _NoModules()  # type: ignore[assignment]
