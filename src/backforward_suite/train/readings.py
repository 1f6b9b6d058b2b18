"""Read numbers from a GPU without waiting for it.

Reading a number makes the host wait for all launched work, and a small network loses time while nothing is launched.
So within an epoch each call starts an asynchronous copy and returns the value of the previous call, which has arrived
by then.
"""

from __future__ import annotations

import torch
from torch import Tensor

Reading = tuple[int, list[float]]  # step, values


class Readings:
    """Reads a few values of one shape repeatedly.

    On a GPU, `look` returns the previous call's value, elsewhere the current one. The lag depends on the calls
    alone, never on timing, so a run gives the same results on a slow and on a fast device.
    """

    def __init__(self) -> None:
        self._step: int | None = None  # of the copy under way
        self._values = torch.empty(0)
        self._there: torch.cuda.Event | None = None
        self._restored: Reading | None = None

    def look(self, values: Tensor, step: int = 0) -> Reading | None:
        """Start to read values, which may change right after the call.

        Args:
            values: Any shape.
            step: The step at which they were computed.

        Returns:
            On a GPU, the previous call's step and values, or None if there was none; elsewhere the current ones.
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
        """The last call's value, if it has not been returned yet. Waits for the copy."""
        if self._step is None:
            return self._restored
        if self._there is not None:
            self._there.synchronize()
        return self._step, self._values.flatten().tolist()

    def take(self) -> Reading | None:
        """Return the pending value and clear it."""
        found = self.pending
        self.restore(None)
        return found

    def restore(self, pending: Reading | None) -> None:
        """Continue with what was `pending` in an earlier process."""
        self._step, self._restored = None, pending


def _lags(values: Tensor) -> bool:
    return values.is_cuda
