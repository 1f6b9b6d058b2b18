"""Checks of a network: the engine against naive, one group against plain training, `prepare` against no change."""

from __future__ import annotations

import copy
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.zoo.entry import Entry
from tests.zoo.state import State, differences, flat, generators, state_of
from torch import Tensor, nn

import backforward
from backforward import Backforward

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9),
    "gentle": lambda weights: torch.optim.SGD(weights, lr=0.001, momentum=0.9),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01),
    "sparse_adam": lambda weights: torch.optim.SparseAdam(weights, lr=0.01),
}
_LIBRARY = str(Path(backforward.__file__).parent)


@dataclass
class Trace:
    """The states after each batch of a training (with loss, output and generators), and how it ran.

    Attributes:
        states: One per batch.
        groups: The names of each group's parameters, per batch.
        engine: The engine that was used.
        said: The warnings, and the reasons for passes run in full.
    """

    states: list[State] = field(default_factory=list)
    groups: list[list[list[str]]] = field(default_factory=list)
    engine: str = ""
    said: list[str] = field(default_factory=list)


@dataclass
class Row:
    """The results for a network.

    Attributes:
        wrong: The differences found, by kind of check.
        refused: The default engine's one-line refusal.
        crashed: Any other error.
    """

    id: str
    about: str
    weights: int = 0
    groups: int = 0
    engine: str = ""
    why: str = ""
    wrong: dict[str, list[str]] = field(default_factory=dict)
    refused: str = ""
    crashed: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """The result in one word."""
        return "crashed" if self.crashed else "refused" if self.refused else "wrong" if self.wrong else "exact"


def check(entry: Entry, *, steps: int | None = None, optimizers: Sequence[str] = ()) -> Row:
    """Run all checks of a network except the oracle's, with all of its optimizers or those given."""
    row, began = Row(entry.id, entry.about), time.perf_counter()
    try:
        for optimizer in optimizers or entry.optimizers:
            _check(entry, row, optimizer, steps)
    except Exception as error:
        if is_refusal(error):
            row.refused = str(error)
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            row.crashed = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    row.seconds = round(time.perf_counter() - began, 2)
    return row


def _check(entry: Entry, row: Row, optimizer: str, steps: int | None) -> None:
    auto, left = train(entry, optimizer, steps=steps, prepare=True)
    row.engine, row.why = auto.engine, "; ".join(dict.fromkeys(auto.said))
    row.groups = len(auto.groups[-1])
    row.weights = sum(value.numel() for value in dict(entry.make().named_parameters()).values())
    found = {
        "prepare": left,
        f"naive, {optimizer}": _compare(auto, train(entry, optimizer, steps=steps, engine="naive")[0]),
        f"one group, {optimizer}": _compare(
            train(entry, optimizer, steps=steps, groups=1)[0], plain_training(entry, optimizer, steps=steps)
        ),
    }
    row.wrong |= {kind: names for kind, names in found.items() if names}


def _compare(ours: Trace, theirs: Trace) -> list[str]:
    """Return the differences after the first batch that has any."""
    for i, (a, b) in enumerate(zip(ours.states, theirs.states, strict=True)):
        if names := differences(a, b):
            return [f"batch {i}: {name}" for name in names]
    return []


def is_refusal(error: Exception) -> bool:
    """Return whether the library itself raised the error, in one line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = last.filename.startswith(_LIBRARY) and str(last.line).startswith("raise ")
    return isinstance(error, ValueError | TypeError) and raised and "\n" not in str(error)


# --- Trainings -------------------------------------------------------------------------------------------------------


def train(
    entry: Entry, optimizer: str, *, steps: int | None = None, prepare: bool = False, **arguments: Any
) -> tuple[Trace, list[str]]:
    """Train with Backforward; with `prepare`, also return the names of what `rule.prepare` changed."""
    model = entry.make()
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = OPTIMIZERS[optimizer](list(model.parameters()))
    trace, left, reasons = Trace(), [], []
    with _heard(trace.said):
        rule = Backforward(model, chosen, entry.loss_of(model), **{"groups": entry.groups} | arguments)
        for i, (x, y) in enumerate(entry.batches()[:steps]):
            if i and entry.between:
                entry.between(model, i)
            if not i and prepare:
                left = _left_by(lambda x=x: rule.prepare(x), model, chosen, x)
            out = rule.step(x, y)
            trace.states.append(_seen(model, out.loss, out.output))
            reasons += [rule.engine_reason] if rule.engine_reason else []
            trace.groups.append([[names[id(p)] for p in group.parameters] for group in rule.groups])
    trace.said += reasons
    trace.engine = "replay" if not reasons else f"naive in {len(reasons)} of {len(trace.states)} batches"
    return trace, left


def plain_training(entry: Entry, optimizer: str, *, steps: int | None = None) -> Trace:
    """Train with the textbook loop."""
    model = entry.make()
    chosen = OPTIMIZERS[optimizer](list(model.parameters()))
    loss_fn = entry.loss_of(model)
    trace = Trace()
    with _heard([]):
        for i, (x, y) in enumerate(entry.batches()[:steps]):
            if i and entry.between:
                entry.between(model, i)
            chosen.zero_grad()
            output = call(model, x)
            loss = loss_fn(output, y)
            loss.backward()
            seen = flat("loss", loss) | flat("output", output)
            chosen.step()
            trace.states.append(state_of(model) | generators() | seen)
    return trace


def call(model: nn.Module, x: Any) -> Any:
    """Call a network: a tuple contains positional inputs, a dict keyword inputs, anything else is one input."""
    return model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x)


def _seen(model: nn.Module, loss: Tensor, output: Any) -> State:
    return state_of(model) | generators() | flat("loss", loss) | flat("output", output)


def _left_by(action: Callable[[], None], model: nn.Module, optimizer: torch.optim.Optimizer, x: Any) -> list[str]:
    """Return the names of values, objects, flags and hooks that an action changed."""

    def look() -> State:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        found = state_of(model) | generators() | flat("input", x) | flat("optimizer", optimizer.state_dict())
        for name, tensor in tensors:
            found[f"{name} (object)"] = id(tensor)
            found[f"{name} (requires_grad)"] = tensor.requires_grad
            found[f"{name} (grad)"] = tensor.grad is None
        for name, module in model.named_modules():
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                found[f"{name} ({kind})"] = len(getattr(module, kind, ()))
            found[f"{name} (forward)"] = "forward" in getattr(module, "__dict__", {})
        return found

    before = look()
    action()
    return differences(look(), before)


@contextmanager
def _heard(said: list[str]) -> Any:
    """Collect warnings instead of showing them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said += [str(warning.message) for warning in caught if str(warning.message).startswith("Backforward")]


# --- Time ------------------------------------------------------------------------------------------------------------


def time_steps(entry: Entry, repeats: int = 7) -> dict[str, float]:
    """Return the median seconds per step of SGD, the default engine and naive, timed in turn."""
    x, y = entry.batches()[0]
    takes: dict[str, Callable[[], Any]] = {}
    for name in ("plain", "auto", "naive"):
        model = entry.make()
        optimizer, loss_fn = OPTIMIZERS["sgd"](list(model.parameters())), entry.loss_of(model)
        if name == "plain":
            takes[name] = lambda m=model, o=optimizer, f=loss_fn: _plain_step(m, o, f, copy.deepcopy(x), y)
        else:
            rule = Backforward(model, optimizer, loss_fn, groups=entry.groups, engine=name)
            takes[name] = lambda rule=rule: rule.step(copy.deepcopy(x), y)
    seconds: dict[str, list[float]] = {name: [] for name in takes}
    with _heard([]):
        for i in range(repeats + 2):
            for name, take in takes.items():
                began = time.perf_counter()
                take()
                if i >= 2:
                    seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Any, x: Any, y: Any) -> None:
    optimizer.zero_grad()
    loss_fn(call(model, x), y).backward()
    optimizer.step()
