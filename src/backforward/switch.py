"""One update rule for the first epochs, another for the rest."""

from __future__ import annotations

from typing import Any

from backforward.groups import Group
from backforward.rules import StepResult, UpdateRule


class Switch:
    """One rule for the first epochs, another from then on. Both share one network and one optimizer.

    `bfp_warmup` is `Switch(Backforward(...), Backprop(...), at_epoch=n)`, `bfp_finetune` the reverse.

    Args:
        first: The rule of epochs 0 to at_epoch - 1.
        then: The rule from epoch `at_epoch` on.
        at_epoch: The first epoch of `then`, >= 0.

    Attributes:
        active: The rule of the current epoch.

    Raises:
        ValueError: The rules have different networks or optimizers, or `at_epoch` is no integer >= 0.
    """

    def __init__(self, first: UpdateRule, then: UpdateRule, at_epoch: int) -> None:
        if first.optimizer is not then.optimizer or first.model is not then.model:
            raise ValueError("Switch: both rules must share one network and one optimizer")
        if isinstance(at_epoch, bool) or not isinstance(at_epoch, int) or at_epoch < 0:
            raise ValueError(f"Switch: at_epoch={at_epoch!r}; give an integer >= 0")
        self._first, self._then, self.at_epoch = first, then, at_epoch
        self.active = then if at_epoch == 0 else first

    @property
    def groups(self) -> list[Group]:
        """The groups of the active rule."""
        return self.active.groups

    def prepare(self, x: Any) -> None:
        """Prepare both rules."""
        self._first.prepare(x)
        self._then.prepare(x)

    def set_epoch(self, epoch: int, batch: int | None = None) -> None:
        """Choose the rule of this epoch (from 0)."""
        self.active = self._first if epoch < self.at_epoch else self._then
        self.active.set_epoch(epoch, batch)

    def step(self, x: Any, y: Any) -> StepResult:
        """Update the weights on one mini-batch with the rule of this epoch."""
        return self.active.step(x, y)
