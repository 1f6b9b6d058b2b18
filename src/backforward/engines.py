"""How the passes of a batch are computed: `Naive`, the definition, and `Tape`, which recomputes only what changed.

Both run the network's real forward in every pass; `tape` describes how a call of torch returns its earlier result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from backforward.batch import (
    Batch,
    Generators,
    LossFunction,
    Part,
    World,
    detached,
    equal_states,
    may_draw,
    tensors_in,
)
from backforward.groups import Group, Groups, Order, Survey, reached
from backforward.network import Network
from backforward.tape import EVERY, Recording, Redo

Arrange: TypeAlias = Callable[[Sequence[str]], Groups]

NO_GRADIENT = "the loss of this batch depends on no trainable parameter"


class Pass(NamedTuple):
    """One forward and backward: the gradient of each parameter of a group, and whether this pass ends the batch."""

    group: Group
    output: Any
    loss: Tensor
    gradients: Sequence[Tensor | None]
    last: bool


class _Sum:
    """The results of a pass: of the whole batch, or summed over micro-batches."""

    def __init__(self, several: bool) -> None:
        self._several = several
        self._outputs: list[Any] = []
        self._loss: Any = None
        self.gradients: Sequence[Tensor | None] = ()

    def add(self, output: Any, loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
        if not self._several:
            self._loss, self.gradients = loss, gradients
        elif not self._outputs:
            self._loss, self.gradients = loss.detach(), gradients
        else:
            self._loss = self._loss + loss.detach()
            pairs = zip(self.gradients, gradients, strict=True)
            self.gradients = [new if old is None else old if new is None else old + new for old, new in pairs]
        self._outputs.append(detached(output) if self._several else output)

    def of(self, group: Group, *, last: bool) -> Pass:
        return Pass(group, self._outputs if self._several else self._outputs[0], self._loss, self.gradients, last)


class Naive:
    """Runs the whole network in each pass: the definition, and the oracle for the other engines."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.reason = ""  # why passes of the last batch ran in full although the engine should have saved work
        # A function's name and module are fixed, so look once; a module may change.
        self._loss_draws = None if isinstance(loss_fn, nn.Module) else may_draw(loss_fn)
        self._by_backward = False  # reentrant checkpointing supports only loss.backward()

    def plain(self, network: Network, parts: Sequence[Part], group: Group) -> Generator[Pass, None, None]:
        """Run one ordinary forward and backward; raise `ValueError` if the loss depends on no parameter."""
        seen = _Sum(len(parts) > 1)
        for inputs, target in parts:
            output = self.model(*inputs.args, **inputs.kwargs)
            loss = self.loss_fn(output, target)
            loss = loss if len(parts) == 1 else loss / len(parts)
            if not network.quiet:  # the forward cannot be repeated here, so detect reentrant checkpointing beforehand
                self._by_backward = self._by_backward or reached(loss)[1]
            gradients = self._gradients(loss, group.parameters, group.parameters)
            if gradients is None:
                raise ValueError("reentrant checkpointing of this kind needs two forwards: give use_reentrant=False")
            seen.add(output, loss, gradients)
        if all(gradient is None for gradient in seen.gradients):
            raise ValueError(NO_GRADIENT)
        yield seen.of(group, last=True)

    def run(  # noqa: PLR0912, PLR0915  (one batch, from start to end)
        self,
        network: Network,
        parts: Sequence[Part],
        trained: Sequence[nn.Parameter],
        arrange: Arrange,
        joint: int = 0,
    ) -> Generator[Pass, None, None]:
        """Yield the passes of a batch in order, each at the current weights, which the caller updates in between.

        `arrange` makes groups from the layers in order of first use. `joint` is the number of passes over all groups at
        the end. Raises `ValueError` if the loss depends on no group or the network changes its input.
        """
        loss_draws = may_draw(self.loss_fn) if self._loss_draws is None else self._loss_draws
        draws = network.draws or loss_draws
        world = World(self.model, set(map(id, trained)), network.modules, network.quiet)
        devices = (tensor.device for tensor in chain(self.model.parameters(), self.model.buffers()))
        chance = Generators(devices, world.private) if draws else Generators.none()
        start = chance.save()
        given = list(tensors_in([part.inputs for part in parts]))
        versions = [tensor._version for tensor in given]
        batch = Batch(
            *(self.model, self.loss_fn, parts, world, chance, start, trained),
            *(network.compiled, network),
        )
        self._begin(batch)
        try:
            several = len(parts) > 1
            weights = [*map(id, trained)]
            constant = network.order is not None and not loss_draws
            seen = _Sum(several)
            order: list[str] = []
            for part in range(len(parts)):
                output, loss, watch = self._first(batch, part)
                if constant and network.leaves and network.leaves[0] == weights and loss.requires_grad:
                    leaves = network.leaves[1]
                else:
                    leaves, reentrant = reached(loss)
                    self._by_backward |= reentrant
                    network.leaves = (weights, leaves) if constant and loss.requires_grad else None
                if several or self._by_backward:  # take all gradients now, before the groups are known
                    seen.add(*self._taken(batch, part, output, loss, trained, trained))
                    leaves = {id(p) for p, g in zip(trained, seen.gradients, strict=True) if g is not None}
                order += watch.layers(leaves)
            at_once = dict(zip(map(id, trained), seen.gradients, strict=False))
            seed = torch.initial_seed()
            found = arrange(list(dict.fromkeys(order)))
            everything = [p for group in found.groups for p in group.parameters]
            _refuse_hidden(self.model, trained, leaves, found)
            active = [not leaves.isdisjoint(map(id, group.parameters)) for group in found.groups]
            groups = [group for group, on in zip(found.groups, active, strict=True) if on]
            if not groups:
                raise ValueError(NO_GRADIENT)
            home = _home(world, found.home, active)
            passes = groups + [Group("all", tuple(everything))] * joint
            self._arranged(batch, passes)
            for k, group in enumerate(passes):
                now = chance.save() if k else start
                if k:
                    world.restore()
                    chance.restore(start)
                    seen = _Sum(several)
                    for part in range(len(parts)):
                        output, loss = self._forward(batch, k, part)
                        seen.add(*self._taken(batch, part, output, loss, group.parameters, trained))
                    if draws and torch.initial_seed() != seed:
                        raise ValueError("the forward seeds torch with a random number: passes would draw differently")
                elif at_once:
                    seen.gradients = [at_once[id(p)] for p in group.parameters]
                else:
                    seen.add(*self._taken(batch, 0, output, loss, group.parameters, trained))
                if [tensor._version for tensor in given] != versions and len(passes) > 1:
                    raise ValueError("the network changes its input in place: a second pass would see another batch")
                self._passed(k)
                if k < len(groups) or not k:
                    world.keep(index for index, pass_ in enumerate(home) if pass_ == k)
                if k:
                    chance.restore(now)
                yield seen.of(group, last=k == len(passes) - 1)
                del seen, output, loss
                at_once = {}
        finally:
            self._end()
            world.end()

    def _begin(self, batch: Batch) -> None:
        batch.world.unseen = True  # restore every tensor, whether or not its version changed

    def _first(self, batch: Batch, part: int) -> tuple[Any, Tensor, Order]:
        """Run the first forward; return also the layers in order of first use."""
        with Survey(self.model) as watch:
            output, loss = batch.forward(part)
        return output, loss, watch.order

    def _arranged(self, batch: Batch, passes: Sequence[Group]) -> None:
        """Called once the batch's groups are known."""

    def _forward(self, batch: Batch, k: int, part: int) -> tuple[Any, Tensor]:
        """Run the forward of pass k > 0."""
        return batch.forward(part)

    def _passed(self, k: int) -> None:
        """Called after the gradients of pass k are taken."""

    def _end(self) -> None:
        """Called when the batch ends."""

    def _taken(
        self,
        batch: Batch,
        part: int,
        output: Any,
        loss: Tensor,
        parameters: Sequence[nn.Parameter],
        trained: Sequence[nn.Parameter],
    ) -> tuple[Any, Tensor, Sequence[Tensor | None]]:
        """Return the output, the loss and the gradient of each parameter."""
        gradients = self._gradients(loss, parameters, trained)
        if gradients is None:  # needs loss.backward() and so another forward
            output, loss = batch.again(part)
            gradients = self._gradients(loss, parameters, trained)
            assert gradients is not None
        return output, loss, gradients

    def _gradients(
        self, loss: Tensor, parameters: Sequence[nn.Parameter], trained: Sequence[nn.Parameter]
    ) -> Sequence[Tensor | None] | None:
        """Return each parameter's gradient, or None if they need another forward and `loss.backward()`."""
        if not loss.requires_grad:
            return [None] * len(parameters)
        if not self._by_backward:
            try:
                wanted = self._wanted(parameters, trained)
                found = torch.autograd.grad(loss, wanted, allow_unused=True)
                if wanted is parameters:
                    return found
                by_id = dict(zip(map(id, wanted), found, strict=True))
                return [by_id[id(p)] for p in parameters]
            except RuntimeError as error:
                if "use_reentrant=True" not in str(error):
                    raise
                self._by_backward = True
                return None
        for p in trained:
            p.grad = None
        loss.backward()
        gradients = [p.grad for p in parameters]
        for p in trained:
            p.grad = None
        return gradients

    def _wanted(self, parameters: Sequence[Tensor], trained: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what to take gradients of: here all trained parameters, as the definition says."""
        return trained


def _home(world: World, home: dict[str, int], active: Sequence[bool]) -> list[int]:
    """Return for each module the pass in which its state changes: that of its group, else the first."""
    place: dict[int, int] = {}
    for group, on in enumerate(active):
        if on:
            place[group] = len(place)
    return [place.get(home.get(name, -1), 0) for name in world.modules]


def _refuse_hidden(model: nn.Module, trained: Sequence[nn.Parameter], leaves: set[int], found: Groups) -> None:
    """Refuse a network that uses weights unseen by torch functions, since their layers then have no order."""
    if not found.unused:
        return
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = [name for p in trained if id(p) in leaves and (name := names[id(p)]) in found.unused]
    if hidden:
        raise ValueError(f"the forward uses {', '.join(hidden)} where no call of torch shows it: no order is known")


class Tape(Naive):
    """Recomputes in each pass only what changed since, and what the group's gradient flows through.

    In pass k, a call of torch returns its earlier result if its arguments are the same and the result depends neither
    on group k, whose gradient is needed, nor on group k - 1, which has just been updated. Returned results are
    detached, so the backward ends there. Bitwise equal to `Naive` on a CPU.

    Attributes:
        reason: Why passes of the last batch ran in full; empty if none did.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__(model, loss_fn)
        self._guess = EVERY
        self._brackets = False
        self._tape: Recording | None = None
        self._masks: list[int] = []
        self._passes = 0
        self._group_norms = False

    def _begin(self, batch: Batch) -> None:
        self.reason = ""

    def _wanted(self, parameters: Sequence[Tensor], trained: Sequence[Tensor]) -> Sequence[Tensor]:
        tape = self._tape
        if tape is not None and tape.besides:
            besides, tape.besides = tape.besides, []
            return [*parameters, *besides]
        return trained if self._group_norms else parameters  # a pass without a record may run group norms as well

    def _first(self, batch: Batch, part: int) -> tuple[Any, Tensor, Order]:
        # Almost all of a first pass depends on the first group and cannot be reused. So record it only to learn the
        # order of the layers, or if the network contains code from outside torch.nn and this library.
        known = batch.network.order
        if known is not None:
            batch.world.unseen = True
            output, loss = batch.forward(part)
            return output, loss, known
        if not part:
            self._tape = Recording(batch, self._guess, self._brackets)
        assert self._tape is not None
        with self._tape as tape:
            output, loss = batch.forward(part)
        self._group_norms = self._group_norms or bool(tape.besides)
        self._check_draws(batch, part)
        if batch.network.quiet and not batch.start and part == len(batch.parts) - 1:
            batch.network.order = tape.order
        return output, loss, tape.order

    def _arranged(self, batch: Batch, passes: Sequence[Group]) -> None:
        if len(passes) < 3 and batch.network.order is not None:
            self._tape = None  # the second pass is the last, and in a chain it can reuse nothing of the first
            self._passes = 0
            return
        tape = self._tape = self._tape or Recording(batch, self._guess, self._brackets)
        self._masks = [tape.bits(group) for group in passes]
        self._guess = self._masks[0]
        self._passes = len(passes)
        tape._bit = self._masks[0]

    def _forward(self, batch: Batch, k: int, part: int) -> tuple[Any, Tensor]:
        tape = self._tape
        if k == 1 and batch.network.order is not None and self._passes:
            batch.world.unseen = False  # the tape sees all changes from here on
        if tape is None or self._by_backward:
            return batch.forward(part)
        if not part:
            tape.begin(self._masks[k] | self._masks[k - 1], self._masks[k])
        try:
            with tape:
                found = batch.forward(part)
            if tape.sound():
                self._check_draws(batch, part)
                return found
        except (Redo, Exception):
            if not tape.hits:
                raise
            tape.broken = tape.broken or "a pass failed with results of earlier ones"
        self._give_up(tape.broken)
        return batch.again(part)

    def _check_draws(self, batch: Batch, part: int) -> None:
        """After a pass that drew random numbers, start to check for draws around each call."""
        tape, start = self._tape, batch.start
        if tape is None or not start or tape.brackets or part < len(batch.parts) - 1:
            return
        if not equal_states(batch.chance.of_torch(), start[: len(batch.chance.of_torch())]):
            tape.brackets = self._brackets = True
            tape.entries, tape._new = [], []
            tape._i = 0

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._tape = None

    def _passed(self, k: int) -> None:
        tape = self._tape
        if tape is not None:
            if tape.broken:
                self._give_up(tape.broken)
            else:
                tape.end()

    def _end(self) -> None:
        self._tape = None
        self._masks = []
