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

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
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
            self._get.append(partial(backend.get_rng_state, device))
            self._set.append(partial(backend.set_rng_state, device=device))

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
        self._norms = [
            (module, pass_of.get(name, 0))
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        ]
        self._buffers = [
            (model.get_submodule(module)._buffers, name, pass_of.get(module, 0)) for module, name in moving
        ]
        self._start: list[Tensor] = []
        self._moved: list[Tensor] = []

    def begin(self) -> None:
        """The batch begins: hold everything still."""
        for norm, _ in self._norms:
            norm.__dict__["track_running_stats"] = False  # past nn.Module.__setattr__, which is 20 times slower
        self._start = [_buffer(buffers, name).clone() for buffers, name, _ in self._buffers]
        self._moved = list(self._start)

    def enter(self, index: int) -> None:
        """Pass `index` begins: let go of the statistics that move in it."""
        for norm, moves_in in self._norms:
            if moves_in == index:
                norm.__dict__["track_running_stats"] = True

    def leave(self, index: int) -> None:
        """Pass `index` ends: hold everything still again."""
        for norm, moves_in in self._norms:
            if moves_in == index:
                norm.__dict__["track_running_stats"] = False
        for i, (buffers, name, moves_in) in enumerate(self._buffers):
            if moves_in == index:
                self._moved[i] = _buffer(buffers, name).detach().clone()
        self._write(self._start)

    def end(self) -> None:
        """The batch ends, or was broken off: the moved values become the values."""
        self._write(self._moved)
        self._start, self._moved = [], []
        for norm, _ in self._norms:
            norm.__dict__["track_running_stats"] = True

    def _write(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for (buffers, name, _), value in zip(self._buffers, values, strict=True):
                _buffer(buffers, name).copy_(value)


def _buffer(buffers: dict[str, Tensor | None], name: str) -> Tensor:
    buffer = buffers[name]
    assert buffer is not None, name  # noqa: S101 - narrows the type: only buffers that hold a tensor can move
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
            used before). Empty when they were not counted.
        moving: (module, buffer) for each buffer that the forward changed, BatchNorm's aside.
        output: What the forward returned, detached.
    """

    order: list[str] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    moving: list[tuple[str, str]] = field(default_factory=list)
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
        self._last = used[0] if used else self._last
        if self._counter and self._last:
            self._survey.macs[self._last] += (self._counter.get_total_flops() - before) // 2
        return result


def survey(model: nn.Module, inputs: Sequence[Any], *, count: bool = False) -> Survey:
    """Run one forward and note what it uses. Leaves generators, buffers and gradients as they were.

    Args:
        model: Any network.
        inputs: The positional arguments of its forward.
        count: Whether to count multiply-accumulates.
    """
    found = Survey()
    buffers = [
        (name, key, module, value)
        for name, module in model.named_modules()
        for key, value in module._buffers.items()
        if value is not None
    ]
    before = [(value.clone(), value._version) for *_, value in buffers]
    generators = Generators(tensor.device for tensor in chain(model.parameters(), model.buffers()))
    states = generators.save()
    try:
        with torch.no_grad():
            if count:
                with FlopCounterMode(display=False) as counter, _Watch(_owners(model), found, counter):
                    found.output = model(*inputs)
            else:
                with _Watch(_owners(model), found, None):
                    found.output = model(*inputs)
    finally:
        generators.restore(states)
        for (name, key, module, value), (copy, version) in zip(buffers, before, strict=True):
            if module._buffers[key] is not value or value._version != version:
                if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                    found.moving.append((name, key))
                module._buffers[key] = value
                value.copy_(copy)
        torch.clear_autocast_cache()  # casts made here carry no gradient
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
        The groups in the order of their updates; for each module that holds buffers the index of its group; the names
        of parameters that are not used by the forward and belong to no group.

    Raises:
        ValueError: More groups than layers, a parameter named by no group or by two.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    owner = _owners(model)
    used = set(found.order)
    unused = [names[id(p)] for p in trainable if owner[id(p)] not in used]

    layers: list[list[str]] = [[]]  # [parametric layer, its norms...]; what comes before the first joins the first
    for name in found.order:
        module = model.get_submodule(name)
        parametric = any(True for p in module.parameters() if owner[id(p)] == name)
        if parametric and not _is_norm(module) and any(_holds(model, n, owner) for n in layers[-1]):
            layers.append([])
        layers[-1].append(name)

    members: list[tuple[list[str], list[nn.Parameter]]] = []
    for layer in layers:
        own = [p for p in trainable if owner[id(p)] in layer]
        if own:
            members.append((layer, own))
    if not members:
        raise ValueError("the optimizer holds no parameter that the network's forward uses")
    if isinstance(spec, int):
        members = _near_equal(members, spec, found.macs)
    elif not isinstance(spec, str):
        members = _explicit(model, members, spec, names, owner)

    def title(layer: list[str]) -> str:
        heads = [n for n in layer if _holds(model, n, owner)] or layer
        if isinstance(spec, str):
            return heads[0] or type(model).__name__
        return heads[0] if len(heads) == 1 else f"{heads[0]}..{heads[-1]}"

    groups = [Group(title(layer), tuple(own)) for layer, own in members]
    group_of = {name: index for index, (layer, _) in enumerate(members) for name in layer}
    return groups, group_of, unused


def _holds(model: nn.Module, name: str, owner: dict[int, str]) -> bool:
    """Whether the named module is a parametric layer."""
    module = model.get_submodule(name)
    return not _is_norm(module) and any(owner[id(p)] == name for p in module.parameters())


def _near_equal(
    members: list[tuple[list[str], list[nn.Parameter]]], count: int, macs: dict[str, int]
) -> list[tuple[list[str], list[nn.Parameter]]]:
    """Join neighbouring layers into `count` groups so that the dearest group is as cheap as can be."""
    if count > len(members):
        raise ValueError(f"groups={count}: the network has {len(members)} layers to update")
    costs = [sum(macs.get(name, 0) for name in layer) for layer, _ in members]
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[j]: (price of the dearest group, sum of squares to settle ties, cuts) for the first j layers
    best: list[tuple[float, float, list[int]]] = [(0, 0, [0])] + [(float("inf"), 0, [])] * len(costs)
    for _ in range(count):
        best = [(float("inf"), 0.0, list[int]())] + [
            min(
                (max(dearest, price), squares + price**2, [*cuts, j])
                for i in range(j)
                for dearest, squares, cuts in [best[i]]
                for price in [total[j] - total[i]]
            )
            for j in range(1, len(costs) + 1)
        ]
    joined = []
    for i, j in pairwise(best[-1][2]):
        part = members[i:j]
        joined.append(([n for layer, _ in part for n in layer], [p for _, own in part for p in own]))
    return joined


def _explicit(
    model: nn.Module,
    members: list[tuple[list[str], list[nn.Parameter]]],
    spec: Sequence[str | Sequence[str]],
    names: dict[int, str],
    owner: dict[int, str],
) -> list[tuple[list[str], list[nn.Parameter]]]:
    index: dict[int, int] = {}
    for i, entry in enumerate(_entries(spec)):
        for name in entry:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            inside = [parameters[name]] if name in parameters else list(model.get_submodule(name).parameters())
            for p in inside:
                if index.setdefault(id(p), i) != i:
                    raise ValueError(f"groups: {names[id(p)]} is named by two groups")
    result: list[tuple[list[str], list[nn.Parameter]]] = [([], []) for _ in _entries(spec)]
    missing = []
    for layer, own in members:
        home = next((index[id(p)] for p in own if id(p) in index), None)
        for p in own:
            at = index.get(id(p), home if _is_norm(model.get_submodule(owner[id(p)])) else None)
            if at is None:
                missing.append(names[id(p)])
            else:
                result[at][1].append(p)
        for name in layer:
            at = next((index[id(p)] for p in model.get_submodule(name).parameters() if id(p) in index), home)
            if at is not None:
                result[at][0].append(name)
    if missing:
        raise ValueError(f"groups: no group names {', '.join(missing)}; name or freeze them")
    for (_, own), entry in zip(result, _entries(spec), strict=True):
        if not own:
            raise ValueError(f"groups: {', '.join(entry)} holds no parameter to update")
    return result


class Settings:
    """What a plan for a network takes for granted; `changed` says whether it still holds.

    Args:
        model: The network.
        entered: Modules whose forward was traced: plain attributes (a flag, a probability) were read then, once.
    """

    def __init__(self, model: nn.Module, entered: Sequence[nn.Module] = ()) -> None:
        self._modules = list(model.modules())
        self._training = [module.training for module in self._modules]
        self._parameters = list(model.parameters())
        self._trainable = [p.requires_grad for p in self._parameters]
        self._plain = [
            (vars(module), key, value)
            for module in entered
            for key, value in vars(module).items()
            if key != "training" and isinstance(value, bool | int | float | str | None)
        ]
        self._buffers = [(module._buffers, key, value) for module in entered for key, value in module._buffers.items()]

    def changed(self) -> bool:
        """Whether a mode, a frozen parameter or an attribute is no longer what it was."""
        return (
            [module.training for module in self._modules] != self._training
            or [p.requires_grad for p in self._parameters] != self._trainable
            or any(attributes.get(key) != value for attributes, key, value in self._plain)
            or any(buffers.get(key) is not value for buffers, key, value in self._buffers)
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


@dataclass
class Cut:
    """A network as a program of stages for each pass.

    Attributes:
        slots: Number of values that travel between stages; the network's inputs are the first.
        programs: For each pass the stages to run, in forward order. The last one is the joint pass.
        draws: For each pass whether any of its stages may draw random numbers.
        output: Slot of the network's output.
        entered: The modules whose own forward was traced: what it did in Python is fixed by now.
    """

    slots: int
    programs: list[list[Step]]
    draws: list[bool]
    output: int
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
    tracer = _Tracer(len(inputs))
    states = torch.default_generator.get_state()
    known = set(vars(model))
    try:
        graph = tracer.trace(model)
        if not torch.equal(states, torch.default_generator.get_state()):
            raise UntraceableError("its forward draws random numbers that do not depend on its inputs")
        _single_output(graph)
        ties = _watch_graph(model, graph, inputs, expected)
        return _assemble(model, graph, groups, statistics, ties, tracer.entered)
    except UntraceableError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UntraceableError(f"torch.fx cannot trace it: {reason}") from error
    finally:
        torch.default_generator.set_state(states)
        for name in set(vars(model)) - known:  # constants that the tracer has hung on the network
            delattr(model, name)


def _pack(value: Any) -> Any:
    return value


def _single_output(graph: fx.Graph) -> None:
    """Let the output be one node, also where the network returns a nest of values."""
    output = graph.output_node()
    if not isinstance(output.args[0], fx.Node):
        with graph.inserting_before(output):
            output.args = (graph.call_function(_pack, (output.args[0],)),)


def _watch_graph(model: nn.Module, graph: fx.Graph, inputs: Sequence[Any], expected: Any) -> list[set[fx.Node]]:
    """Run the graph once, check its output, and find values that are changed in place.

    Returns:
        Sets of nodes that share memory which one of them changes: they have to run in the same passes.
    """
    interpreter = fx.Interpreter(fx.GraphModule(model, graph), garbage_collect_values=False)
    order = {node: i for i, node in enumerate(graph.nodes)}
    homes: dict[int, list[fx.Node]] = {}  # storage -> the nodes whose values live there
    last_change: dict[int, int] = {}
    env = interpreter.env
    arguments = iter(inputs)
    buffers = [(b, b.clone()) for b in model.buffers()]
    generators = Generators(tensor.device for tensor in chain(model.parameters(), model.buffers()))
    states = generators.save()
    result = None
    try:
        with torch.no_grad():
            for node in graph.nodes:
                if node.op == "placeholder":
                    env[node] = next(arguments)
                elif node.op == "output":
                    result = env[node.args[0]]
                    continue
                else:
                    reads = [(t, t._version) for n in node.all_input_nodes for t in tensors_in(env[n])]
                    env[node] = interpreter.run_node(node)
                    for tensor, version in reads:
                        if tensor._version != version:
                            last_change[tensor.untyped_storage().data_ptr()] = order[node]
                for tensor in tensors_in(env[node]):
                    homes.setdefault(tensor.untyped_storage().data_ptr(), []).append(node)
    finally:
        generators.restore(states)
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)
        torch.clear_autocast_cache()
    got, want = list(tensors_in(result)), list(tensors_in(expected))
    if len(got) != len(want) or not all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-4, equal_nan=True)
        for a, b in zip(got, want, strict=True)
    ):
        raise UntraceableError(
            "its forward is not a fixed graph of operations: the traced graph returns another output"
        )
    ties = []
    for storage, changed_at in last_change.items():
        tie = set(homes[storage])
        tie |= {user for node in homes[storage] for user in node.users if order[user] < changed_at}
        if any(node.op == "get_attr" for node in tie):
            if len(tie) > sum(node.op == "get_attr" for node in tie) + 1:
                raise UntraceableError("its forward reads a parameter or buffer that it changes in place")
            continue
        ties.append(tie)
    return ties


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
    assert isinstance(output, fx.Node)  # noqa: S101 - narrows the type: see _single_output
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
    programs = [
        [
            Step(i, stages[i], spent)
            for i, spent in zip(mine, _spent(mine, order[k + 1 :], stages, slot[output]), strict=True)
        ]
        for k, mine in enumerate(order)
    ]
    draws = [any(stages[i].draws for i in mine) for mine in order]
    return Cut(len(slot), programs, draws, slot[output], entered)


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
            if any(node.op == "placeholder" for node in tie):
                raise UntraceableError("its forward changes its input in place")
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


def _spent(mine: list[int], later: list[list[int]], stages: list[Stage], output: int) -> list[tuple[int, ...]]:
    """After each stage of a pass, the slots that neither the rest of the pass nor a later pass reads before writing."""
    needed: set[int] = set()
    for program in reversed(later):
        for i in reversed(program):
            needed.difference_update(stages[i].outputs)
            needed.update(stages[i].inputs)
    needed.add(output)
    spent: list[tuple[int, ...]] = []
    for i in reversed(mine):
        touched = {*stages[i].inputs, *stages[i].outputs}
        spent.append(tuple(sorted(touched - needed)))
        needed.difference_update(stages[i].outputs)
        needed.update(stages[i].inputs)
    return spent[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# What may draw random numbers
# ---------------------------------------------------------------------------------------------------------------------

_RANDOM = re.compile(
    r"drop|rand|bernoulli|multinomial|poisson|gumbel|rrelu|fractional|attention|lstm|gru|rnn|^normal$"
    r"|(normal|uniform|exponential|cauchy|geometric)_$",
    re.IGNORECASE,
)
_QUIET_HOMES = {"torch", "_operator", "operator", "math", "builtins"}


def may_draw(called: Any) -> bool:
    """Whether a module, a function or the name of a tensor method may draw random numbers.

    True where it cannot be known: the only price is saving and restoring a generator's state.
    """
    if isinstance(called, nn.Module):
        return any(
            _RANDOM.search(type(m).__name__) is not None or not type(m).__module__.startswith("torch.nn.modules")
            for m in called.modules()
        )
    if isinstance(called, str):
        return _RANDOM.search(called) is not None
    home = getattr(called, "__module__", None)
    known = home is None or home.split(".")[0] in _QUIET_HOMES or called is _pack
    return not known or _RANDOM.search(getattr(called, "__name__", "")) is not None


def _callee(model: nn.Module, node: fx.Node) -> Any:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else node.target


def takes_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer cannot step without a closure (LBFGS)."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
