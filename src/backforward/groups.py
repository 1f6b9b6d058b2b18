"""The layers of a network in forward order, and how they form groups.

Nothing is traced: a `Survey` watches the real forward and notes each layer on first use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backforward.batch import Generators, Inputs, World, is_compiled, tensors_in
from backforward.flops import FlopCounter

GroupSpec: TypeAlias = str | int | Sequence[str | Sequence[str]]


class Group(NamedTuple):
    """Parameters that one sub-step updates together.

    Attributes:
        name: The layer's qualified name in the network, or `first..last` for several layers.
        parameters: The trainable parameters, in the order in which the network registers them.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]


# --- Layers in forward order ------------------------------------------------------------------------------------------


class Order:
    """Layers in the order of their first use. `owner` maps a tensor's id to the module that holds it."""

    def __init__(self, owner: dict[int, str], parameters: Iterable[nn.Parameter]) -> None:
        self.owner = owner
        self.used: list[str] = []
        self._seen: set[str] = set()
        self._looked: dict[str, int] = {}
        self._parameters = parameters

    def use(self, name: str) -> None:
        """Note that a parameter or buffer of this module enters a function."""
        if name not in self._seen:
            self._seen.add(name)
            self.used.append(name)

    def look(self, tensor: int) -> None:
        """Note that the forward reads a parameter's shape or the like: not a use, but one may follow unseen."""
        if tensor in self.owner:
            self._looked.setdefault(self.owner[tensor], len(self.used))

    def layers(self, leaves: set[int]) -> list[str]:
        """Return the layers used, given the ids (`leaves`) of the parameters that the loss depends on.

        A layer that the loss depends on but no function was seen to use (under vmap, say) counts as used when the
        forward first read its shape.
        """
        found = list(self.used)
        unseen = set(self._looked) - self._seen
        if not unseen:
            return found
        unseen &= {self.owner[id(p)] for p in self._parameters if id(p) in leaves}
        for name, place in sorted(self._looked.items(), key=lambda item: -item[1]):
            if name in unseen:
                found.insert(place, name)
        return found


class Survey(TorchFunctionMode):
    """Notes when each parameter and buffer first enters a torch function.

    Attributes:
        order: The layers in the order of their first use.
        macs: Multiply-accumulates per module, if there is a `counter`. Calls without parameters count for the module
            used before.
    """

    def __init__(self, model: nn.Module, counter: FlopCounter | None = None) -> None:
        super().__init__()
        self.order = Order(owners(model), list(model.parameters()))
        self.macs: dict[str, int] = {}
        self._counter = counter
        self._last = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops() if self._counter else 0
        result = func(*args, **(kwargs or {}))
        taken = [id(t) for t in tensors_in([args, kwargs]) if id(t) in self.order.owner]
        if next(tensors_in(result), None) is None:
            for key in taken[:1]:  # a shape, a device, a flag
                self.order.look(key)
            return result
        for key in taken:
            self.order.use(self.order.owner[key])
        if self._counter and self.order.used:
            self._last = self.order.owner[taken[0]] if taken else self._last
            spent = (self._counter.get_total_flops() - before) // 2
            self.macs[self._last] = self.macs.get(self._last, 0) + spent
        return result


def survey(model: nn.Module, inputs: Inputs, *, count: bool = False) -> Survey:
    """Run one forward and note what it uses, leaving the network and all generators unchanged.

    With `count`, count multiply-accumulates too.
    """
    refuse_scripted(model)
    world = World(model, set())
    world.unseen = True
    generators = Generators((t.device for t in chain(model.parameters(), model.buffers())), world.private)
    states = generators.save()
    try:
        with ExitStack() as stack:
            counter = stack.enter_context(FlopCounter()) if count else None
            watch = Survey(model, counter)
            stack.enter_context(watch)
            inputs.given_to(model, eager=is_compiled(model))
    finally:
        generators.restore(states)
        world.end()
        torch.clear_autocast_cache()
    return watch


def refuse_scripted(model: nn.Module) -> None:
    """Raise `ValueError` if the network contains a scripted module, whose calls cannot be watched."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"the module {name!r}" if name else "the network"
            raise ValueError(  # noqa: TRY004  (a module, but scripted)
                f"{what} is scripted, so the order of its layers cannot be watched: give the network before it was "
                "scripted"
            )


def reached(loss: Tensor) -> tuple[set[int], bool]:
    """Return the ids of the leaves that a loss depends on, and whether reentrant checkpointing hides further leaves."""
    found: set[int] = set()
    reentrant = False
    pending = [loss.grad_fn]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node is not None:
            if hasattr(node, "variable"):  # AccumulateGrad: a leaf
                found.add(id(node.variable))
            elif type(node).__name__ == "CheckpointFunctionBackward":
                reentrant = True
            for source, _ in node.next_functions:
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
    return found, reentrant


def owners(model: nn.Module) -> dict[int, str]:
    """Return the module that holds each parameter or buffer, by the tensor's id; for a tied one, the first module."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None:
                found.setdefault(id(tensor), _layer(name))
    return found


def _layer(name: str) -> str:
    """Return the layer's name: modules that torch.nn.utils.parametrize adds belong to their layer."""
    return re.split(r"(?:^|\.)parametrizations\b", name)[0]


_NORM = re.compile(r"Norm(\dd)?(Act(\dd)?)?$")


def _is_norm(module: nn.Module) -> bool:
    return any(_NORM.search(kind.__name__) for kind in type(module).__mro__)


# --- Groups -----------------------------------------------------------------------------------------------------------


def check_spec(model: nn.Module, spec: GroupSpec) -> None:
    """Raise `ValueError` or `TypeError` if `groups=` does not fit the network."""
    if isinstance(spec, str):
        if spec != "layer":
            raise ValueError(f"groups={spec!r}: give 'layer', a number of groups, or lists of module names")
        return
    if isinstance(spec, bool) or not isinstance(spec, int | Sequence):
        raise TypeError(f"groups={spec!r}: give 'layer', a number of groups, or lists of module names")
    if isinstance(spec, int):
        if spec < 1:
            raise ValueError(f"groups={spec}: give at least 1")
        return
    if not spec:
        raise ValueError("groups=[]: name at least one module")
    known = {name for name, _ in chain(model.named_modules(), model.named_parameters(remove_duplicate=False))}
    for entry in _entries(spec):
        if not entry:
            raise ValueError("groups: one of the lists names no module")
        for name in entry:
            if not isinstance(name, str):
                raise TypeError(f"groups: {name!r} is no module name")
            if name not in known:
                near = ", ".join(name for name, _ in model.named_children()) or "none"
                raise ValueError(f"groups: the network has no module {name!r}; its modules are {near}")


def _entries(spec: Sequence[str | Sequence[str]]) -> list[list[str]]:
    return [[entry] if isinstance(entry, str) else list(entry) for entry in spec]


class _Layer(NamedTuple):
    """One or several parametric layers: their modules in forward order, and their trained parameters."""

    modules: list[str]
    parameters: list[nn.Parameter]


class Groups(NamedTuple):
    """The groups of a network, as seen in one forward.

    Attributes:
        groups: In the order of their updates.
        home: The index of each module's group.
        unused: Names of trainable parameters that the forward does not use; they belong to no group.
    """

    groups: list[Group]
    home: dict[str, int]
    unused: list[str]


def group_layers(
    model: nn.Module, trainable: Sequence[nn.Parameter], order: Sequence[str], spec: GroupSpec, macs: dict[str, int]
) -> Groups:
    """Group a network's trainable parameters.

    A parametric layer is a module that directly holds parameters. A normalisation layer, or a module that holds only
    buffers, belongs to the parametric layer before it in forward order, or else to the first.

    Args:
        model: The network.
        trainable: The parameters to update.
        order: The modules that a forward uses, in order of first use.
        spec: The argument `groups` of `Backforward`; its lists may name parameters too.
        macs: Multiply-accumulates per module; needed if `spec` is a number.

    Raises:
        ValueError: There are more groups than layers, or a parameter belongs to no group or to two.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    owner = owners(model)
    used = set(order)
    heads = {owner[id(p)] for p in model.parameters()}
    heads = {name for name in heads if not _is_norm(model.get_submodule(name))}
    layers: list[list[str]] = [[]]  # modules before the first parametric layer belong to it
    for name in order:
        if name in heads and heads.intersection(layers[-1]):
            layers.append([])
        layers[-1].append(name)
    of_owner: dict[str, list[nn.Parameter]] = {}
    for p in trainable:
        of_owner.setdefault(owner[id(p)], []).append(p)
    place = {id(p): i for i, p in enumerate(trainable)}
    members = [
        _Layer(layer, sorted((p for name in layer for p in of_owner.get(name, ())), key=lambda p: place[id(p)]))
        for layer in layers
    ]
    members = [layer for layer in members if layer.parameters]
    if isinstance(spec, int):
        most = len(heads.intersection(of_owner)) or 1
        if spec > max(most, len(members)):
            raise ValueError(f"groups={spec}: the network has {most} layers to update")
        members = _near_equal(members, min(spec, len(members)), macs)
    elif not isinstance(spec, str):
        members = _explicit(model, members, trainable, spec, owner)

    if isinstance(spec, int | str):
        titles = [[name for name in layer.modules if name in heads] or layer.modules for layer in members]
    else:
        titles = [entry for entry, layer in zip(_entries(spec), members, strict=True) if layer.parameters]
        members = [layer for layer in members if layer.parameters]
    groups = []
    for title, layer in zip(titles, members, strict=True):
        first, last = (name or type(model).__name__ for name in (title[0], title[-1]))
        groups.append(Group(first if len(title) == 1 else f"{first}..{last}", tuple(layer.parameters)))
    home: dict[str, int] = {}
    for k, layer in enumerate(members):
        for name in layer.modules:
            home.setdefault(name, k)
    unused = [names[id(p)] for p in trainable if owner[id(p)] not in used]
    return Groups(groups, home, unused)


def _near_equal(layers: list[_Layer], count: int, macs: dict[str, int]) -> list[_Layer]:
    """Join neighbouring layers into `count` groups: minimise the cost of the largest, then the sum of squares."""
    total = [0, *accumulate(sum(macs.get(name, 0) for name in layer.modules) for layer in layers)]
    # best[j]: (cost of the largest group, sum of squared costs, cuts) for the first j layers
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [0])}
    for _ in range(count):
        best = {
            j: min(
                (max(dearest, price), squares + price**2, [*cuts, j])
                for i, (dearest, squares, cuts) in best.items()
                if i < j
                for price in [total[j] - total[i]]
            )
            for j in range(min(best) + 1, len(layers) + 1)
        }
    return [
        _Layer(
            [m for layer in layers[i:j] for m in layer.modules], [p for layer in layers[i:j] for p in layer.parameters]
        )
        for i, j in pairwise(best[len(layers)][2])
    ]


def _explicit(
    model: nn.Module,
    layers: list[_Layer],
    trainable: Sequence[nn.Parameter],
    spec: Sequence[str | Sequence[str]],
    owner: dict[int, str],
) -> list[_Layer]:
    """Assign each parameter to the group that names it, and unnamed norms to their layer's group."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    name_of = {id(p): name for name, p in model.named_parameters()}
    named: dict[int, int] = {}
    for k, entry in enumerate(_entries(spec)):
        for name in entry:
            for p in [parameters[name]] if name in parameters else model.get_submodule(name).parameters():
                if named.setdefault(id(p), k) != k:
                    raise ValueError(f"groups: {name_of[id(p)]} is named by two groups")
    groups = [_Layer([], []) for _ in _entries(spec)]
    for layer in layers:
        home = next((named[id(p)] for p in layer.parameters if id(p) in named), None)
        for module in layer.modules:
            own = [p for p in layer.parameters if owner[id(p)] == module]
            follows = not own or _is_norm(model.get_submodule(module))
            place = {id(p): named.get(id(p), home if follows else None) for p in own} or {0: home}
            missing = [name_of[id(p)] for p in own if place[id(p)] is None]
            if missing:
                raise ValueError(f"groups: no group names {', '.join(missing)}; name or freeze it")
            for k in dict.fromkeys(k for k in place.values() if k is not None):
                groups[k].modules.append(module)
                groups[k].parameters.extend(p for p in own if place[id(p)] == k)
    held = {named[id(p)] for p in trainable if id(p) in named}
    for k, entry in enumerate(_entries(spec)):
        if k not in held:
            raise ValueError(f"groups: {', '.join(entry)} holds no parameter to update")
    return groups
