"""The tape: the calls of torch in one batch's forwards, with their results.

A `Recording` intercepts every call of torch in a forward. A call returns its earlier result if its arguments are those
of an earlier pass and the result depends neither on the last update nor on this pass's group. Every other call runs.
Nothing is predicted: if the forward takes another path, all calls run. Tensors of unknown origin depend on everything.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import MethodWrapperType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backforward.batch import Batch, equal_states, storage_of, tensors_in
from backforward.calls import (
    ATOMS,
    ESCAPE,
    GRAPH,
    GROUP_NORMS,
    PLAIN,
    QUIET,
    READERS,
    RESHAPES,
    SHAPE,
    TENSORS,
    can_keep,
    kind_of,
    outs,
    version,
    with_gradient,
)
from backforward.groups import Group, Order

_MARK = "_backforward_tape"
EVERY = -1  # the set of all groups

_kinds: dict[Any, int] = {}
_autocast = torch._C._is_any_autocast_enabled


def _casts(tensors: Sequence[Tensor]) -> list[Any]:
    """Return the autocast settings on the devices of some tensors."""
    devices = {t.device.type for t in tensors} or {"cpu"}
    return [(d, torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d)) for d in sorted(devices)]


class Redo(BaseException):
    """Raised when this pass needs a value that no longer exists: run it again in full."""


class _Mark(NamedTuple):
    """What the tape knows of a tensor: the parameters it depends on (`deps`, as bits), its memory and its value.

    `token` identifies the batch, `serial` this value.
    """

    token: object
    deps: int
    storage: int
    serial: object
    requires_grad: bool
    owner: str | None = None


_new_mark = tuple.__new__  # takes half the time of calling the class


class _Entry:
    """One call of torch: its function, arguments (`key`, `read`) and result; `before`, `after` are generator states.

    `deps` are the parameters that the result depends on, `born` is the pass in which the call ran, and `kept` tells
    whether `out` may be returned again. `effects` are outside tensors that it changed, with their new values; `until`
    is the index of the last call that changes its result in place.
    """

    __slots__ = ("__dict__", "born", "deps", "func", "kept", "key", "marks", "out", "read", "versions")

    effects: Sequence[tuple[Tensor, Tensor]] = ()  # rarely set, so class attributes: they cost no time per entry
    before: list[Tensor] | None = None
    after: list[Tensor] | None = None
    until = -1

    def __init__(self, func: Any, key: list[Any], deps: int, read: list[_Mark], born: int) -> None:
        self.func, self.key, self.deps, self.read, self.born = func, key, deps, read, born
        self.out: Any = None
        self.marks: list[_Mark] = []
        self.versions: Sequence[int] = ()
        self.kept = False


class Recording(TorchFunctionMode):
    """Intercepts the calls of torch in a forward, for one batch."""

    def __init__(self, batch: Batch, guess: int, brackets: bool) -> None:
        super().__init__()
        self.token = object()
        self.entries: list[_Entry] = []
        self.order = Order(batch.network.owner, batch.network.parameters)
        self.hits = self.runs = 0
        self.brackets = brackets  # whether to check for random draws around each call
        self.broken = ""  # why the tape cannot be used in this batch
        self._world = batch.world
        self._chance = batch.chance
        self._draws = bool(batch.start)
        self._strangers: dict[int, tuple[Any, int]] = {}
        self._bits: dict[int, int] = {}
        self._known: dict[int, _Mark] = {}
        self._leaves: list[Tensor] = []
        self._params: set[int] = set()  # storages of trained weights
        self.outside: set[int] = set()  # storages of the `World`'s tensors
        self.besides: list[Tensor] = []  # inputs of group norms, whose gradients must be taken too
        owner = self.order.owner
        for i, p in enumerate(batch.trained):
            self._bits[id(p)] = 1 << i
            self._params.add(self._leaf(p, 1 << i, owner.get(id(p))))
        for tensor in batch.world.tensors:
            self.outside.add(self._leaf(tensor, 0, owner.get(id(tensor))))
        for tensor in tensors_in(batch.parts):
            self._leaf(tensor, 0, None)
        for p in batch.network.parameters:
            self._leaf(p, 0, owner.get(id(p)))
        self._trained = batch.trained
        self._versions = [p._version for p in batch.trained]
        self._pass = 0
        self._mask = EVERY
        self._bit = guess
        self.begin(EVERY, guess)

    def _leaf(self, tensor: Tensor, deps: int, owner: str | None) -> int:
        mark = self._known.get(id(tensor))
        if mark is None:
            self._leaves.append(tensor)
            mark = _Mark(self.token, deps, storage_of(tensor), object(), tensor.requires_grad, owner)
            self._known[id(tensor)] = mark
        return mark.storage

    def bits(self, group: Group) -> int:
        """Return a group's parameters as a set of bits."""
        return sum({self._bits[id(p)] for p in group.parameters})

    def begin(self, mask: int, bit: int) -> None:
        """Begin a pass.

        Args:
            mask: The parameters that changed since the last pass, and those of `bit`.
            bit: The parameters whose gradient is needed; they change after this pass.
        """
        for i, (p, known) in enumerate(zip(self._trained, self._versions, strict=True)):
            if p._version != known:
                mask |= 1 << i
                self._versions[i] = p._version
        self._mask, self._bit = mask, bit
        self._i = 0
        self._new: list[_Entry] = []
        self._moved: dict[int, int] = {}  # storage -> further parameters that its current value depends on
        self._pending: dict[int, list[tuple[Tensor, Tensor]]] = {}  # storage -> changes not yet made
        self._open: dict[int, int] = {}  # storage -> index up to which every call on it must return its earlier result
        self.hits = self.runs = 0
        self._state = self._chance.of_torch() if self._draws and self.brackets else None

    # --- One call ----------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__self__ if type(func) is MethodWrapperType else func
        kind = _kinds.get(name)
        if kind is None:
            kind = _kinds[name] = kind_of(func, name)
        if kind:
            if kind <= PLAIN and not self._pass and args and type(args[0]) is nn.Parameter:
                self.order.look(id(args[0]))
            if kind == SHAPE:
                return func(*args, **kwargs) if kwargs else func(*args)
            return self._aside(kind, func, args, kwargs)
        i = self._i
        self._i = i + 1
        key: list[Any] = []
        tensors: list[Tensor] = []
        marks: list[_Mark] = []
        clear = self._scan(args, key, tensors, marks)
        if _autocast():
            key.append(_casts(tensors))
        if kwargs:
            key.append(tuple(kwargs))
            clear &= self._scan(kwargs.values(), key, tensors, marks)
        entries = self.entries
        if i < len(entries):
            e = entries[i]
            if e.func == name:
                if e.kept and not e.deps & self._mask and clear and key == e.key and (not e.after or self._drew(e)):
                    return self._hit(e, i)
            else:
                self._cut_short(i)
        return self._run(func, name, args, kwargs, i, key, tensors, marks, clear)

    def _hit(self, e: _Entry, i: int) -> Any:
        self.hits += 1
        if e.until > i:
            for mark in e.marks:
                self._open[mark.storage] = max(e.until, self._open.get(mark.storage, -1))
        for change in e.effects:
            self._pending.setdefault(storage_of(change[0]), []).append(change)
        return list(e.out) if type(e.out) is list else e.out

    def _drew(self, e: _Entry) -> bool:
        """Advance the generators as the call did; return False if they are not where the call found them."""
        assert e.before is not None and e.after is not None
        if not equal_states(self._chance.of_torch(), e.before):
            return False
        self._chance.restore_torch(e.after)
        self._state = e.after
        return True

    def _scan(self, values: Any, key: list[Any], tensors: list[Tensor], marks: list[_Mark]) -> bool:
        """Append the arguments' keys, tensors and marks; return False if an argument's type is unknown."""
        clear = True
        for value in values:
            kind = type(value)
            if kind in TENSORS:
                mark = value.__dict__.get(_MARK)
                if mark is None or mark.token is not self.token:
                    mark = self._known.get(id(value)) or self._stranger(value)
                elif mark.requires_grad != value.requires_grad:
                    mark = mark._replace(deps=EVERY)  # an autograd.Function returned it as its own: history unknown
                key.append(mark.serial)
                tensors.append(value)
                marks.append(mark)
            elif kind in ATOMS:
                key.append(kind)
                key.append(value if value or kind is not float else repr(value))  # 0.0 == -0.0, but they differ
            elif kind is tuple or kind is list:
                key.append(kind)
                key.append(len(value))
                clear &= self._scan(value, key, tensors, marks)
            elif kind is slice:
                key.append(kind)
                clear &= self._scan((value.start, value.stop, value.step), key, tensors, marks)
            elif kind is dict:
                key.append(tuple(value))
                clear &= self._scan(value.values(), key, tensors, marks)
            else:
                clear = False
                if isinstance(value, Tensor):
                    tensors.append(value)
                    marks.append(self._known.get(id(value)) or self._stranger(value))
        return clear

    def _stranger(self, tensor: Tensor) -> _Mark:
        """Mark a tensor whose origin is unknown: it depends on everything, unless it existed before this pass."""
        ref, seen = self._strangers.get(id(tensor), (None, 0))
        if ref is not None and ref() is tensor and seen < self._pass and not tensor.requires_grad:
            self._leaf(tensor, 0, None)
            return self._known[id(tensor)]
        if ref is None or ref() is not tensor:
            self._strangers[id(tensor)] = (weakref.ref(tensor), self._pass)
        return _Mark(self.token, EVERY, storage_of(tensor), object(), tensor.requires_grad)

    def _run(  # noqa: PLR0912, PLR0915  (every call runs through here: splitting it costs time)
        self,
        func: Any,
        name: Any,
        args: Any,
        kwargs: Any,
        i: int,
        key: list[Any],
        tensors: list[Tensor],
        marks: list[_Mark],
        clear: bool,
    ) -> Any:
        self.runs += 1
        deps = 0 if clear else EVERY
        for read in marks:
            deps |= read.deps
        if self._moved or self._pending or self._open:
            for read in marks:
                deps |= self._moved.get(read.storage, 0)
                if read.storage in self._pending:
                    self._flush(read.storage)
                if self._open.get(read.storage, -1) >= i:
                    self._redo()
        try:
            before = [t._version for t in tensors]
        except RuntimeError:  # an inference tensor has no version
            before = [version(t) for t in tensors]
            deps, clear = EVERY, False
        if name in GROUP_NORMS:
            args = with_gradient(args, tensors, self.besides)
        out = func(*args, **kwargs) if kwargs else func(*args)
        found = [out] if type(out) is Tensor else outs(out)
        e = _Entry(name, key, deps, marks, self._pass)
        if self._state is not None and name not in QUIET:
            state = self._chance.of_torch()
            if not equal_states(state, self._state):
                e.before, e.after = self._state, state
                self._state = state
        e.kept = clear and found is not None and can_keep()
        if not found and i < len(self.entries) and self.entries[i].key != key:
            self._cut_short(i)  # for example torch.set_grad_enabled(value) with another value
        if i < len(self.entries):
            self.entries[i] = e
        else:
            self.entries.append(e)
        if found is None:  # the result contains an unknown type, such as a subclass of Tensor
            return out
        if not self._pass and found:
            for read in marks:
                if read.owner is not None:
                    self.order.use(read.owner)
        changed = []
        for j, t in enumerate(tensors):
            if version(t) != before[j] if not clear else t._version != before[j]:
                changed.append(j)
            elif self.outside and marks[j].storage in self.outside and name not in READERS:
                changed.append(j)  # F.batch_norm changes its statistics without new versions
        if not found and not changed:
            e.kept = False  # the call changes a setting of torch
        for t in found:
            mark: _Mark | None = self._known.get(id(t))
            if mark is None:
                mark = t.__dict__.get(_MARK)
                if mark is None or mark.token is not self.token or not any(t is a for a in tensors):
                    mark = _new_mark(_Mark, (self.token, deps, storage_of(t), object(), t.requires_grad, None))
                    t.__dict__[_MARK] = mark
            if mark.storage < 0 or t.is_inference():
                e.kept = False
            e.marks.append(mark)
        for j in changed:
            self._changed(tensors[j], marks[j], e, i)
        if isinstance(func, MethodWrapperType) and func.__name__ == "__set__":  # x.data = y
            self._replaced(tensors[0], deps)
            e.kept = False
        if e.kept and not e.deps & self._bit:
            e.out = out
            e.versions = [version(t) for t in found]
            self._new.append(e)
        else:
            e.kept = False
        return out

    def _aside(self, kind: int, func: Any, args: Any, kwargs: Any) -> Any:
        """Handle a call that makes no tensor, or that reaches a tensor's memory or graph."""
        if kind == GRAPH:
            if self.hits:
                self._redo()
            self.broken = self.broken or f"the forward looks at its own graph ({getattr(func, '__name__', func)})"
        elif self._pending or self._open or kind == ESCAPE:
            tensors: list[Tensor] = []
            marks: list[_Mark] = []
            self._scan(args, [], tensors, marks)
            for tensor, mark in zip(tensors, marks, strict=True):
                if mark.storage in self._pending:
                    self._flush(mark.storage)
                if self._open.get(mark.storage, -1) >= self._i:
                    self._redo()
                if kind == ESCAPE:
                    self._escaped(tensor, mark)
        return func(*args, **kwargs) if kwargs else func(*args)

    # --- Changes in place --------------------------------------------------------------------------------------------

    def _changed(self, tensor: Tensor, mark: _Mark, e: _Entry, i: int) -> None:
        """Handle a call that changed a tensor in place: its views and everything read from it depend on the change."""
        storage = mark.storage
        if storage in self.outside and storage not in self._params:
            self._moved[storage] = self._moved.get(storage, 0) | e.deps
            if e.kept and not e.deps & self._bit:
                e.effects = [*e.effects, (tensor, tensor.detach().clone())]
            if id(tensor) in self._known:
                self._world.suspects.add(id(tensor))
            else:
                self._world.unseen = True  # x.data counts versions separately from x
            return
        touching = self._touching(storage, i)
        deps = e.deps
        alone = storage in self._params or (tensor.requires_grad and not torch.is_grad_enabled())
        made = False
        for en in touching:
            deps |= en.deps
            if en is not e:
                made = made or any(m.storage == storage for m in en.marks)
                alone = alone or (en.kept and en.born != self._pass)
        reshapes = getattr(e.func, "__name__", "") in RESHAPES or any(type(k) is tuple and "out" in k for k in e.key)
        if alone or not made or reshapes:
            deps = EVERY
        for en in [*touching, e]:
            en.deps = deps
            en.until = i
            if en.out is not None:
                en.versions = [version(t) for t in outs(en.out) or ()]
        self._moved[storage] = self._moved.get(storage, 0) | deps
        if tensor.__dict__.get(_MARK) is not None:
            now = _Mark(self.token, deps, storage, mark.serial, tensor.requires_grad)
            tensor.__dict__[_MARK] = now
            e.marks = [now if m.serial is mark.serial else m for m in e.marks]

    def _touching(self, storage: int, i: int) -> list[_Entry]:
        """Return the calls that made or read this memory, back to the call that allocated it."""
        found = []
        for en in reversed(self.entries[: i + 1]):
            reads = any(m.storage == storage for m in en.read)
            makes = any(m.storage == storage for m in en.marks)
            if reads or makes:
                found.append(en)
            if makes and not reads:
                break
        return found

    def _escaped(self, tensor: Tensor, mark: _Mark) -> None:
        """Handle access to a tensor's memory: changes are invisible from now on."""
        for en in self._touching(mark.storage, len(self.entries)):
            en.deps = EVERY
        self._moved[mark.storage] = EVERY
        if mark.storage in self.outside:
            self._world.unseen = True

    def _replaced(self, tensor: Tensor, deps: int) -> None:
        """Handle `tensor.data = other` and other assigned attributes."""
        mark = self._known.get(id(tensor))
        storage = storage_of(tensor)
        if mark is None:
            for en in self.entries:
                en.deps = EVERY
        else:
            if mark.storage in self._params:
                deps = EVERY
            if mark.storage in self.outside:
                self.outside.add(storage)
                self._world.unseen = True
            self._known[id(tensor)] = mark._replace(storage=storage)
        self._moved[storage] = self._moved.get(storage, 0) | deps

    def _flush(self, storage: int) -> None:
        """Make the changes in place of the calls that returned earlier results."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for tensor, value in self._pending.pop(storage):
                try:
                    tensor.copy_(value)
                except RuntimeError:  # an expanded tensor, only suspected of a change
                    if not torch.equal(tensor, value):
                        raise

    def _cut_short(self, i: int) -> None:
        """Drop the recorded calls from `i` on: the forward takes another path."""
        if any(until >= i for until in self._open.values()):
            self._redo()
        del self.entries[i:]

    def _redo(self) -> None:
        self.broken = self.broken or "it changes values in place in a way that differs from pass to pass"
        raise Redo

    # --- The end of a pass -------------------------------------------------------------------------------------------

    def sound(self) -> bool:
        """Make pending changes and return whether the forward's result can be used."""
        if any(until >= self._i for until in self._open.values()):
            return False
        for storage in list(self._pending):
            self._flush(storage)
        return not (self.broken and self.hits)

    def end(self) -> None:
        """End the pass, after its gradients are taken: detach the results that are kept."""
        del self.entries[self._i :]
        cut: dict[int, Tensor] = {}
        for e in self._new:
            found = outs(e.out) or []
            adopted = any(
                t.requires_grad != m.requires_grad or (t.grad_fn is not None and _MARK not in t.__dict__)
                for t, m in zip(found, e.marks, strict=True)
            )
            if e.deps & self._bit or adopted or [t._version for t in found] != e.versions:
                e.kept, e.out = False, None
            else:
                e.out = _cut(e.out, cut)
        self._new = []
        self._pass += 1


def _cut(value: Any, cut: dict[int, Tensor]) -> Any:
    """Detach a result but keep `requires_grad`, since some kernels differ by that flag."""
    if isinstance(value, Tensor):
        if value.grad_fn is None:
            return value
        if id(value) not in cut:
            new = value.detach().requires_grad_()
            new.__dict__[_MARK] = value.__dict__[_MARK]
            cut[id(value)] = new
        return cut[id(value)]
    if isinstance(value, tuple | list):
        parts = [_cut(item, cut) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
