"""Any optimizer, acting as one optimizer per group.

Backforward with an optimizer O is defined as one O per group, constructed with that group's parameters alone. Most
optimizers keep everything in `state[parameter]`, where one object works for all groups. Others keep counters too: in
`param_groups` (`k` and `weight_sum` of schedule-free optimizers, `d` of Prodigy), in attributes (`self._step`), or in
`state` under a name of their own. `OnePerGroup` keeps such counters separate for each group:

    one = OnePerGroup(optimizer)
    one.step(parameters_of_a_group, optimizer.step)

During that step the optimizer has the group's parameters and counters; afterwards it is as before. Values that a step
changed belong to the group. All others, such as a learning rate that a scheduler sets, are read from the optimizer at
each step and so apply to every group. If both a step and the user change a value, the user's change wins.

Counters are stored in `optimizer.param_groups[0]["backforward"]` as plain types and tensors, so `state_dict` saves them
and `load_state_dict` restores them. A step of all parameters is an ordinary one: it changes the optimizer itself. When
groups change (from Backforward to Backprop, say), counters follow parameters: a new group continues from the counters
of its first parameter.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from backforward.trial import KEY, OF_TORCH, examine, is_mutable, is_plain, parameters_of, same

__all__ = ["OnePerGroup", "clip_grad_norm_", "one_per_group", "parameters_of", "step_each"]

Place: TypeAlias = int | str  # the index of a param group, "attribute" or "state"
Counters: TypeAlias = dict[tuple[Place, str], tuple[Any, Any]]  # the group's value; the optimizer's at that time
Holders: TypeAlias = dict[Place, dict[Any, Any]]

_requires_grad = attrgetter("requires_grad")


class _Share(NamedTuple):
    """The part of a group that one optimizer updates.

    Attributes:
        key: The positions of the parameters among all of the optimizer's.
        lists: For each param group with any of them: its index, the parameters, the position of the first.
        mine: The parameters.
        others: The optimizer's other parameters.
        given: The whole group. It keeps the parameters alive, so that no new ones reuse their ids.
    """

    key: tuple[int, ...]
    lists: list[tuple[int, list[nn.Parameter], int]]
    mine: list[nn.Parameter]
    others: list[nn.Parameter]
    given: Sequence[nn.Parameter]


class OnePerGroup:
    """One optimizer that acts as one optimizer per group.

    Args:
        optimizer: Left unchanged: trial steps on a small copy show whether it can be used.
        alone: Whether every step updates all its parameters; fewer kinds of optimizers are then refused.

    Raises:
        ValueError: It needs a closure, second derivatives or a training loop of its own, wraps another optimizer,
            cannot be copied, or keeps state that no checkpoint can hold.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, alone: bool = False) -> None:
        self.optimizer = optimizer
        # Values that a step may change in place, so each group needs a copy. A tensor or list in a param group is a
        # setting (a learning rate that a scheduler fills and a CUDA graph reads) unless a trial step has changed it.
        self._moving = examine(optimizer, alone=alone)
        self._mutable = {n for n, v in vars(optimizer).items() if n not in OF_TORCH and is_mutable(v) and is_plain(v)}
        # torch's own optimizers (all are tested) keep everything by parameter: nothing to watch or restore.
        self._counts = not type(optimizer).__module__.startswith("torch.optim.")
        self._shares: dict[tuple[int, ...], _Share] = {}
        self._entries = -1  # len(optimizer.state) when it was last searched for entries that belong to no parameter
        self._counts_in_state = False

    def of(self, group: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of a group's parameters that the optimizer updates."""
        return self._share(group).mine

    def step(self, parameters: Sequence[nn.Parameter], take_step: Callable[[], Any]) -> None:
        """Call `take_step` (which calls `optimizer.step()`) as the optimizer of these parameters alone."""
        optimizer, share = self.optimizer, self._share(parameters)
        real = optimizer.param_groups
        if not (self._counts and any(map(_requires_grad, share.others))):
            self._step_itself(share, take_step)
            return
        shown = {i: {**real[i], "params": mine} for i, mine, _ in share.lists}
        before: Holders = {"attribute": vars(optimizer).copy()}
        plain = not (self._moving or self._mutable or KEY in real[0] or self._state_counts())
        if not plain:
            self._show(share, shown, before)
        optimizer.param_groups = list(shown.values())
        try:
            take_step()
        finally:
            optimizer.param_groups = real
            for i, group in shown.items():
                group["params"] = real[i]["params"]
                plain = plain and _alike(group, real[i])
            if not (plain and len(optimizer.state) == self._entries and _alike(vars(optimizer), before["attribute"])):
                self._keep(share, shown, before)

    def _step_itself(self, share: _Share, take_step: Callable[[], Any]) -> None:
        """Take a step that may change the optimizer. First give it back the counters of these parameters, if any."""
        real = self.optimizer.param_groups
        if KEY in real[0]:
            own = self._recall(share)
            del real[0][KEY]
            for (place, name), value in own.items():
                self._holder(place)[name] = value
        if not share.others:
            take_step()
            return
        lists = [group["params"] for group in real]
        self.optimizer.param_groups = [real[i] for i, _, _ in share.lists]
        for i, mine, _ in share.lists:
            real[i]["params"] = mine
        try:
            take_step()
        finally:
            self.optimizer.param_groups = real
            for group, parameters in zip(real, lists, strict=True):
                group["params"] = parameters

    def _share(self, parameters: Sequence[nn.Parameter]) -> _Share:
        key = (len(self.optimizer.param_groups), *map(id, parameters))  # the user may add param groups
        share = self._shares.get(key)
        if share is None:
            ids, place = set(key[1:]), 0
            mine: dict[int, nn.Parameter] = {}
            lists = []
            for i, group in enumerate(self.optimizer.param_groups):
                part = {place + j: p for j, p in enumerate(group["params"]) if id(p) in ids}
                place += len(group["params"])
                if part:
                    mine |= part
                    lists.append((i, list(part.values()), next(iter(part))))
            others = [p for p in parameters_of(self.optimizer) if id(p) not in ids]
            if len(self._shares) > 10_000:  # drop groups that are no longer used
                self._shares.clear()
            share = self._shares[key] = _Share(tuple(mine), lists, list(mine.values()), others, parameters)
        return share

    def _show(self, share: _Share, shown: dict[int, dict[str, Any]], before: Holders) -> None:
        """Set the group's counters for its step, and copies of values that the step could change in place.

        Adds to `before` the entries of `optimizer.state` that belong to no parameter. `shown` are the group's param
        groups.
        """
        optimizer = self.optimizer
        own = self._recall(share) if KEY in optimizer.param_groups[0] else {}
        for i, _, _ in share.lists:
            shown[i].pop(KEY, None)
        before["state"] = self._globals() if self._state_counts() else {}
        mutable: list[tuple[Place, str]] = [(i, name) for i, _, _ in share.lists for name in self._moving]
        mutable += [("attribute", name) for name in self._mutable]
        mutable += [("state", name) for name, entry in before["state"].items() if is_mutable(entry)]
        ours = {id(p): p for p in parameters_of(optimizer)} if mutable else {}
        for place, name in mutable:
            target = shown[place] if isinstance(place, int) else self._holder(place)
            if (place, name) not in own and name in target:
                target[name] = copy.deepcopy(target[name], {**ours, id(optimizer): optimizer})
        for (place, name), value in own.items():
            (shown[place] if isinstance(place, int) else self._holder(place))[name] = value

    def _keep(self, share: _Share, shown: dict[int, dict[str, Any]], before: Holders) -> None:
        """Store what the group's step changed, and restore the optimizer's own attributes and entries."""
        optimizer = self.optimizer
        real = optimizer.param_groups
        earlier = before.get("state", {})
        now: Holders = {"attribute": vars(optimizer).copy(), **dict(shown.items())}
        now["state"] = self._globals() if earlier or len(optimizer.state) != self._entries else {}
        counters: Counters = {}
        for place, holder in now.items():
            old = real[place] if isinstance(place, int) else before.get(place, {})
            for name, value in holder.items():
                if not (place == "attribute" and name in OF_TORCH) and not same(value, old.get(name)):
                    counters[place, name] = (value, old.get(name))
        for name in now["attribute"].keys() - before["attribute"].keys() - OF_TORCH:
            del vars(optimizer)[name]
        vars(optimizer).update({k: v for k, v in before["attribute"].items() if k not in OF_TORCH})
        for name in now["state"].keys() - earlier.keys():
            del optimizer.state[name]
        optimizer.state.update(earlier)
        self._entries = len(optimizer.state)
        kept = real[0].get(KEY, {})
        if counters or share.key in kept:
            real[0][KEY] = {**kept, share.key: counters}

    def _recall(self, share: _Share) -> dict[tuple[Place, str], Any]:
        """Return the group's counters, except those that the user has set since."""
        real = self.optimizer.param_groups
        if share.key not in real[0][KEY]:
            real[0][KEY] = _regrouped(real[0][KEY], share)
        counters: Counters = real[0][KEY].get(share.key, {})
        return {
            slot: value for slot, (value, seen) in counters.items() if same(self._holder(slot[0]).get(slot[1]), seen)
        }

    def _holder(self, place: Place) -> dict[Any, Any]:
        """Return the mapping in which the optimizer itself keeps the values of a place."""
        if isinstance(place, int):
            return self.optimizer.param_groups[place]
        return vars(self.optimizer) if place == "attribute" else self.optimizer.state

    def _globals(self) -> dict[Any, Any]:
        return {name: entry for name, entry in self.optimizer.state.items() if not isinstance(name, Tensor)}

    def _state_counts(self) -> bool:
        """Return whether `optimizer.state` has entries that belong to no parameter."""
        if len(self.optimizer.state) != self._entries:
            self._entries = len(self.optimizer.state)
            self._counts_in_state = bool(self._globals())
        return self._counts_in_state


def _regrouped(kept: Mapping[tuple[int, ...], Counters], share: _Share) -> dict[tuple[int, ...], Counters]:
    """Return the counters by group, after a new group is formed from parameters of others."""
    counters: Counters = {}
    first = True
    for i, _, place in share.lists:
        source = next((of_old for old, of_old in kept.items() if place in old), {})
        counters |= {slot: pair for slot, pair in source.items() if slot[0] == i or (first and slot[0] in _ONCE)}
        first = False
    left = {tuple(place for place in old if place not in share.key): of_old for old, of_old in kept.items()}
    return {**{key: of_old for key, of_old in left.items() if key}, share.key: copy.deepcopy(counters)}


_ONCE = ("attribute", "state")


def _alike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Return whether two mappings have equal values; fast if the objects are the same."""
    try:
        return ours == theirs
    except (RuntimeError, ValueError):  # comparing two tensors or arrays
        return False


def one_per_group(
    model: nn.Module,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    rule: str,
    *,
    alone: bool = False,
) -> list[OnePerGroup]:
    """Prepare a network's optimizers, and warn about trainable parameters that no optimizer has.

    Raises `TypeError` or `ValueError`, with messages that begin with the update rule's name `rule`, for an object that
    is no optimizer, one that `OnePerGroup` refuses, or a parameter in two optimizers.
    """
    several: list[Any] = list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]
    if not several:
        raise ValueError(f"{rule}: the list of optimizers is empty; give at least one")
    for optimizer in several:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{rule}: optimizer is a {type(optimizer).__name__}; {_instead(optimizer)}")
    names = {id(p): name for name, p in model.named_parameters()}
    taken: set[int] = set()
    for optimizer in several:
        ids = {id(p) for p in parameters_of(optimizer)}
        if twice := [name for p, name in names.items() if p in taken & ids]:
            raise ValueError(f"{rule}: {twice[0]} is in two optimizers; give each parameter one")
        taken |= ids
    if left := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in taken]:
        listed = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        warnings.warn(
            f"{rule}: no optimizer has {listed}: not trained; give them an optimizer or requires_grad=False",
            stacklevel=5,
        )
    try:
        return [OnePerGroup(optimizer, alone=alone) for optimizer in several]
    except ValueError as error:
        raise ValueError(f"{rule}: {error}") from error


def _instead(given: Any) -> str:
    if isinstance(given, torch.amp.GradScaler):
        return "its scale moves within a batch: give the optimizer itself, and autocast to bfloat16"
    for name, value in getattr(given, "__dict__", {}).items():
        if isinstance(value, torch.optim.Optimizer):
            return f"give the {type(value).__name__} that it wraps (its .{name})"
    return "give a torch.optim.Optimizer"


def step_each(
    optimizers: Sequence[OnePerGroup],
    groups: Sequence[Sequence[nn.Parameter]],
    take_step: Callable[[bool], None] | None,
    *,
    last: bool,
) -> None:
    """Take the steps of one update: for each group, one step of each optimizer that has any of its parameters.

    During a step, all gradients except those of the step's own parameters are None. `take_step`, by default
    `optimizer.step()`, receives True for the last step of a batch.
    """
    steps = [(one, group, mine) for group in groups for one in optimizers if (mine := one.of(group))]
    several = len(steps) > 1
    if several:
        gradients = {p: p.grad for group in groups for p in group}
        steps = [step for step in steps if any(gradients[p] is not None for p in step[2])]
    for i, (one, group, mine) in enumerate(steps):
        if several:
            for p in gradients:
                p.grad = None
            for p in mine:
                p.grad = gradients[p]
        is_last = last and i == len(steps) - 1
        one.step(group, one.optimizer.step if take_step is None else partial(take_step, is_last))
    if several:
        for p, gradient in gradients.items():
            p.grad = gradient


def clip_grad_norm_(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Clip the gradient's total norm as `torch.nn.utils.clip_grad_norm_` does, sparse gradients included."""
    if not any(p.grad is not None and p.grad.is_sparse for p in parameters):
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()  # sums duplicate indices, which are one entry of the gradient
    present = [p.grad for p in parameters if p.grad is not None]
    values = [gradient.values() if gradient.is_sparse else gradient for gradient in present]
    scale = (max_norm / (nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1)
    for value in values:
        value.mul_(scale)
