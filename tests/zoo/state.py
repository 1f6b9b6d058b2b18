"""Everything that a training may change, as a flat dict: weights, buffers, attributes, generators."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Any]
_INTERNAL = set(nn.Module().__dict__) - {"training"} | {"_flat_weight_refs", "_flat_weights"}
_DEPTH = 4


def state_of(model: nn.Module) -> State:
    """Return weights, buffers and plain attributes of all modules by name; tensors are copied."""
    state: State = {}
    for name, module in model.named_modules():
        state |= {f"{name}.{key}": value for key, value in attributes_of(module).items()}
        for kind in (module._parameters, module._buffers):
            state |= {f"{name}.{key}": _plain(value) for key, value in kind.items() if value is not None}
    return state


def attributes_of(module: nn.Module) -> State:
    """Return a module's plain attributes, including those in containers and objects."""
    found: State = {}
    if not isinstance(module, torch.jit.ScriptModule):
        for key, value in vars(module).items():
            if key not in _INTERNAL and not key.startswith("_torchdynamo"):
                _walk(key, value, found, _DEPTH)
    return found


def generators() -> State:
    """Return the states of all global generators."""
    return {
        "torch's generator": torch.get_rng_state(),
        "random's generator": repr(random.getstate()),
        "numpy's generator": repr(np.random.get_state()),
    }


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the names of values that are missing on one side or not bitwise equal."""
    names = list(dict.fromkeys([*ours, *theirs]))
    return [n for n in names if n not in ours or n not in theirs or not same(ours[n], theirs[n])]


def same(a: Any, b: Any) -> bool:
    """Return whether two values are bitwise equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
    return type(a) is type(b) and repr(a) == repr(b)


def _bytes(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def flat(name: str, value: Any) -> State:
    """Return an output or a loss as a flat dict."""
    found: State = {}
    _walk(name, value, found, _DEPTH)
    return found


def _walk(name: str, value: Any, found: State, depth: int) -> None:
    if value is None or isinstance(value, bool | int | float | complex | str | Tensor):
        found[name] = _plain(value)
    elif isinstance(value, torch.Generator):
        found[name] = value.get_state()
    elif isinstance(value, np.random.Generator):
        found[name] = repr(value.bit_generator.state)
    elif isinstance(value, random.Random):
        found[name] = repr(value.getstate())
    elif isinstance(value, np.ndarray):
        found[name] = repr(value)
    elif isinstance(value, nn.Module | type) or callable(value) or depth == 0:
        found[name] = type(value).__qualname__
    elif isinstance(value, Mapping):
        found[f"{name}:"] = len(value)
        for key, item in value.items():
            _walk(f"{name}[{key}]", item, found, depth - 1)
    elif isinstance(value, Iterable) and not isinstance(value, set | frozenset):
        items = list(value)
        found[f"{name}:"] = len(items)
        for i, item in enumerate(items):
            _walk(f"{name}[{i}]", item, found, depth - 1)
    else:
        found[name] = type(value).__qualname__
        for key, item in getattr(value, "__dict__", {}).items():
            _walk(f"{name}.{key}", item, found, depth - 1)


def _plain(value: Any) -> Any:
    """Return a dense, detached copy of a tensor."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value.to_dense() if value.layout is not torch.strided else value.as_subclass(Tensor).clone()
