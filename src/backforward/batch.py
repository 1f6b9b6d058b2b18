"""The state that all passes of a batch share: random generators, buffers and attributes.

A batch behaves as one function of its weights. `Generators` makes every pass draw the same random numbers. `World`
tracks what a forward may change besides its result: buffers, untrained weights and module attributes. Each module's
state changes once per batch, in the pass of the module's own group.
"""

from __future__ import annotations

import random
import re
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]


class Inputs(NamedTuple):
    """The arguments of a network's forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, x: Any) -> Inputs:
        """Treat a tuple as positional arguments, a dict with string keys as keyword arguments, anything else as one."""
        if isinstance(x, dict) and all(isinstance(key, str) for key in x):
            return cls((), dict(x))
        return cls(x if isinstance(x, tuple) and not hasattr(x, "_fields") else (x,), {})

    def given_to(self, model: nn.Module, *, eager: bool) -> Any:
        """Return the network's output. With `eager`, modules compiled by `torch.compile` run uncompiled."""
        if not eager:
            return model(*self.args, **self.kwargs)
        with torch.compiler.set_stance("force_eager"):
            return model(*self.args, **self.kwargs)


class Part(NamedTuple):
    """A micro-batch: inputs and target."""

    inputs: Inputs
    target: Any


def split(x: Any, y: Any, count: int) -> list[Part]:
    """Split a batch into `count` micro-batches of equal size along the first dimension of every tensor."""
    if count == 1:
        return [Part(Inputs.of(x), y)]
    sizes = set()
    for leaf in _leaves((x, y)):
        if isinstance(leaf, Tensor):
            sizes.add(len(leaf) if leaf.dim() else 0)
        elif leaf is not None and not isinstance(leaf, bool):
            raise ValueError(f"micro_batches={count}: cannot split a {type(leaf).__name__}; give tensors")
    size = max(sizes, default=0)
    if len(sizes) != 1 or not size or size % count:
        shown = ", ".join(map(str, sorted(sizes))) or "none"
        raise ValueError(
            f"micro_batches={count}: give tensors with one first dimension that is a multiple of {count}, not {shown}"
        )
    one = size // count
    found = []
    for start in range(0, size, one):
        part, target = _map(lambda tensor, start=start: tensor[start : start + one], (x, y))  # type: ignore[misc]
        found.append(Part(Inputs.of(part), target))
    return found


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def is_compiled(model: nn.Module) -> bool:
    """Return whether `torch.compile` has compiled the network or one of its modules."""
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())


def storage_of(tensor: Tensor) -> int:
    """Return an id for a tensor's memory, or for the tensor itself if it has no plain memory (a sparse one)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested tuples, lists and dicts."""
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))


def detached(value: Any) -> Any:
    """Detach every tensor in nested tuples, lists and dicts; their classes are kept."""
    return _map(Tensor.detach, value)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:  # noqa: PLR0911  (one return per type)
    """Apply `change` to every tensor in nested tuples, lists and dicts; return the same object if nothing changes."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        items = {key: _map(change, item) for key, item in value.items()}
        if all(items[key] is item for key, item in value.items()):
            return value
        if type(value) is dict:
            return items
        try:  # transformers' ModelOutput takes its fields as keywords
            return type(value)(**items)
        except TypeError:
            return type(value)(items)
    if isinstance(value, list | tuple):
        parts = [_map(change, item) for item in value]
        if all(map(is_, parts, value)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


# --- Randomness -------------------------------------------------------------------------------------------------------


class Generators:
    """The default generators of torch (CPU and `devices`), `random` and numpy, plus the network's own (`private`).

    `private` may contain `torch.Generator`, `random.Random` and numpy generators.
    """

    def __init__(self, devices: Iterable[torch.device], private: Sequence[Any] = ()) -> None:
        self._get: list[Callable[[], Any]] = [torch.default_generator.get_state]
        self._set: list[Callable[[Any], Any]] = [torch.default_generator.set_state]
        for device in {device for device in devices if device.type not in {"cpu", "meta"}}:
            backend = torch.get_device_module(device)
            which = {} if device.type == "mps" else {"device": device}  # MPS has a single device and takes no argument
            self._get.append(partial(backend.get_rng_state, **which))
            self._set.append(partial(backend.set_rng_state, **which))
        self._of_torch = len(self._get)
        self._add(random.getstate, random.setstate)
        numpy = sys.modules.get("numpy.random")
        if numpy is not None:
            self._add(partial(numpy.get_state, legacy=False), numpy.set_state)
        for one in private:
            if isinstance(one, torch.Generator):
                self._add(one.get_state, one.set_state)
            elif isinstance(one, random.Random):
                self._add(one.getstate, one.setstate)
            elif hasattr(one, "bit_generator"):
                self._add(partial(getattr, one.bit_generator, "state"), partial(setattr, one.bit_generator, "state"))
            else:
                self._add(partial(one.get_state, legacy=False), one.set_state)

    def _add(self, get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
        self._get.append(get)
        self._set.append(put)

    @classmethod
    @cache
    def none(cls) -> Generators:
        """Return the empty set of generators, for a network that draws nothing."""
        generators = cls(())
        generators._get, generators._set, generators._of_torch = [], [], 0
        return generators

    def save(self) -> list[Any]:
        """Return the current states, for `restore`."""
        return [get() for get in self._get]

    def restore(self, states: list[Any]) -> None:
        """Set the generators to saved states."""
        for put, state in zip(self._set, states, strict=True):
            put(state)

    def of_torch(self) -> list[Tensor]:
        """Return the current states of torch's generators."""
        return [get() for get in self._get[: self._of_torch]]

    def restore_torch(self, states: list[Tensor]) -> None:
        """Set torch's generators to saved states."""
        for put, state in zip(self._set, states, strict=False):
            put(state)


def equal_states(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Return whether two lists of generator states are equal."""
    return all(map(torch.equal, one, other))


# Names of classes in torch.nn and in this library whose forward may draw. The tests run every torch.nn class.
_DRAWS = re.compile(r"drop|noisy|rrelu|fractional|attention|transformer|lstm|gru|rnn", re.IGNORECASE)


def changes_only_buffers(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> bool:
    """Return whether every module comes from torch.nn or this library and has no hooks, so only buffers can change."""
    shared = nn.modules.module
    if shared._global_forward_hooks or shared._global_forward_pre_hooks or shared._global_backward_hooks:
        return False
    for module in model.modules() if modules is None else modules:
        if not _is_ours(type(module)):
            return False
        own = vars(module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if "forward" in own or own.get("max_norm") is not None:
            return False
        if "activation" in own and not _known_activation(own["activation"]):
            return False
    return True


# Modules of this library whose classes change only their buffers and draw nothing.
_QUIET_HOMES = {f"backforward.{name}" for name in ("data_norm", "normprop")}
_QUIET_HOMES |= {f"backforward.models.{name}" for name in ("blocks", "mlp", "nin", "residual")}


_ours: dict[type, bool] = {}


def _is_ours(kind: type) -> bool:
    if kind not in _ours:
        _ours[kind] = _is_of_quiet_home(kind)
    return _ours[kind]


def _is_of_quiet_home(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.") or kind.__module__ in _QUIET_HOMES


def _known_activation(activation: Any) -> bool:
    """Return whether a module's activation is a module or a function of torch or this library."""
    if not callable(activation) or isinstance(activation, nn.Module):
        return True
    return (getattr(activation, "__module__", None) or "torch").split(".")[0] in {"torch", "backforward"}


def may_draw(called: Any) -> bool:
    """Return whether a module or function may draw random numbers; True if that is unknown.

    An unnecessary True only costs saving and restoring the generators' states.
    """
    if isinstance(called, nn.Module):
        return not changes_only_buffers(called) or any(
            _DRAWS.search(type(module).__name__) for module in called.modules()
        )
    home = getattr(called, "__module__", None)
    known = home is None or home.split(".")[0] in {"torch", "_operator", "math", "builtins", "backforward"}
    return not known or _DRAWS.search(getattr(called, "__name__", "")) is not None


# --- What a forward changes besides its result ------------------------------------------------------------------------

_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
_FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


class _Holder(NamedTuple):
    """A container of attributes, the index of the module it belongs to, and its contents at the start of the batch."""

    owner: int
    container: Any
    contents: Any


class World:
    """A network's state other than trained weights, as it was when the batch began.

    It covers buffers, untrained weights, all modules' attributes, and the tensors, containers and generators in those
    attributes. The update rule owns the trained weights, given by their ids. `quiet` tells whether a forward changes
    nothing but buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: set[int],
        modules: dict[str, nn.Module] | None = None,
        quiet: bool | None = None,
    ) -> None:
        self.modules = dict(model.named_modules()) if modules is None else modules
        self.private: list[Any] = []
        self._holders: list[_Holder] = []
        self.tensors: list[Tensor] = []
        self._owners: list[int] = []
        seen: set[int] = set()
        quiet = changes_only_buffers(model) if quiet is None else quiet
        self._find_weights = lambda: {storage_of(p) for p in model.parameters() if id(p) in trained}
        self._weights: set[int] | None = None
        for index, module in enumerate(self.modules.values()):
            own = vars(module)
            if quiet:
                for tensor in own["_buffers"].values():
                    self._add_tensor(tensor, index, seen)
                continue
            self._holders.append(_Holder(index, own, dict(own)))
            for key in ("_parameters", "_buffers", "_modules", *_FORWARD_HOOKS):  # the first forward may install hooks
                self._holders.append(_Holder(index, own[key], dict(own[key])))
            for tensor in own["_buffers"].values():
                self._add_tensor(tensor, index, seen)
            for tensor in own["_parameters"].values():
                if tensor is not None and id(tensor) not in trained:
                    self._add_tensor(tensor, index, seen)
            for key in own.keys() - _EVERY_MODULE - {"_parameters", "_buffers", "_modules"}:
                self._add(own[key], index, seen, trained)
        self._values = [tensor.detach().clone() for tensor in self.tensors]
        self._versions = [_version(tensor) for tensor in self.tensors]
        self._kept: dict[int, tuple[list[_Holder], list[tuple[Tensor, Tensor]]]] = {}
        self.suspects: set[int] = set()  # ids of tensors that may have changed although their version has not
        self.unseen = False  # whether any tensor may have changed without a new version

    def _add_tensor(self, tensor: Tensor | None, owner: int, seen: set[int]) -> None:
        if tensor is None or id(tensor) in seen or nn.parameter.is_lazy(tensor):
            return
        if self._weights is None:
            self._weights = self._find_weights()
        if storage_of(tensor) not in self._weights:  # an attribute may share the memory of a trained weight
            seen.add(id(tensor))
            self.tensors.append(tensor)
            self._owners.append(owner)

    def _add(self, value: Any, owner: int, seen: set[int], trained: set[int]) -> None:
        kind = type(value)
        if kind in (int, float, bool, str, type(None)):
            return
        if isinstance(value, Tensor):
            if id(value) not in trained:
                self._add_tensor(value, owner, seen)
        elif kind in _CONTAINERS:
            if id(value) not in seen:
                seen.add(id(value))
                self._holders.append(_Holder(owner, value, _contents(value)))
                for item in value.values() if isinstance(value, dict) else value:
                    self._add(item, owner, seen, trained)
        elif kind is tuple:
            for item in value:
                self._add(item, owner, seen, trained)
        elif _is_object(kind):
            if id(value) not in seen:
                seen.add(id(value))
                own = vars(value)
                self._holders.append(_Holder(owner, own, dict(own)))
                for item in own.values():
                    self._add(item, owner, seen, trained)
        elif _is_generator(value) and not any(value is one for one in self.private):
            self.private.append(value)

    def _may_have_moved(self, i: int) -> bool:
        tensor = self.tensors[i]
        return self.unseen or id(tensor) in self.suspects or _version(tensor) != self._versions[i]

    def restore(self) -> None:
        """Set everything back to the start of the batch."""
        for holder in self._holders:
            if not _same(holder.container, holder.contents):
                _fill(holder.container, holder.contents)
        moved = [i for i in range(len(self.tensors)) if self._may_have_moved(i)]
        if moved:
            _copy([self.tensors[i] for i in moved], [self._values[i] for i in moved])
            for i in moved:
                self._versions[i] = _version(self.tensors[i])

    def keep(self, modules: Iterable[int]) -> None:
        """Save the current state of some modules, given by index; `end` restores it."""
        wanted = set(modules)
        for index in wanted:
            self._kept[index] = ([], [])
        for owner, container, contents in self._holders:
            if owner in wanted and not _same(container, contents):
                self._kept[owner][0].append(_Holder(owner, container, _contents(container)))
        for i, tensor in enumerate(self.tensors):
            if self._owners[i] in wanted and self._may_have_moved(i):
                self._kept[self._owners[i]][1].append((tensor, tensor.detach().clone()))

    def end(self) -> None:
        """Leave each module in the state that its own group's pass gave it, also if the batch was interrupted."""
        self.restore()
        for holders, tensors in self._kept.values():
            for _, container, contents in holders:
                _fill(container, contents)
            if tensors:
                _copy([tensor for tensor, _ in tensors], [value for _, value in tensors])
        self._kept = {}


_LIBRARIES = ("torch", "builtins", "numpy", "random", "lightning", "pytorch_lightning", "transformers", "timm", "types")


def _is_object(kind: type) -> bool:
    """Return whether instances are ordinary user objects with attributes."""
    ordinary = kind.__module__.split(".")[0] not in _LIBRARIES and kind.__dictoffset__ != 0
    return ordinary and not issubclass(kind, type | nn.Module | random.Random)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _copy(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        if tensor.shape == value.shape and tensor.device == value.device:
            tensor.copy_(value)
        else:
            tensor.data = value.clone()


def _is_generator(value: Any) -> bool:
    return isinstance(value, torch.Generator | random.Random) or _is_numpy_generator(value)


def _is_numpy_generator(value: Any) -> bool:
    numpy = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, numpy.Generator | numpy.RandomState)


def _contents(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _same(container: Any, contents: Any) -> bool:
    """Return whether a container has the same objects as before."""
    if len(container) != len(contents):
        return False
    if isinstance(container, dict):
        return all(map(is_, container.values(), contents.values())) and container.keys() == contents.keys()
    return all(map(is_, container, contents))


def _fill(container: Any, contents: Any) -> None:
    container.clear()
    if isinstance(container, dict | set):
        container.update(contents)
    else:
        container.extend(contents)


class Batch(NamedTuple):
    """What all passes of a batch share."""

    model: nn.Module
    loss_fn: LossFunction
    parts: Sequence[Part]  # one, or the micro-batches
    world: World
    chance: Generators
    start: list[Any]
    trained: Sequence[nn.Parameter]
    eager: bool
    network: Any  # what `network.Network` knows

    def forward(self, part: int = 0) -> tuple[Any, Tensor]:
        """Return the output and the loss of a micro-batch, divided by the number of micro-batches."""
        inputs, target = self.parts[part]
        output = inputs.given_to(self.model, eager=self.eager)
        loss = self.loss_fn(output, target)
        return output, loss if len(self.parts) == 1 else loss / len(self.parts)

    def again(self, part: int = 0) -> tuple[Any, Tensor]:
        """Repeat a micro-batch's forward in full, with all micro-batches before it, from the start of the batch."""
        self.world.restore()
        self.chance.restore(self.start)
        for earlier in range(part):
            self.forward(earlier)
        return self.forward(part)
