"""Numbers off a GPU without waiting for it.

A host that asks a GPU for a number waits until all that it has launched is done, and launches nothing in the meantime:
to a small network that is time lost. So within an epoch a look begins to copy a number to the host, and gives the one
that the look before had asked for, which is there by then.

Depends on torch only.
"""

from __future__ import annotations

import torch
from torch import Tensor

Reading = tuple[int, list[float]]  # the step it is of, values


class Readings:
    """Looks at a few values of one shape, time and again.

    On a GPU each look gives what the look before asked for, elsewhere what it asked for itself: which, depends on
    nothing but the looks, so that a run is the same however fast its device is. A look waits only for a GPU that is a
    whole look behind.
    """

    def __init__(self) -> None:
        self._step: int | None = None  # of the look whose values are on their way
        self._values = torch.empty(0)
        self._there: torch.cuda.Event | None = None
        self._restored: Reading | None = None

    def look(self, values: Tensor, step: int = 0) -> Reading | None:
        """Ask for the values, which may change right afterwards.

        Args:
            values: Of any shape.
            step: What they are of.

        Returns:
            Of the look before, on a GPU, and None if there was none; else of this one.
        """
        if not _lags(values):
            return step, values.flatten().tolist()
        before = self.take()
        if self._values.shape != values.shape:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._values.copy_(values.detach(), non_blocking=True)
        if values.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()
        self._step = step
        return before

    @property
    def pending(self) -> Reading | None:
        """What the last look asked for, if it has not been given; waits for it."""
        if self._step is None:
            return self._restored
        if self._there is not None:
            self._there.synchronize()
        return self._step, self._values.flatten().tolist()

    def take(self) -> Reading | None:
        """Give that now, and not again."""
        found = self.pending
        self.restore(None)
        return found

    def restore(self, pending: Reading | None) -> None:
        """Go on from what was `pending` in a process before."""
        self._step, self._restored = None, pending


def _lags(values: Tensor) -> bool:
    return values.is_cuda
