"""Trial steps: a small copy of an optimizer shows whether it can be used and which values it counts.

An optimizer's class says little about what it needs, so try: a step shows whether it needs a closure, second
derivatives or the loss. The optimizer, its parameters, its hooks and all generators stay unchanged.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

KEY = "backforward"  # in `param_groups[0]`: where `optimizers` stores the groups' counters
STEPS = 3
SMALL = 4  # size of a copied parameter along each dimension

# What torch itself stores on an optimizer. None of it counts steps.
OF_TORCH = frozenset(vars(torch.optim.Optimizer([nn.Parameter(torch.empty(0))], {}))) | {
    "step",  # patched by a scheduler
    "_opt_called",
    "_need_device_dtype_check_for_fused",
}
# Methods that only a training loop written for the optimizer calls.
OWN_LOOP = ("first_step", "second_step", "update_hessian", "fused_backward")


def examine(optimizer: torch.optim.Optimizer, *, alone: bool = False) -> frozenset[str]:
    """Take a few steps on a small copy; return the names of values in param groups that the steps change in place.

    Args:
        optimizer: Left unchanged.
        alone: Whether every step updates all its parameters. It may then be a wrapper or count in any way.

    Raises:
        ValueError: The optimizer cannot be used; the message says why.
    """
    kind = type(optimizer).__name__
    instead = "take an optimizer that needs no more than step()"
    if needed := [name for name in OWN_LOOP if callable(getattr(optimizer, name, None))]:
        raise ValueError(f"{kind} needs a training loop of its own, which calls {needed[0]}(); {instead}")
    wrapped = [type(v).__name__ for v in vars(optimizer).values() if isinstance(v, torch.optim.Optimizer)]
    if wrapped and not alone:
        raise ValueError(f"{kind} wraps another optimizer; give the {wrapped[0]} itself")
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters_of(optimizer)):
        raise ValueError(
            f"{kind} has parameters with hooks on accumulated gradients, which never run here; remove them"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(f"{kind} has differentiable=True, but no graph outlives a step; leave it out")
    if wrapped or not any(_is_trained(p) for p in parameters_of(optimizer)):
        return frozenset()
    try:
        _copy(optimizer, small=True)
    except Exception as error:
        if alone:
            return frozenset()
        raise ValueError(f"{kind} cannot be copied for a trial step ({_line(error)}); {instead}") from error
    before, after, how = _first_that_works(optimizer, instead)
    if alone:
        return frozenset()
    if "closure" in inspect.signature(optimizer.step).parameters and _reads_loss(optimizer, after, how):
        raise ValueError(f"{kind} reads the loss, which only a closure gives; take one that needs no closure")
    moved = {
        name: value
        for now, old in zip(_places(after), _places(before), strict=True)
        for name, value in now.items()
        if not same(value, old.get(name))
    }
    for name, value in moved.items():
        if not is_plain(value):
            raise ValueError(f"{kind} keeps {name!r} (a {type(value).__name__}) from step to step; {instead}")
    return frozenset(name for group in after.param_groups for name in group if is_mutable(moved.get(name)))


def _places(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return where an optimizer may count: attributes, `state` entries that belong to no parameter, param groups."""
    attributes = {name: value for name, value in vars(optimizer).items() if name not in OF_TORCH}
    entries: dict[Any, Any] = {name: entry for name, entry in optimizer.state.items() if not isinstance(name, Tensor)}
    groups = [{n: v for n, v in group.items() if n != "params"} for group in optimizer.param_groups]
    return [attributes, entries, *groups]


@contextmanager
def _no_trace(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore the generators at the end, and silence warnings."""
    devices = {p.device for p in parameters_of(optimizer) if p.device.type not in {"cpu", "meta"}}
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    kind = next(iter(devices)).type if devices else "cuda"
    try:
        with warnings.catch_warnings(), torch.random.fork_rng([d.index or 0 for d in devices], device_type=kind):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def _is_trained(p: nn.Parameter) -> bool:
    return p.requires_grad and _has_shape(p)


def _has_shape(p: nn.Parameter) -> bool:
    return not is_lazy(p)


def _first_that_works(
    optimizer: torch.optim.Optimizer, instead: str
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer, tuple[bool, bool]]:
    """Return a copy, a copy that has stepped, and how: preferably with small parameters and dense gradients."""
    kind = type(optimizer).__name__
    first: Exception | None = None
    for small, sparse in ((True, False), (False, False), (True, True)):
        try:
            return _copy(optimizer, small), _stepped(optimizer, small, sparse), (small, sparse)
        except Exception as error:
            first = first or error
    assert first is not None
    text = _line(first).lower()
    if "closure" in text:
        raise ValueError(f"{kind} needs a closure; take an optimizer that needs none") from first
    if "create_graph" in text or "does not require grad" in text:
        raise ValueError(f"{kind} needs second derivatives (create_graph=True); {instead}") from first
    raise ValueError(f"{kind} cannot take a step ({_line(first)}); {instead}") from first


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n", maxsplit=1)[0]


def _reads_loss(optimizer: torch.optim.Optimizer, without: torch.optim.Optimizer, how: tuple[bool, bool]) -> bool:
    """Return whether the loss that a closure returns changes the step."""
    try:
        losses = iter((1.0, 10.0, 0.1) * STEPS)
        other = _stepped(optimizer, *how, closure=lambda: torch.tensor(next(losses)))
    except Exception:  # the step accepts no closure
        return False
    pairs = zip(parameters_of(without), parameters_of(other), strict=True)
    return not all(same(p.data, q.data) for p, q in pairs)


def _copy(optimizer: torch.optim.Optimizer, small: bool) -> torch.optim.Optimizer:
    """Copy an optimizer, with parameters of its own."""
    new = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(optimizer): new}
    for p in parameters_of(optimizer):
        if not _has_shape(p):
            memo[id(p)] = nn.Parameter(torch.empty(0), requires_grad=False)
            continue
        corner = tuple(slice(0, SMALL) for _ in p.shape) if small else ()
        memo[id(p)] = nn.Parameter(p.detach()[corner].clone(), p.requires_grad)
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                memo[id(value)] = value.detach()[corner].clone()
    for name, value in vars(optimizer).items():
        if "hooks" in name and name in OF_TORCH:
            vars(new)[name] = OrderedDict()
        elif isinstance(value, GeneratorType) and value.gi_frame is None:
            vars(new)[name] = value  # exhausted in the constructor, and cannot be copied
        elif name != "step":
            vars(new)[name] = copy.deepcopy(value, memo)
    trained = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in new.param_groups]
    new.param_groups = [{n: v for n, v in group.items() if n != KEY} for group in trained if group["params"]]
    return new


def _stepped(
    optimizer: torch.optim.Optimizer,
    small: bool,
    sparse: bool = False,
    closure: Callable[[], Tensor] | None = None,
) -> torch.optim.Optimizer:
    """Return a copy that has taken a few steps."""
    new = _copy(optimizer, small)
    train = getattr(new, "train", None)  # schedule-free optimizers step in training mode only
    if callable(train):
        train()
    step: Any = type(new).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step  # bypass hooks
    with _no_trace(optimizer):
        for _ in range(STEPS):
            for p in parameters_of(new):
                gradient = p.detach().cos() / 10
                p.grad = gradient.to_sparse(1) if sparse and p.dim() else gradient
            step(new) if closure is None else step(new, closure)
    return new


def parameters_of(optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> list[nn.Parameter]:
    """Return the parameters of one or several optimizers, in order."""
    several = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers
    return [p for optimizer in several for group in optimizer.param_groups for p in group["params"]]


def is_mutable(value: Any) -> bool:
    """Return whether a value can change in place."""
    return isinstance(value, Tensor | list | dict | set | deque)


def is_plain(value: Any) -> bool:
    """Return whether a value consists of numbers, strings and tensors only, which a checkpoint can hold."""
    if isinstance(value, dict):
        return all(is_plain(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple | set):
        return all(map(is_plain, value))
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)  # a parameter is known by its identity
    return value is None or type(value) in {bool, int, float, complex, str, bytes}


def same(ours: Any, theirs: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Return whether two values are bitwise equal. NaN equals NaN; parameters, modules and functions always do."""
    if ours is theirs or id(ours) in seen or isinstance(ours, nn.Parameter | nn.Module) or callable(ours):
        return True
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, Tensor):
        alike = ours.shape == theirs.shape and ((ours == theirs) | ((ours != ours) & (theirs != theirs))).all()  # noqa: PLR0124
        return bool(alike)
    if isinstance(ours, dict):
        pairs: Any = (list(ours), list(ours.values())), (list(theirs), list(theirs.values()))
    elif isinstance(ours, list | tuple | deque):
        pairs = ours, theirs
    elif hasattr(ours, "__dict__"):
        pairs = [vars(ours)], [vars(theirs)]
    elif hasattr(ours, "tobytes"):  # NumPy
        return bool(ours.tobytes() == theirs.tobytes())
    else:
        return bool(ours == theirs) or (ours != ours and theirs != theirs)  # noqa: PLR0124
    seen |= {id(ours)}
    return len(pairs[0]) == len(pairs[1]) and all(same(a, b, seen) for a, b in zip(*pairs, strict=True))
