"""A training step recorded as a CUDA graph and replayed: one launch instead of hundreds.

Launches limit the speed of a small network on a GPU. The whole step of an update rule, with all passes and optimizer
steps, is recorded after a few ordinary steps, and again whenever a constant of the recording changes: the learning rate
(unless it is a tensor on the GPU), the shape of a batch, the rule of the epoch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from backforward.rules import Rule, StepResult
from backforward.trial import KEY
from backforward_suite.errors import BadInput

T = TypeVar("T")
Replay = Callable[[], None]
Record = Callable[[Callable[[], StepResult]], tuple[Replay, StepResult]]

WARM_UP = 3  # ordinary steps before a recording: they allocate momentum buffers and workspaces
PATIENCE = 20  # give up after this many changes of a recording's constants without a recording in between


def record_cuda(step: Callable[[], StepResult]) -> tuple[Replay, StepResult]:
    """Record a step without taking it. Every replay writes its results to the tensors returned here.

    Records on the current stream, unless that is the default one.

    Raises:
        RuntimeError: The step cannot be recorded.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream if stream != torch.cuda.default_stream() else None):
            out = step()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # torch does not restore it if ending the recording fails too
        raise
    return graph.replay, out


class Captured:
    """An update rule whose step is recorded and replayed.

    Args:
        rule: The rule. Python code in its step (`after_update`, say) runs only while a step is recorded; a replay
            repeats its work on the device.
        optimizer: The rule's optimizer. Its learning rates are constants of a recording unless they are tensors on the
            GPU.
        record: Records a step.
        must: If a step cannot be recorded, raise an error; else print one line and take ordinary steps.

    Attributes:
        replayed: Number of replayed steps.
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
        self._counts_on_host = [group for group in optimizer.param_groups if group.get("capturable") is False]
        set_capturable(optimizer, optimizer.param_groups, True)
        self._key: Any = None
        self._ordinary = 0  # steps since the key has changed
        self._changes = 0  # of the key since the last recording
        self._batch: tuple[Tensor, Tensor] | None = None
        self._side: torch.cuda.Stream | None = None
        self._recording: tuple[Replay, StepResult] | None = None

    def set_epoch(self, epoch: int, batch: int | None = None) -> None:
        """Tell the rule which epoch starts."""
        self.rule.set_epoch(epoch, batch)

    def prepare(self, x: Tensor) -> None:
        """Prepare the rule."""
        self.rule.prepare(x)

    def step(self, x: Tensor, y: Tensor) -> StepResult:
        """Take one step. The returned tensors are valid until the next step.

        Raises:
            BadInput: The step cannot be recorded, and `must` is set.
        """
        if self._given_up:
            return self.rule.step(x, y)
        key = (x.shape, x.dtype, y.shape, getattr(self.rule, "active", None), *self._rates())
        if key != self._key:
            self._key, self._ordinary, self._recording = key, 0, None
            self._changes += 1
            if self._changes > PATIENCE:
                self._give_up("the learning rate or the shape of a batch changes too often")
                return self.rule.step(x, y)
        if self._recording is None:
            if self._ordinary < WARM_UP:
                self._ordinary += 1
                return self._on_the_side(lambda: self._ordinary_step(x, y), x.device)
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
        """Return the learning rates that are constants of a recording; each replay reads those on the GPU."""
        rates = (group["lr"] for group in self._optimizer.param_groups)
        plain = (lr.tolist() if isinstance(lr, Tensor) and not lr.is_cuda else lr for lr in rates)
        return [lr for lr in plain if not isinstance(lr, Tensor)]

    def _on_the_side(self, work: Callable[[], T], device: torch.device) -> T:
        """Run ordinary steps and recordings on one side stream, as autograd remembers the stream of first use.

        Always the same one: torch keeps memory per stream.
        """
        if device.type != "cuda":
            return work()
        self._side = self._side or torch.cuda.Stream(device)
        now = torch.cuda.current_stream(device)
        self._side.wait_stream(now)
        with torch.cuda.stream(self._side):
            found = work()
        now.wait_stream(self._side)
        return found

    def _ordinary_step(self, x: Tensor, y: Tensor) -> StepResult:
        """Take a step; watch the last one before a recording for what makes a recording impossible."""
        if self._ordinary < WARM_UP or x.device.type != "cuda":
            return self.rule.step(x, y)
        before, numbers = torch.cuda.get_sync_debug_mode(), numbers_outside_state(self._optimizer)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                out = self.rule.step(x, y)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        if any("synchronizing CUDA operation" in str(warning.message) for warning in said):
            self._give_up("within a step the host waits for the GPU")
        elif counts_on_host(self._optimizer, x.device) or numbers_outside_state(self._optimizer) != numbers:
            self._give_up("its optimizer counts steps on the host")
        return out

    def _captured(self, x: Tensor, y: Tensor) -> bool:
        """Record a step, or give up for good; return whether it was recorded."""
        batch = self._batch = x.clone(), y.clone()
        try:
            self._recording = self._on_the_side(lambda: self._record(lambda: self.rule.step(*batch)), x.device)
            self._changes = 0
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # the first error; later ones follow from it
                cause = cause.__context__
            self._give_up(str(cause).strip().split("\n")[0], cause)
        return not self._given_up

    def _give_up(self, reason: str, cause: BaseException | None = None) -> None:
        if self._must:
            raise BadInput(
                f"trainer.capture=on: a step cannot be recorded as a CUDA graph ({reason});"
                " give trainer.capture=auto or off"
            ) from cause
        self._given_up = True
        set_capturable(self._optimizer, self._counts_on_host, False)
        say_ordinary(reason)


def say_ordinary(reason: str) -> None:
    """Print in one line why steps are not replayed."""
    print(f"steps are not replayed from a CUDA graph: {reason}", file=sys.stderr, flush=True)


def set_capturable(optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]], on: bool) -> None:
    """Set torch's switch `capturable`: whether an optimizer such as Adam counts its steps on the GPU or on the host.

    Groups without this switch are left alone; so are groups that are not on a GPU if `on`.
    """
    for group in groups:
        if "capturable" not in group or group["capturable"] is on:
            continue
        if on and not all(parameter.is_cuda for parameter in group["params"]):
            continue
        group["capturable"] = on
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and not value.dim():  # the count, and values that depend only on it
                    state[key] = value.to(parameter.device if on or group.get("fused") else "cpu")
    optimizer._warned_capturable_if_run_uncaptured = True  # silences torch about ordinary steps in between


def counts_on_host(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Return whether an optimizer's state has numbers on the host, which would be constants of a recording."""
    if KEY in optimizer.param_groups[0]:  # a group's counters
        return True
    entries = [entry.values() if isinstance(entry, dict) else [entry] for entry in optimizer.state.values()]
    return any(
        isinstance(value, int | float) or (isinstance(value, Tensor) and value.device.type != device.type)
        for values in entries
        for value in values
    )


def numbers_outside_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the numbers on the host among an optimizer's attributes and settings: a replay would not change them."""
    places = [vars(optimizer), *optimizer.param_groups]
    return [
        {name: found for name, value in place.items() if (found := _on_host(value)) is not None} for place in places
    ]


def _on_host(value: Any) -> Any:
    """Return a number, or the version of a tensor on the CPU; else None."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        return id(value), value._version
    return value if isinstance(value, int | float) else None
