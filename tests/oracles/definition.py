"""Backforward Propagation by its definition, on copies: nothing of one pass can leak into the next.

For each batch and each group: copy the network as it stood when the batch began, but for the weights, which are the
current ones; put the generators back; forward, backward; one optimizer of this group's own takes a step. What a forward
moves (buffers, frozen weights, attributes) has to end as one of the passes left it: in the pass of its own group for
a module that holds trained weights beside it.
"""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import torch
from tests.zoo.check import OPTIMIZERS, Trace, call
from tests.zoo.entry import Entry
from tests.zoo.state import State, attributes_of, differences, flat, generators, same, state_of
from torch import nn


def compare(entry: Entry, optimizer: str, trace: Trace) -> list[str]:
    """Repeat a training from the definition; name what the trace has otherwise.

    Args:
        entry: The network.
        optimizer: A name in `OPTIMIZERS`.
        trace: What an engine left after each batch, and the groups that it found.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _compare(entry, optimizer, trace)


def _compare(entry: Entry, optimizer: str, trace: Trace) -> list[str]:
    master = entry.make()
    named = dict(master.named_parameters())
    optimizers: dict[tuple[str, ...], torch.optim.Optimizer] = {}
    for i, ((x, y), theirs, groups) in enumerate(zip(entry.batches(), trace.states, trace.groups, strict=False)):
        if i and entry.between:
            entry.between(master, i)
        begun, passes, ended = _generators(), [], None
        shown: State = {}
        for names in groups:
            _restore(begun)
            ours = copy.deepcopy(master)
            own = dict(ours.named_parameters())
            output = call(ours, copy.deepcopy(x))
            loss = entry.loss_of(ours)(output, y)
            if not shown:
                shown = flat("loss", loss) | flat("output", output)
            if ended is None:
                ended = _generators()
            if loss.requires_grad:
                loss.backward()
            passes.append(ours)
            for name in names:
                named[name].grad = None if own[name].grad is None else own[name].grad.clone()
            key = tuple(names)
            if key not in optimizers:
                optimizers[key] = OPTIMIZERS[optimizer]([named[name] for name in names])
            optimizers[key].step()
            master.zero_grad(set_to_none=True)
        assert ended is not None
        _restore(ended)
        trained = {name for names in groups for name in names}
        wrong = _adopt(master, passes, theirs, trained, groups)
        weights = {
            f"{owner}.{leaf}": named[name].detach() for name in trained for owner, _, leaf in [name.rpartition(".")]
        }
        expected = weights | shown | generators()
        wrong += differences(expected, {name: theirs.get(name) for name in expected})
        if wrong:
            return [f"batch {i}: {name}" for name in wrong]
    return []


def _adopt(
    master: nn.Module, passes: list[nn.Module], theirs: State, trained: set[str], groups: list[list[str]]
) -> list[str]:
    """Let the copy of the batch's start become what the trace has, if a pass left it so; name what none did."""
    wrong, states = [], [state_of(ours) for ours in passes]
    for name, module in master.named_modules():
        own = [k for k, names in enumerate(groups) for p in names if p.rpartition(".")[0] == name]
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            full = f"{name}.{key}"
            if value is None or f"{name}.{key}".lstrip(".") in trained:
                continue
            allowed = own[:1] if own and key in module._buffers else range(len(passes))
            found = [k for k in allowed if full in theirs and same(states[k][full], theirs[full])]
            if not found:
                wrong.append(full)
                continue
            left = getattr(passes[found[0]].get_submodule(name), key)
            if left.layout is torch.strided:
                value.data = left.detach().clone()
        attributes = attributes_of(module)
        expected = {key: theirs.get(f"{name}.{key}") for key in attributes_of(passes[0].get_submodule(name))}
        if not differences(attributes, expected):
            continue
        for ours in passes:
            left = ours.get_submodule(name)
            if not differences(attributes_of(left), expected):
                module.__dict__.update(_detached({k: v for k, v in vars(left).items() if k not in vars(nn.Module())}))
                break
        else:
            wrong += [f"{name}.{key}" for key in differences(attributes_of(passes[0].get_submodule(name)), expected)]
    return wrong


def _detached(value: Any) -> Any:
    """The same with every tensor cut off from its graph."""
    memo: dict[int, Any] = {}

    def cut(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            memo[id(item)] = item.detach().clone()
        elif isinstance(item, dict):
            for part in item.values():
                cut(part)
        elif isinstance(item, list | tuple | set) or hasattr(item, "maxlen"):
            for part in item:
                cut(part)

    cut(value)
    return copy.deepcopy(value, memo)


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _restore(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
