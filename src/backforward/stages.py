"""A network seen as layers that update in turn, and cut into stages that can be replayed one by one.

`survey` watches one forward of any network and notes in which order its layers are used; `group_layers` makes groups of
them. `cut` takes the network's graph (torch.fx) apart: a *stage* is a run of consecutive operations that depend on the
same groups. In the pass of a group only those stages run whose weights or inputs have changed since, or through which
the group's gradient flows; the outputs of all others are final and are kept. Skip connections, branches, tied weights
and several inputs need no special care: they are edges of the graph.

`Generators` and `Statistics` hold what makes the passes of a batch one function: every pass draws the same random
numbers, and running statistics move once.

Depends on torch and the standard library only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

GroupSpec: TypeAlias = str | int | Sequence[str | Sequence[str]]


class Group(NamedTuple):
    """Parameters that one sub-step updates together.

    Attributes:
        name: The layer's qualified name in the network, or `first..last` for several layers.
        parameters: The trainable parameters, in the order in which the network registers them.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]


class UntraceableError(Exception):
    """The network cannot be cut into stages; the message says why."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


# ---------------------------------------------------------------------------------------------------------------------
# One batch, one function: the same draws in every pass, running statistics that move once
# ---------------------------------------------------------------------------------------------------------------------


class Generators:
    """The default random generators of the host and of every device that the network lives on."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._get: list[Callable[[], Tensor]] = [torch.default_generator.get_state]
        self._set: list[Callable[[Tensor], Any]] = [torch.default_generator.set_state]
        for device in {device for device in devices if device.type not in {"cpu", "meta"}}:
            backend = torch.get_device_module(device)
            which = {} if device.type == "mps" else {"device": device}  # there is one such device at most
            self._get.append(partial(backend.get_rng_state, **which))
            self._set.append(partial(backend.set_rng_state, **which))

    @classmethod
    def of(cls, model: nn.Module) -> Generators:
        """Those that a network may draw from."""
        return cls(tensor.device for tensor in chain(model.parameters(), model.buffers()))

    @classmethod
    def none(cls) -> Generators:
        """Those of a network that draws nothing."""
        generators = cls(())
        generators._get, generators._set = [], []
        return generators

    def save(self) -> list[Tensor]:
        """The present states, to be handed to `restore`."""
        return [get() for get in self._get]

    def restore(self, states: list[Tensor]) -> None:
        """Go back to saved states."""
        for put, state in zip(self._set, states, strict=True):
            put(state)


class Statistics:
    """Running statistics (BatchNorm's, and any other buffer that a training forward moves) move in one pass per batch.

    BatchNorm in training mode does not read its running statistics, so tracking is switched off in the other passes.
    Other buffers start every pass from their values at the start of the batch; what their own pass made of them
    becomes their value when the batch ends.

    Args:
        model: The network.
        moving: Names of modules (other than BatchNorm) and of their buffers that a forward changes.
        pass_of: Index of the pass in which the statistics of the named module move; 0 where it is missing.
    """

    def __init__(self, model: nn.Module, moving: Iterable[tuple[str, str]], pass_of: dict[str, int]) -> None:
        self._norms: dict[int, list[nn.Module]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                self._norms.setdefault(pass_of.get(name, 0), []).append(module)
        self._buffers = [
            (model.get_submodule(module)._buffers, name, pass_of.get(module, 0)) for module, name in moving
        ]
        self._start: list[Tensor] = []
        self._moved: list[Tensor] = []

    def begin(self) -> None:
        """The batch begins: hold everything still."""
        for index in self._norms:
            self._track(index, False)
        self._start = [_buffer(buffers, name).clone() for buffers, name, _ in self._buffers]
        self._moved = list(self._start)

    def enter(self, index: int) -> None:
        """Pass `index` begins: let go of the statistics that move in it."""
        self._track(index, True)

    def leave(self, index: int) -> None:
        """Pass `index` ends: hold everything still again."""
        self._track(index, False)
        for i, (buffers, name, moves_in) in enumerate(self._buffers):
            if moves_in == index:
                self._moved[i] = _buffer(buffers, name).detach().clone()
        self._write(self._start)

    def end(self) -> None:
        """The batch ends, or was broken off: the moved values become the values."""
        self._write(self._moved)
        self._start, self._moved = [], []
        for index in self._norms:
            self._track(index, True)

    def _track(self, index: int, on: bool) -> None:
        for norm in self._norms.get(index, ()):
            norm.__dict__["track_running_stats"] = on  # past nn.Module.__setattr__, which takes 20 times as long

    def _write(self, values: list[Tensor]) -> None:
        if values:
            with torch.no_grad():
                for (buffers, name, _), value in zip(self._buffers, values, strict=True):
                    _buffer(buffers, name).copy_(value)


def _buffer(buffers: dict[str, Tensor | None], name: str) -> Tensor:
    buffer = buffers[name]
    assert buffer is not None, name
    return buffer


# ---------------------------------------------------------------------------------------------------------------------
# Which layers there are, in forward order
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Survey:
    """What one forward of a network shows.

    Attributes:
        order: Names of the modules that directly hold parameters or buffers, in the order of their first use.
        macs: Multiply-accumulates of the forward, by the module whose parameters took part in them (else by the module
            used before). All 0 when they were not counted.
        moving: (module, buffer) for each buffer that the forward changed, BatchNorm's aside.
        reached: Ids of the leaf tensors that the output depends on.
        output: What the forward returned.
    """

    order: list[str] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    moving: list[tuple[str, str]] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)
    output: Any = None


class _Watch(TorchFunctionMode):
    """Notes each parameter and buffer as it first enters a torch function, however the network came to use it."""

    def __init__(self, owner: dict[int, str], survey: Survey, counter: FlopCounterMode | None) -> None:
        super().__init__()
        self._owner, self._survey, self._counter = owner, survey, counter
        self._last = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops() if self._counter else 0
        result = func(*args, **(kwargs or {}))
        if next(tensors_in(result), None) is None:
            return result  # a shape, a device, a flag: looking at a weight is not using it
        used = [self._owner[id(t)] for t in tensors_in([args, kwargs]) if id(t) in self._owner]
        for name in used:
            if name not in self._survey.macs:
                self._survey.order.append(name)
                self._survey.macs[name] = 0
        if used:
            self._last = used[0]
        if self._counter and self._survey.order:
            self._survey.macs[self._last] += (self._counter.get_total_flops() - before) // 2
        return result


@contextmanager
def _untouched(model: nn.Module) -> Iterator[Callable[[], list[tuple[str, str]]]]:
    """Run the network for information only: generators and buffers are put back at the end.

    Yields:
        A function that names the (module, buffer) pairs that have changed so far.
    """
    buffers = [
        (name, key, module, value, value._version, value.clone())
        for name, module in model.named_modules()
        for key, value in module._buffers.items()
        if value is not None
    ]
    generators = Generators.of(model)
    states, chance = generators.save(), random.getstate()
    try:
        yield lambda: [
            (name, key)
            for name, key, module, value, version, _ in buffers
            if module._buffers[key] is not value or value._version != version
        ]
    finally:
        generators.restore(states)
        random.setstate(chance)
        with torch.no_grad():
            for _, key, module, value, _, copy in buffers:
                module._buffers[key] = value
                value.copy_(copy)
        torch.clear_autocast_cache()


def survey(model: nn.Module, inputs: Sequence[Any], *, count: bool = False) -> Survey:
    """Run one forward and note what it uses. Leaves generators and buffers as they were.

    Args:
        model: Any network.
        inputs: The positional arguments of its forward.
        count: Whether to count multiply-accumulates.
    """
    found = Survey()
    with _untouched(model) as changed, ExitStack() as stack:
        counter = stack.enter_context(FlopCounterMode(display=False)) if count else None
        stack.enter_context(_Watch(_owners(model), found, counter))
        found.output = model(*inputs)
        found.moving = [
            (name, key)
            for name, key in changed()
            if not isinstance(model.get_submodule(name), nn.modules.batchnorm._BatchNorm)
        ]
    pending = [tensor.grad_fn for tensor in tensors_in(found.output)]
    seen = set(pending)
    while pending:
        step = pending.pop()
        if step is not None:
            if hasattr(step, "variable"):  # AccumulateGrad: a leaf
                found.reached.add(id(step.variable))
            more = {source for source, _ in step.next_functions} - seen
            seen |= more
            pending.extend(more)
    return found


def _owners(model: nn.Module) -> dict[int, str]:
    """The module that holds each parameter or buffer, by the tensor's id; of a tied one, the first."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None:
                owners.setdefault(id(tensor), _layer(name))
    return owners


def _layer(name: str) -> str:
    """What torch.nn.utils.parametrize holds for a layer belongs to that layer."""
    return re.split(r"(?:^|\.)parametrizations\b", name)[0]


_NORM = re.compile(r"Norm(\dd)?$")


def _is_norm(module: nn.Module) -> bool:
    return any(_NORM.search(kind.__name__) for kind in type(module).__mro__)


# ---------------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------------


def check_spec(model: nn.Module, spec: GroupSpec) -> None:
    """Refuse a `groups=` that can make no sense for this network.

    Raises:
        ValueError: It is 0, negative, empty, or names a module or parameter that does not exist, or one twice.
        TypeError: It is neither "layer", nor an integer, nor lists of names.
    """
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
    """A parametric layer, or several: the modules that belong to it in forward order, and what of it is trained."""

    modules: list[str]
    parameters: list[nn.Parameter]


def group_layers(
    model: nn.Module, trainable: Sequence[nn.Parameter], found: Survey, spec: GroupSpec
) -> tuple[list[Group], dict[str, int], list[str]]:
    """Make groups of a network's trainable parameters.

    A parametric layer is a module that directly holds parameters; a normalisation layer, or a module that holds buffers
    only, belongs to the parametric layer before it in forward order, else to the first.

    Args:
        model: The network.
        trainable: The parameters that are to be updated.
        found: What `survey` saw (with multiply-accumulates counted, if `spec` is an integer).
        spec: "layer", the number of groups of near-equal cost, or lists of module (or parameter) names, one list a
            group, in the order in which the groups are to be updated.

    Returns:
        The groups in the order of their updates; for each module of a group the group's index; the names of parameters
        that the forward does not use, which belong to no group.

    Raises:
        ValueError: More groups than layers, a parameter in no group or in two, a use of parameters that cannot be seen.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    owner = _owners(model)
    unseen = [p for p in trainable if owner[id(p)] not in found.macs]
    unused = [names[id(p)] for p in unseen if id(p) not in found.reached]
    hidden = [names[id(p)] for p in unseen if id(p) in found.reached]
    if hidden:
        raise ValueError(f"the forward uses {', '.join(hidden)} out of sight, so its layers have no order")

    heads = {owner[id(p)] for p in model.parameters()}
    heads = {name for name in heads if not _is_norm(model.get_submodule(name))}
    layers: list[list[str]] = [[]]  # what comes before the first parametric layer belongs to it
    for name in found.order:
        if name in heads and heads.intersection(layers[-1]):
            layers.append([])
        layers[-1].append(name)
    members = [_Layer(layer, [p for p in trainable if owner[id(p)] in layer]) for layer in layers]
    members = [layer for layer in members if layer.parameters]
    if not members:
        raise ValueError("the network's forward uses no parameter that the optimizer holds")
    if isinstance(spec, int):
        members = _near_equal(members, spec, found.macs)
    elif not isinstance(spec, str):
        members = _explicit(model, members, spec, owner)

    if isinstance(spec, int | str):
        titles = [[name for name in layer.modules if name in heads] or layer.modules for layer in members]
    else:
        titles = _entries(spec)
    groups = []
    for title, layer in zip(titles, members, strict=True):
        first, last = (name or type(model).__name__ for name in (title[0], title[-1]))
        groups.append(Group(first if len(title) == 1 else f"{first}..{last}", tuple(layer.parameters)))
    group_of: dict[str, int] = {}
    for k, layer in enumerate(members):
        for name in layer.modules:
            group_of.setdefault(name, k)
    return groups, group_of, unused


def _near_equal(layers: list[_Layer], count: int, macs: dict[str, int]) -> list[_Layer]:
    """Join neighbouring layers into `count` groups, the dearest as cheap as can be and the others as even as can be."""
    if count > len(layers):
        raise ValueError(f"groups={count}: the network has {len(layers)} layers to update")
    total = [0, *accumulate(sum(macs[name] for name in layer.modules) for layer in layers)]
    # best[j]: (price of the dearest group, sum of squared prices, cuts) of the first j layers in so many groups
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
    model: nn.Module, layers: list[_Layer], spec: Sequence[str | Sequence[str]], owner: dict[int, str]
) -> list[_Layer]:
    """Put each parameter into the group that names it, and unnamed norms into the group of their layer."""
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
    for group, entry in zip(groups, _entries(spec), strict=True):
        if not group.parameters:
            raise ValueError(f"groups: {', '.join(entry)} holds no parameter to update")
    return groups


class Settings:
    """What a plan for a network takes for granted; `changed` says whether it still holds.

    Args:
        model: The network.
        entered: Modules whose forward was traced: plain attributes (a flag, a probability) were read then, once.
    """

    def __init__(self, model: nn.Module, entered: Sequence[nn.Module] = ()) -> None:
        self._entered = entered
        self._modules = list(model.modules())
        self._training = [module.training for module in self._modules]
        self._parameters = list(model.parameters())
        self._trainable = [p.requires_grad for p in self._parameters]
        self._device = self._parameters[0].device
        self._plain = [
            (vars(module), key, value)
            for module in entered
            for key, value in vars(module).items()
            if key != "training" and isinstance(value, bool | int | float | str | None)
        ]
        self._buffers = [(module._buffers, key, value) for module in entered for key, value in module._buffers.items()]

    def changed(self) -> bool:
        """Whether a mode, a frozen parameter, the device, an attribute or a hook is no longer what it was."""
        return (
            [module.training for module in self._modules] != self._training
            or [p.requires_grad for p in self._parameters] != self._trainable
            or self._parameters[0].device != self._device
            or any(
                attributes.get(key) is not value and attributes.get(key) != value
                for attributes, key, value in self._plain
            )
            or any(buffers.get(key) is not value for buffers, key, value in self._buffers)
            or any(module._forward_hooks or module._forward_pre_hooks for module in self._entered)
        )


# ---------------------------------------------------------------------------------------------------------------------
# The graph
# ---------------------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Traces a forward with `inputs` positional arguments.

    A submodule whose own forward cannot be traced, or that carries hooks, stays whole.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__(param_shapes_constant=True)
        self._inputs = inputs
        self.entered: list[nn.Module] = []

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        self.entered.append(self.root)
        proxies = [self.create_proxy("placeholder", f"input_{i}", (), {}) for i in range(self._inputs)]
        return root_fn, [self.root, *proxies]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return bool(m._forward_hooks or m._forward_pre_hooks) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before = len(self.graph.nodes)
        entered = len(self.entered)
        try:
            if not self.is_leaf_module(m, self.path_of_module(m)):
                self.entered.append(m)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            del self.entered[entered:]
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


class Stage(NamedTuple):
    """Consecutive operations that depend on the same groups.

    Attributes:
        run: Maps the values in slots `inputs` to those in slots `outputs`.
        inputs: Slots read.
        outputs: Slots written.
        draws: Whether it may draw random numbers.
    """

    run: Callable[..., tuple[Any, ...]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    draws: bool


class Step(NamedTuple):
    """One stage of a pass, and the slots whose values nobody needs after it."""

    number: int
    stage: Stage
    spent: tuple[int, ...]


class Program(NamedTuple):
    """What a pass runs.

    Attributes:
        steps: The stages, in forward order.
        draws: Whether any of them may draw random numbers.
        kept: Slots that this pass writes for later ones.
    """

    steps: list[Step]
    draws: bool
    kept: tuple[int, ...]


class Cut(NamedTuple):
    """A network as a program of stages for each pass.

    Attributes:
        slots: Number of values that travel between stages; the network's inputs are the first.
        output: Slot of the network's output.
        programs: One for each group, and one for a joint pass of all groups.
        entered: The modules whose own forward was traced: what it did in Python is fixed by now.
    """

    slots: int
    output: int
    programs: list[Program]
    entered: list[nn.Module]


def cut(
    model: nn.Module, inputs: Sequence[Any], groups: Sequence[Group], statistics: dict[str, int], expected: Any
) -> Cut:
    """Cut a network into stages, one program per group and one for a joint pass of all groups.

    Args:
        model: The network.
        inputs: The inputs of one batch.
        groups: The groups in the order of their updates.
        statistics: The pass in which the statistics of the named module move.
        expected: The network's output for these inputs: the cut network must return the same.

    Raises:
        UntraceableError: torch.fx cannot trace the network, or what it traced is another function.
    """
    with _constants_taken_off(model):
        graph, ties, entered = _trace(model, inputs, expected)
        return _assemble(model, graph, groups, statistics, ties, entered)


class Chain(NamedTuple):
    """A network that is linear layers in a row, with nothing but fixed functions between them.

    Attributes:
        before: From the input to the first layer.
        layers: The linear layers.
        after: For each the function from its output to the next one (from the last to the network's output).
        entered: See `Cut`.
    """

    before: Callable[[Tensor], Tensor]
    layers: list[nn.Linear]
    after: list[Callable[[Tensor], Tensor]]
    entered: list[nn.Module]


def linear_chain(model: nn.Module, inputs: Sequence[Any], expected: Any) -> Chain:
    """See a network as a `Chain`; arguments and errors as for `cut`, and an error where it is no such chain."""
    with _constants_taken_off(model):
        graph, ties, entered = _trace(model, inputs, expected)
        runs: list[list[fx.Node]] = [[]]
        linears: list[nn.Linear] = []
        # Buffers that a forward reads (an input normalisation's, say) are constants of the function that reads them.
        for previous, node in pairwise(node for node in graph.nodes if node.op != "get_attr"):
            called = _callee(model, node)
            if _values(node) != [previous]:
                raise UntraceableError(f"its operations are no chain (at {node.name})")
            if isinstance(called, nn.Module) and any(True for _ in chain(called.parameters(), called.buffers())):
                if type(called) is not nn.Linear or called in linears:
                    raise UntraceableError(f"{node.target} is no linear layer used once")
                linears.append(called)
                runs.append([])
            elif may_draw(called):
                raise UntraceableError(f"{node.name} may draw random numbers")
            elif node.op != "output":
                runs[-1].append(node)
        if not linears:
            raise UntraceableError("it has no linear layer")
        before, *after = [_function(model, run, in_place=bool(ties)) for run in runs]
    return Chain(before, linears, after, entered)


def identity(value: Tensor) -> Tensor:
    """What stands between two layers with nothing between them."""
    return value


def _function(model: nn.Module, run: Sequence[fx.Node], *, in_place: bool) -> Callable[[Tensor], Tensor]:
    """Compile consecutive nodes of a chain; `identity` where there are none, `torch.relu` where that is all.

    The function leaves its argument alone, also where the nodes may change it in place.
    """
    called = [_callee(model, node) for node in run]
    if not called:
        return identity
    if len(called) == 1 and (type(called[0]) is nn.ReLU or called[0] in {torch.relu, F.relu, "relu"}):
        return torch.relu
    (source,) = _values(run[0])
    stage = _stage(model, run, {source: 0, run[-1]: 1})
    return lambda value: stage.run(value.clone() if in_place else value)[0]


def _values(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that are computed."""
    return [source for source in node.all_input_nodes if source.op != "get_attr"]


def _trace(
    model: nn.Module, inputs: Sequence[Any], expected: Any
) -> tuple[fx.Graph, list[set[fx.Node]], list[nn.Module]]:
    """The network's graph, checked against the network; what it changes in place; whose forward was traced."""
    if model._forward_hooks or model._forward_pre_hooks:
        raise UntraceableError("the network itself carries forward hooks")
    tracer = _Tracer(len(inputs))
    generators = Generators.of(model)
    states, chance = generators.save(), random.getstate()
    try:
        graph = tracer.trace(model)
        if random.getstate() != chance or not all(map(torch.equal, generators.save(), states)):
            raise UntraceableError("its forward decides by chance, outside the graph")
        _single_output(graph)
        return graph, _ties(model, graph, inputs, expected), tracer.entered
    except UntraceableError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UntraceableError(f"torch.fx cannot trace it: {reason}") from error
    finally:
        generators.restore(states)
        random.setstate(chance)


@contextmanager
def _constants_taken_off(model: nn.Module) -> Iterator[None]:
    """Take off what the tracer hangs on the network: tensors that its forward makes from nothing."""
    known = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - known:
            delattr(model, name)


def _pack(value: Any) -> Any:
    return value


def _single_output(graph: fx.Graph) -> None:
    """Let the output be one node, also where the network returns a nest of values."""
    output = graph.output_node()
    if not isinstance(output.args[0], fx.Node):
        with graph.inserting_before(output):
            output.args = (graph.call_function(_pack, (output.args[0],)),)


def _ties(model: nn.Module, graph: fx.Graph, inputs: Sequence[Any], expected: Any) -> list[set[fx.Node]]:
    """Run the graph once, check its output, and find values that are changed in place.

    Returns:
        Sets of nodes that share memory which one of them changes, with those that read it before: nodes of a set have
        to run in the same passes.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    homes: dict[int, list[fx.Node]] = {}  # storage -> the nodes whose values live there
    last_change: dict[int, int] = {}

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            before = [(t, t._version) for source in n.all_input_nodes for t in tensors_in(self.env[source])]
            value = super().run_node(n)
            for tensor, version in before:
                if tensor._version != version:
                    last_change[tensor.untyped_storage().data_ptr()] = order[n]
            for tensor in tensors_in(value):
                homes.setdefault(tensor.untyped_storage().data_ptr(), []).append(n)
            return value

    with _untouched(model):  # all values are kept, so that no two share an address by accident
        result = Observer(fx.GraphModule(model, graph), garbage_collect_values=False).run(*inputs)
    got, want = list(tensors_in(result)), list(tensors_in(expected))
    if len(got) != len(want) or not all(map(_alike, got, want)):
        raise UntraceableError("its forward is no fixed graph: the traced one returns another output")
    ties = []
    for storage, changed_at in last_change.items():
        tie = {n for n in homes[storage] if n.op != "output"}
        if any(node.op == "placeholder" for node in tie):
            raise UntraceableError("its forward changes its input in place")
        attributes = {node for node in tie if node.op == "get_attr"}
        if attributes:  # a buffer that moves; its value must not matter to this forward
            if len(tie - attributes) > 1 or len({user for node in attributes for user in node.users}) > 1:
                raise UntraceableError("its forward reads a buffer that it changes in place")
            continue
        readers = {user for node in tie for user in node.users if order[user] < changed_at}
        ties.append(tie | readers)
    return ties


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding: kernels may differ from run to run on some devices."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-4, equal_nan=True)


def _assemble(
    model: nn.Module,
    graph: fx.Graph,
    groups: Sequence[Group],
    statistics: dict[str, int],
    ties: list[set[fx.Node]],
    entered: list[nn.Module],
) -> Cut:
    depends = _dependencies(model, graph, groups, ties)
    output = graph.output_node().args[0]
    assert isinstance(output, fx.Node)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    body = [node for node in graph.nodes if node.op not in {"placeholder", "get_attr", "output"}]

    runs: list[list[fx.Node]] = []
    for node in body:
        if runs and depends[runs[-1][-1]] == depends[node]:
            runs[-1].append(node)
        else:
            runs.append([node])
    home = {node: i for i, run in enumerate(runs) for node in run}

    # A value that crosses the border of a stage gets a slot; attributes are fetched anew in each stage.
    crossing = [n for n in body if n is output or any(home.get(user) != home[n] for user in n.users)]
    slot = {node: i for i, node in enumerate([*placeholders, *dict.fromkeys([*crossing, output])])}
    stages = [_stage(model, run, slot) for run in runs]
    moves = [
        {statistics.get(name, 0) for n in run if n.op == "call_module" for name in _statistical(model, str(n.target))}
        for run in runs
    ]

    def runs_in(k: int) -> list[int]:
        """Stages of pass k: all in the first; later those that the last update or this gradient concerns."""
        concerned = -1 if k == len(groups) else 1 << k
        concerned |= 1 << (k - 1) if k else 0
        return [i for i, run in enumerate(runs) if not k or depends[run[0]] & concerned or k in moves[i]]

    order = [runs_in(k) for k in range(len(groups) + 1)]
    programs = [_program(mine, order[k + 1 :], stages, slot[output]) for k, mine in enumerate(order)]
    return Cut(len(slot), slot[output], programs, entered)


def _dependencies(
    model: nn.Module, graph: fx.Graph, groups: Sequence[Group], ties: list[set[fx.Node]]
) -> dict[fx.Node, int]:
    """For each node the groups that its value depends on, as a set of bits."""
    bit = {id(p): 1 << k for k, group in enumerate(groups) for p in group.parameters}

    def own(node: fx.Node) -> int:
        if node.op == "call_module":
            held: Iterable[Tensor] = model.get_submodule(str(node.target)).parameters()
        elif node.op == "get_attr":
            held = [t for t in [_attribute(model, str(node.target))] if isinstance(t, Tensor)]
        else:
            held = []
        mask = 0
        for tensor in held:
            mask |= bit.get(id(tensor), 0)
        return mask

    depends = {node: own(node) for node in graph.nodes}
    while True:
        before = dict(depends)
        for node in graph.nodes:
            for source in node.all_input_nodes:
                depends[node] |= depends[source]
        for tie in ties:
            mask = 0
            for node in tie:
                mask |= depends[node]
            depends.update(dict.fromkeys(tie, mask))
        if depends == before:
            return depends


def _attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _statistical(model: nn.Module, path: str) -> list[str]:
    """Names of the modules within the one at `path` that hold buffers."""
    module = model.get_submodule(path)
    return [f"{path}.{name}".rstrip(".") for name, m in module.named_modules() if m._buffers]


def _stage(model: nn.Module, run: Sequence[fx.Node], slot: dict[fx.Node, int]) -> Stage:
    """Compile consecutive nodes into a function of the values that they take from other stages."""
    inside = set(run)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    sources = dict.fromkeys(source for node in run for source in node.all_input_nodes if source not in inside)
    inputs = [source for source in sources if source.op != "get_attr"]
    for source in inputs:
        copies[source] = graph.placeholder(source.name)
    for source in sources:
        if source.op == "get_attr":
            copies[source] = graph.node_copy(source)
    for node in run:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    outputs = [node for node in run if node in slot]
    graph.output(tuple(copies[node] for node in outputs))
    return Stage(
        run=fx.GraphModule(model, graph).forward,
        inputs=tuple(slot[source] for source in inputs),
        outputs=tuple(slot[node] for node in outputs),
        draws=any(may_draw(_callee(model, node)) for node in run),
    )


def _program(mine: list[int], later: list[list[int]], stages: list[Stage], output: int) -> Program:
    """The program of a pass, from the numbers of its stages and of those of later passes."""
    needed: set[int] = set()  # slots that are read from here on before they are written again
    for number in reversed([number for program in later for number in program]):
        needed.difference_update(stages[number].outputs)
        needed.update(stages[number].inputs)
    kept = needed.intersection(slot for number in mine for slot in stages[number].outputs)
    needed.add(output)
    steps = []
    for number in reversed(mine):
        stage = stages[number]
        steps.append(Step(number, stage, tuple(sorted({*stage.inputs, *stage.outputs} - needed))))
        needed.difference_update(stage.outputs)
        needed.update(stage.inputs)
    return Program(steps[::-1], any(stages[number].draws for number in mine), tuple(sorted(kept)))


# ---------------------------------------------------------------------------------------------------------------------
# What may draw random numbers
# ---------------------------------------------------------------------------------------------------------------------

_RANDOM = re.compile(
    r"drop|rand|noisy|bernoulli|multinomial|poisson|gumbel|rrelu|fractional|attention|lstm|gru|rnn|^normal$"
    r"|(normal|uniform|exponential|cauchy|geometric)_$",
    re.IGNORECASE,
)
_QUIET_HOMES = {"torch", "_operator", "operator", "math", "builtins", "backforward"}


def may_draw(called: Any) -> bool:
    """Whether a module, a function or the name of a tensor method may draw random numbers.

    True where it cannot be known: the price is saving and restoring a generator's state, which cannot be part of a
    recorded step (see `capture`).
    """
    if isinstance(called, nn.Module):
        return any(
            _RANDOM.search(type(m).__name__) is not None
            or not type(m).__module__.startswith(("torch.nn.modules.", "backforward."))
            or bool(m._forward_hooks or m._forward_pre_hooks)
            or (callable(act := getattr(m, "activation", None)) and not isinstance(act, nn.Module) and may_draw(act))
            for m in called.modules()
        )
    if isinstance(called, str):
        return _RANDOM.search(called) is not None
    home = getattr(called, "__module__", None)
    known = home is None or home.split(".")[0] in _QUIET_HOMES or called is _pack
    return not known or _RANDOM.search(getattr(called, "__name__", "")) is not None


def _callee(model: nn.Module, node: fx.Node) -> Any:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else node.target
