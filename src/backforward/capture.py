"""A training step recorded once as a CUDA graph, and replayed: one launch in the place of hundreds.

A small network on a GPU is bound by launches. The whole step of an update rule, all its passes and optimizer steps, is
captured after a few ordinary steps, and again whenever something changes that a recording holds fast: the learning
rate, the size of a batch, the rule of the epoch.

Depends on torch and `errors` only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from backforward.errors import BadInput
from backforward.rules import Result

Replay = Callable[[], None]
Record = Callable[[Callable[[], Result]], tuple[Replay, Result]]

WARM_UP = 3  # ordinary steps before a recording: they make what is made once, such as momentum buffers and workspaces
PATIENCE = 20  # changes of what a recording holds fast, one after the other with no recording between, that are borne


class Rule(Protocol):
    """What is needed of an update rule."""

    def step(self, x: Tensor, y: Tensor) -> Result:
        """Change the weights by one mini-batch."""

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins."""

    def prepare(self, x: Tensor) -> None:
        """Plan the passes."""


def record_cuda(step: Callable[[], Result]) -> tuple[Replay, Result]:
    """Record a step without taking it; what it returns lies where every replay leaves its own result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph.replay, out


class Captured:
    """An update rule whose step is recorded and replayed.

    Args:
        rule: The rule. What it calls in Python (`after_update`, say) runs when a step is recorded, not when it is
            replayed; what that did on the device is part of the recording.
        optimizer: The rule's, whose learning rates are part of a recording.
        record: Records a step.
        must: Whether a step that cannot be recorded ends the training; else it is said once, and steps are ordinary.

    Attributes:
        replayed: Steps that were replays.
    """

    def __init__(
        self, rule: Rule, optimizer: torch.optim.Optimizer, record: Record = record_cuda, *, must: bool = False
    ) -> None:
        self.rule = rule
        self.replayed = 0
        self._optimizer = optimizer
        self._record = record
        self._must = must
        self._given_up = False
        self._key: Any = None
        self._ordinary = 0  # steps since the key has changed
        self._changes = 0  # of the key since the last recording
        self._batch: tuple[Tensor, Tensor] | None = None
        self._recording: tuple[Replay, Result] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins."""
        self.rule.set_epoch(epoch)

    def prepare(self, x: Tensor) -> None:
        """Plan the passes."""
        self.rule.prepare(x)

    def step(self, x: Tensor, y: Tensor) -> Result:
        """Let one mini-batch change the weights. What is returned holds until the next step.

        Raises:
            BadInput: The step cannot be recorded, and `must` be.
        """
        if self._given_up:
            return self.rule.step(x, y)
        key = (x.shape, x.dtype, y.shape, getattr(self.rule, "active", None), *self._rates())
        if key != self._key:
            self._key, self._ordinary, self._recording = key, 0, None
            self._changes += 1
            if self._changes > PATIENCE:
                self._give_up("the learning rate, or the size of a batch, changes again and again before one is made")
                return self.rule.step(x, y)
        if self._recording is None:
            if self._ordinary < WARM_UP:
                self._ordinary += 1
                return self._aside(x, y)
            if not self._captured(x, y):
                return self.rule.step(x, y)
        assert self._recording is not None
        assert self._batch is not None
        for place, given in zip(self._batch, (x, y), strict=True):
            place.copy_(given)
        replay, out = self._recording
        replay()
        self.replayed += 1
        return out

    def _rates(self) -> list[Any]:
        return [group["lr"] for group in self._optimizer.param_groups]

    def _aside(self, x: Tensor, y: Tensor) -> Result:
        """An ordinary step on a stream of its own, as a recording is: autograd remembers the stream of first use."""
        if x.device.type != "cuda":
            return self.rule.step(x, y)
        side, now = torch.cuda.Stream(x.device), torch.cuda.current_stream(x.device)
        side.wait_stream(now)
        with torch.cuda.stream(side):
            out = self.rule.step(x, y)
        now.wait_stream(side)
        return out

    def _captured(self, x: Tensor, y: Tensor) -> bool:
        """Record a step; give up for good where it cannot be."""
        self._batch = x.clone(), y.clone()
        try:
            self._recording = self._record(lambda: self.rule.step(*self._batch))  # type: ignore[misc]
            self._changes = 0
        except RuntimeError as error:
            self._give_up(str(error).strip().split("\n")[0], error)
        return not self._given_up

    def _give_up(self, reason: str, cause: Exception | None = None) -> None:
        if self._must:
            raise BadInput(
                f"trainer.capture=on: a step cannot be recorded as a CUDA graph ({reason});"
                " give trainer.capture=auto or off"
            ) from cause
        self._given_up = True
        warnings.warn(f"steps are not replayed from a CUDA graph: {reason}", stacklevel=2)
