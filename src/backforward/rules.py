"""Update rules: how one mini-batch changes the weights of a network.

    rule = Backforward(model, optimizer, loss_fn)
    for x, y in batches:
        out = rule.step(x, y)      # out.loss, out.output: at the weights before any update of this batch

Backforward Propagation (Stoica & Simionescu, AAAI 2023) updates the layers one at a time, from input to output, and
redoes forward and backward after each update, so that every layer steps along the gradient that it really faces:

    for each group of parameters, in forward order:
        loss     = loss_fn(model(x), y)           # groups before this one are already updated, those after it not
        gradient = d loss / d group
        one optimizer step of this group alone

`UpdateRule.step` is this loop; an engine computes its passes. A rule wraps any `torch.optim.Optimizer` that needs no
closure; it is no optimizer itself.

Depends on torch, the standard library, `stages` and `optimizers` only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from backforward.optimizers import clip_grad_norm_, one_per_group, parameters_of, step_each
from backforward.stages import (
    Chain,
    Cut,
    Generators,
    Group,
    GroupSpec,
    Settings,
    Statistics,
    UntraceableError,
    check_spec,
    cut,
    group_layers,
    identity,
    linear_chain,
    may_draw,
    survey,
    tensors_in,
)

__all__ = ["Backforward", "Backprop", "Group", "Result", "Rule", "Switch", "UpdateRule"]

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
Reduce: TypeAlias = Callable[[Tensor], Tensor]
TakeStep: TypeAlias = Callable[[bool], None]
Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
AfterUpdate: TypeAlias = Callable[[Sequence[nn.Parameter]], None]


class Result(NamedTuple):
    """What a batch showed.

    Attributes:
        loss: Scalar, detached: the loss at the weights before any update of this batch. May be infinite or NaN.
        output: The network's output at those weights, detached.
        joint_loss: With `joint_pass`, the loss that its joint pass saw: after the single updates, before the joint one.
    """

    loss: Tensor
    output: Any
    joint_loss: Tensor | None = None


class Pass(NamedTuple):
    """One forward and backward: the output, the loss, the gradient of each parameter that is to be updated."""

    output: Any
    loss: Tensor
    gradients: Sequence[Tensor | None]


class Rule(Protocol):
    """What a training loop needs of an update rule."""

    def prepare(self, x: Any) -> None:
        """Refuse, before anything starts, a network or groups that the rule cannot work with."""

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins (from 0)."""

    def step(self, x: Any, y: Any) -> Result:
        """Change the weights by one mini-batch."""
        ...


class Engine(Protocol):
    """Computes the passes of a batch. The caller updates the weights between one pass and the next."""

    def run(self, inputs: Sequence[Any], target: Any) -> Generator[Pass, None, None]:
        """The passes, in order; each at the weights that it finds."""
        ...


# ---------------------------------------------------------------------------------------------------------------------
# The rules
# ---------------------------------------------------------------------------------------------------------------------


class UpdateRule:
    """The part that all update rules share: a batch is a sequence of passes, each followed by an update.

    Args:
        model: The network. Several inputs are given to `step` as a tuple.
        optimizer: Any torch optimizer that needs no closure, or a list of several that share the parameters. Each acts
            as one optimizer for each group (see `optimizers`).
        loss_fn: Maps (output, target) to a scalar loss.
        max_grad_norm: Clips the gradient of every update to this L2 norm.
        reduce: Averages a flat gradient over ranks; called once per update. Without it ranks would part in silence.
            Weights then stay bitwise equal on all ranks. BatchNorm normalises by each rank's own part of the batch,
            so its running statistics differ between ranks (unless it is `SyncBatchNorm`), and a run differs from one
            process on the joined batch.
        step: Takes the optimizer's step; its argument is True for the last step of a batch, and only then. Default:
            `optimizer.step()`.
        after_update: Called with the parameters just updated, after every optimizer step, without gradients (a
            projection, say). Later passes of the batch see what it did. In `step` and `after_update` the parameters'
            `.grad` is the gradient stepped along; that of all others is None.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An optimizer that needs a closure, a network wrapped for data parallelism, max_grad_norm <= 0.
    """

    _of_all = False  # whether each update is of all parameters

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        loss_fn: LossFunction,
        *,
        max_grad_norm: float | None = None,
        reduce: Reduce | None = None,
        step: TakeStep | None = None,
        after_update: AfterUpdate | None = None,
    ) -> None:
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: model is a {type(model).__name__}; give a torch.nn.Module")
        if isinstance(model, DataParallel | DistributedDataParallel):  # right kind, wrong place: no TypeError
            raise ValueError(f"{name}: give the network itself, not {type(model).__name__}, and average with reduce=")  # noqa: TRY004
        if not callable(loss_fn):
            raise TypeError(f"{name}: loss_fn is a {type(loss_fn).__name__}; give a function of (output, target)")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"{name}: max_grad_norm={max_grad_norm}; give a positive number or None")
        self._optimizers = one_per_group(model, optimizer, name, alone=self._of_all)
        if step is not None and len(self._optimizers) > 1:
            raise ValueError(f"{name}: step= takes the step of one optimizer; leave it out with several")
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.max_grad_norm = max_grad_norm
        self._reduce = reduce
        self._step = step
        self._after_update = after_update
        self._plan: _Plan | None = None

    @property
    def groups(self) -> list[Group]:
        """The groups (name, parameters) in the order of their updates; known after the first batch, or `prepare`."""
        if self._plan is None:
            raise RuntimeError("groups are known after the first batch; call rule.prepare(x) to have them before")
        return self._plan.groups

    def prepare(self, x: Any) -> None:
        """Plan the passes from the inputs of a batch, without changing anything. `step` does it when it must."""
        inputs = _inputs(x)
        self._plan = self._make_plan(inputs)

    def set_epoch(self, epoch: int) -> None:
        """Tell the rule which epoch begins (from 0). Only switching rules care."""

    def step(self, x: Any, y: Any) -> Result:
        """Let one mini-batch change the weights.

        Args:
            x: The input, or a tuple of several.
            y: The target, handed to the loss function.

        Returns:
            Loss and output at the weights before any update of this batch.

        Raises:
            ValueError: The loss does not depend on a group, float16 autocast, a network that changes its input.
        """
        inputs = _inputs(x)
        plan = self._plan
        if plan is None or plan.outdated(self.optimizer):
            plan = self._plan = self._make_plan(inputs)
        autocast = _autocast(plan.device)
        for parameter in plan.held:
            parameter.grad = None
        last = len(plan.passes) - 1
        with closing(plan.engine.run(inputs, y)) as passes:
            for k, group in enumerate(plan.passes):
                output, loss, gradients = next(passes)  # groups before this one are updated, those after it not
                if k == 0:
                    result = Result(loss.detach(), _map(Tensor.detach, output))
                if k == last and plan.joint:
                    result = result._replace(joint_loss=loss.detach())
                parts = plan.groups if k == last and plan.joint else [group]
                self._update(group.parameters, gradients, [part.parameters for part in parts], last=k == last)
                del output, loss, gradients  # the next pass needs nothing of this one
                if autocast:
                    torch.clear_autocast_cache()  # it holds casts of the weights as they were
        return result

    def _update(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor | None],
        parts: Sequence[Sequence[nn.Parameter]],
        *,
        last: bool,
    ) -> None:
        """One step of these parameters, as the optimizers of the groups (`parts`) that they belong to."""
        if self._reduce is not None:
            gradients = _reduced(self._reduce, gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.max_grad_norm is not None:
            clip_grad_norm_(parameters, self.max_grad_norm)
        step_each(self._optimizers, parts, self._step, last=last)
        if self._after_update is not None:
            with torch.no_grad():
                self._after_update(parameters)
        for parameter in parameters:
            parameter.grad = None

    def _make_plan(self, inputs: Sequence[Any]) -> _Plan:
        raise NotImplementedError

    def _trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimizer holds and that are not frozen, in the network's order."""
        held = {id(p) for p in parameters_of(self.optimizer)}
        own = list(self.model.parameters())
        if held - {id(p) for p in own}:
            raise ValueError(f"{type(self).__name__}: the optimizer holds parameters that are not the network's")
        trainable = [p for p in own if p.requires_grad and id(p) in held]
        if not trainable:
            raise ValueError(f"{type(self).__name__}: the optimizer holds no trainable parameter of the network")
        return trainable


class Backprop(UpdateRule):
    """Backpropagation: one forward and backward, one step of all parameters (`sgd`).

    Args:
        model, optimizer, loss_fn, max_grad_norm, reduce, step, after_update: See `UpdateRule`.
        repeats: Number of such updates on each batch (the control of equal cost). All of them see the same dropout
            draws, and running statistics move in the first.
    """

    _of_all = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        loss_fn: LossFunction,
        repeats: int = 1,
        max_grad_norm: float | None = None,
        reduce: Reduce | None = None,
        step: TakeStep | None = None,
        after_update: AfterUpdate | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            loss_fn,
            max_grad_norm=max_grad_norm,
            reduce=reduce,
            step=step,
            after_update=after_update,
        )
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"Backprop: repeats={repeats!r}; give a whole number of at least 1")
        self.repeats = repeats
        self._trainable()

    @property
    def groups(self) -> list[Group]:
        """One group of all trainable parameters."""
        return [Group("all", tuple(self._trainable()))]

    def _make_plan(self, inputs: Sequence[Any]) -> _Plan:
        passes = self.groups * self.repeats
        moving = survey(self.model, inputs).moving if self.repeats > 1 else []
        engine = Naive(self.model, self.loss_fn, passes, Statistics(self.model, moving, {}))
        return _Plan(self.optimizer, self.groups, passes, engine, Settings(self.model))


class Backforward(UpdateRule):
    """Backforward Propagation: for each group in turn a pass at the current weights and a step of that group alone.

    Args:
        model, optimizer, loss_fn, max_grad_norm, reduce, step, after_update: See `UpdateRule`.
        groups: "layer": one group for each module that directly holds parameters, a normalisation layer joining the
            layer before it; an integer k: k groups of neighbouring layers of near-equal multiply-accumulates (1 is
            ordinary backpropagation); or a list of lists of module names, updated in the order given.
        engine: "replay" computes only what changed since the pass before (exact: bitwise equal to "naive", which runs
            the whole network in each pass); "auto" is "replay", or "naive" where torch.fx cannot trace the network;
            "shortcut" (see `Shortcut`) serves chains of linear layers under plain SGD.
        joint_pass: Append one ordinary update of all groups (what the paper's published code does).

    Raises:
        TypeError, ValueError: Bad arguments, at once where they can be seen, else at the first batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        loss_fn: LossFunction,
        groups: GroupSpec = "layer",
        engine: str = "auto",
        joint_pass: bool = False,
        max_grad_norm: float | None = None,
        reduce: Reduce | None = None,
        step: TakeStep | None = None,
        after_update: AfterUpdate | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            loss_fn,
            max_grad_norm=max_grad_norm,
            reduce=reduce,
            step=step,
            after_update=after_update,
        )
        check_spec(model, groups)
        if engine not in {"auto", "replay", "naive", "shortcut"}:
            raise ValueError(f"engine={engine!r}: give 'auto', 'replay', 'naive' or 'shortcut'")
        if engine == "shortcut":
            without = {
                "groups='layer'": groups == "layer",
                "no joint_pass": not joint_pass,
                "no max_grad_norm": max_grad_norm is None,
                "no reduce: one device": reduce is None,
                "no after_update: no projection": after_update is None,
            }
            if not all(without.values()):
                needs = next(need for need, given in without.items() if not given)
                raise ValueError(f"engine='shortcut' needs {needs}")
            _require_plain_sgd(optimizer)
        self.engine = engine
        self.joint_pass = joint_pass
        self._spec = groups
        self._warned: set[str] = set()
        self._trainable()

    def _make_plan(self, inputs: Sequence[Any]) -> _Plan:
        trainable = self._trainable()
        found = survey(self.model, inputs, count=isinstance(self._spec, int))
        groups, group_of, unused = group_layers(self.model, trainable, found, self._spec)
        if unused:
            self._warn(f"Backforward: the forward does not use {', '.join(unused)}: not updated")
        every = Group("all", tuple(p for group in groups for p in group.parameters))
        passes = groups + [every] * self.joint_pass
        statistics = Statistics(self.model, found.moving, group_of)
        engine: Engine = Naive(self.model, self.loss_fn, passes, statistics)
        entered: list[nn.Module] = []
        try:
            if self.engine == "shortcut":
                parts = linear_chain(self.model, inputs, found.output)
                engine, entered = Shortcut(self.loss_fn, groups, parts, self._optimizers[0].optimizer), parts.entered
                passes = [every]
            elif self.engine != "naive":
                cuts = cut(self.model, inputs, groups, group_of, found.output)
                engine, entered = Replay(self.model, self.loss_fn, passes, statistics, cuts), cuts.entered
        except UntraceableError as error:
            if self.engine != "auto":
                raise ValueError(f"engine={self.engine!r} cannot be used with this network: {error}") from None
            self._warn(f"Backforward: the naive engine takes over: {error}")
        settings = Settings(self.model, entered)
        return _Plan(self.optimizer, groups, passes, engine, settings, joint=self.joint_pass)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)


class Switch:
    """One rule for the first epochs, another from then on. Both share one optimizer.

    `bfp_warmup` is `Switch(Backforward(...), Backprop(...), at_epoch=n)`, `bfp_finetune` the reverse.

    Args:
        first: The rule of epochs 0 to at_epoch - 1.
        then: The rule from epoch `at_epoch` on.
        at_epoch: The first epoch of `then`.

    Attributes:
        active: The rule of this epoch.
        at_epoch: As given.
    """

    def __init__(self, first: UpdateRule, then: UpdateRule, at_epoch: int) -> None:
        if first.optimizer is not then.optimizer or first.model is not then.model:
            raise ValueError("Switch: both rules must share one network and one optimizer")
        if isinstance(at_epoch, bool) or not isinstance(at_epoch, int) or at_epoch < 0:
            raise ValueError(f"Switch: at_epoch={at_epoch!r}; give a whole number of at least 0")
        self._first, self._then, self.at_epoch = first, then, at_epoch
        self.active = then if at_epoch == 0 else first

    @property
    def groups(self) -> list[Group]:
        """The groups of the rule that is active now."""
        return self.active.groups

    def prepare(self, x: Any) -> None:
        """Plan both rules."""
        self._first.prepare(x)
        self._then.prepare(x)

    def set_epoch(self, epoch: int) -> None:
        """Choose the rule of this epoch (from 0)."""
        self.active = self._first if epoch < self.at_epoch else self._then

    def step(self, x: Any, y: Any) -> Result:
        """Let one mini-batch change the weights, by the rule of this epoch."""
        return self.active.step(x, y)


# ---------------------------------------------------------------------------------------------------------------------
# The engines
# ---------------------------------------------------------------------------------------------------------------------


class Naive:
    """Each pass is one forward and backward of the whole network: the definition, and the oracle of the others."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, passes: Sequence[Group], statistics: Statistics
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._passes = passes
        self._every = list(dict.fromkeys(p for group in passes for p in group.parameters))
        place = {id(p): i for i, p in enumerate(self._every)}
        self._places = [[place[id(p)] for p in group.parameters] for group in passes]
        self._statistics = statistics
        self._generators = Generators.of(model) if may_draw(model) or may_draw(loss_fn) else Generators.none()

    def run(self, inputs: Sequence[Any], target: Any) -> Generator[Pass, None, None]:
        """See `Engine`."""
        if len(self._passes) == 1:
            yield self._pass(0, inputs, target)
            return
        start = self._generators.save()
        self._statistics.begin()
        try:
            for k in range(len(self._passes)):
                yield self._same_function(k, inputs, target, start)
        finally:
            self._statistics.end()

    def _same_function(self, k: int, inputs: Sequence[Any], target: Any, start: list[Tensor]) -> Pass:
        """Pass k with the draws of the first, its own statistics moving."""
        now = self._generators.save()
        self._generators.restore(start)
        self._statistics.enter(k)
        versions = [tensor._version for tensor in tensors_in(inputs)]
        try:
            found = self._pass(k, inputs, target)
        finally:
            self._statistics.leave(k)
            if k:
                self._generators.restore(now)
        if [tensor._version for tensor in tensors_in(inputs)] != versions:
            raise ValueError("the network changes its input in place: a second pass would see another batch")
        return found

    def _pass(self, k: int, inputs: Sequence[Any], target: Any) -> Pass:
        output = self._model(*inputs)
        loss = self._loss_fn(output, target)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, self._every, allow_unused=True)
            wanted = [gradients[i] for i in self._places[k]]
            if any(gradient is not None for gradient in wanted):
                return Pass(output, loss, wanted)
        raise ValueError(_independent(self._passes[k]))


class Replay:
    """Each pass runs only the stages that changed or that the group's gradient flows through.

    Outputs of all other stages are kept from earlier passes, cut off from their graph, so the backward ends there.
    They go on requiring a gradient (which nobody asks for), and so do all weights: some kernels differ by that flag,
    and every operation is to do exactly what it does in the naive engine.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        passes: Sequence[Group],
        statistics: Statistics,
        parts: Cut,
    ) -> None:
        self._loss_fn = loss_fn
        self._passes = passes
        self._statistics = statistics
        self._cut = parts
        self._generators = Generators.of(model)
        self._loss_draws = may_draw(loss_fn)

    def run(self, inputs: Sequence[Any], target: Any) -> Generator[Pass, None, None]:
        """See `Engine`."""
        values: list[Any] = [*inputs, *[None] * (self._cut.slots - len(inputs))]
        states: dict[int, list[Tensor]] = {}
        self._statistics.begin()
        try:
            for k in range(len(self._passes)):
                yield self._pass(k, values, states, target)
        finally:
            self._statistics.end()

    def _pass(self, k: int, values: list[Any], states: dict[int, list[Tensor]], target: Any) -> Pass:
        program = self._cut.programs[k]
        now = self._generators.save() if k and (program.draws or self._loss_draws) else None
        self._statistics.enter(k)
        try:
            for number, stage, spent in program.steps:
                if stage.draws:
                    self._same_draws(number, states)
                results = stage.run(*[values[slot] for slot in stage.inputs])
                for slot, value in zip(stage.outputs, results, strict=True):
                    values[slot] = value
                for slot in spent:
                    values[slot] = None
            output, values[self._cut.output] = values[self._cut.output], None
            if self._loss_draws:
                self._same_draws(-1, states)
            loss = self._loss_fn(output, target)
        finally:
            self._statistics.leave(k)
            if now is not None:
                self._generators.restore(now)
        for slot in program.kept:
            values[slot] = _cut_off(values[slot])
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, self._passes[k].parameters, allow_unused=True)
            if any(gradient is not None for gradient in gradients):
                return Pass(output, loss, gradients)
        raise ValueError(_independent(self._passes[k]))

    def _same_draws(self, index: int, states: dict[int, list[Tensor]]) -> None:
        """The first pass of a batch notes the generators' states before a stage, later ones go back to them."""
        if index in states:
            self._generators.restore(states[index])
        else:
            states[index] = self._generators.save()


class Shortcut:
    """A chain of linear layers under plain SGD: a layer's new output is known without its new weights.

    A layer's input h [n, d_in] is final when its turn comes. With d [n, d_out] the gradient at its output
    z = h W^T + b, the step of W by -lr d^T h and of b by -lr 1^T d moves the output to

        z - lr (h h^T + 1 1^T) d,

    which costs n^2 (d_in + d_out) multiply-accumulates where the layer itself costs n d_in d_out; it is used where
    n < d_in d_out / (d_in + d_out). Forward and backward of the layers are written out, and so are the derivatives of
    ReLU and of the mean cross-entropy; autograd serves other activations and losses. The engine takes the steps itself,
    with the optimizer's learning rates, and adds d^T h onto the weight without ever holding the gradient: the
    optimizer's own step at the end of the batch finds no gradients and only counts.

    Exact in mathematics, not bitwise.
    """

    def __init__(
        self, loss_fn: LossFunction, groups: Sequence[Group], parts: Chain, optimizer: torch.optim.Optimizer
    ) -> None:
        if [set(group.parameters) for group in groups] != [set(linear.parameters()) for linear in parts.layers]:
            raise UntraceableError("every linear layer must be trained, weight and bias")
        if may_draw(loss_fn):
            raise UntraceableError("the loss may draw random numbers: give one of torch.nn or torch.nn.functional")
        self._loss_fn = loss_fn
        self._optimizer = optimizer
        self._before = parts.before
        self._layers = [
            (linear.weight, linear.bias, after) for linear, after in zip(parts.layers, parts.after, strict=True)
        ]
        self._settings = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._no_gradients = [None for group in groups for _ in group.parameters]

    def run(self, inputs: Sequence[Any], target: Any) -> Generator[Pass, None, None]:
        """See `Engine`. One pass, with the output and loss of the first; the updates are already made."""
        _require_plain_sgd(self._optimizer)
        if torch.is_autocast_enabled(inputs[0].device.type):
            raise ValueError("engine='shortcut' needs full precision: no autocast")
        with torch.no_grad():
            first = self._batch(inputs[0], target)
        yield Pass(*first, self._no_gradients)

    def _batch(self, x: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """Update the layers in turn; return output and loss before."""
        layers = self._layers
        h = self._before(x)
        z = F.linear(h, *layers[0][:2])
        seen = []
        for k, (_, _, after) in enumerate(layers):
            output, loss, d = self._pass(k, z, target)
            seen.append((output, loss))
            z = self._update(k, h, z, d)
            if k + 1 < len(layers):
                h = after(z)
                z = F.linear(h, *layers[k + 1][:2])
        return seen[0]

    def _pass(self, k: int, z: Tensor, target: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Output, loss, and the loss's gradient at the output z of layer k."""
        value, backward = _with_derivative(self._layers[k][2], z)
        trail = [backward]
        for weight, bias, after in self._layers[k + 1 :]:
            value, backward = _with_derivative(after, F.linear(value, weight, bias))
            trail.append(backward)
        loss, d = _loss_and_slope(self._loss_fn, value, target)
        for (weight, _, _), backward in zip(self._layers[:k:-1], trail[:0:-1], strict=True):
            d = backward(d) @ weight
        return value, loss, trail[0](d)

    def _update(self, k: int, h: Tensor, z: Tensor, d: Tensor) -> Tensor:
        """Take the step of layer k; return its new output (of the last layer, which nobody asks for, the old one)."""
        weight, bias, _ = self._layers[k]
        d_out, d_in = weight.shape
        rows, slopes = h.reshape(-1, d_in), d.reshape(-1, d_out)
        lr, lr_bias = self._settings[weight]["lr"], 0.0
        weight.addmm_(slopes.t(), rows, alpha=-lr)
        if bias is not None:
            lr_bias = self._settings[bias]["lr"]
            bias.add_(slopes.sum(0), alpha=-lr_bias)
        if k + 1 == len(self._layers):
            return z
        if len(rows) * (d_in + d_out) >= d_in * d_out:
            return F.linear(h, weight, bias)
        gram = torch.addmm(z.new_ones(1), rows, rows.t(), beta=lr_bias, alpha=lr)
        return torch.addmm(z.view_as(slopes), gram, slopes, alpha=-1).view_as(z)


def _with_derivative(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The value of an elementwise function at z, and what takes a gradient back through it."""
    if function is identity:
        return z, identity
    if function is torch.relu:
        value = torch.relu(z)
        return value, lambda d: torch.ops.aten.threshold_backward.default(d, value, 0)
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        value = function(at)
    return value.detach(), lambda d: torch.autograd.grad(value, at, d)[0]


def _loss_and_slope(loss_fn: LossFunction, output: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient at the output."""
    if _is_cross_entropy(loss_fn) and output.dim() == 2 and target.dtype is torch.long:
        aten = torch.ops.aten  # the kernels that autograd would run
        log_p = torch.log_softmax(output, 1)
        loss, count = aten.nll_loss_forward.default(log_p, target, None, 1, -100)
        slope = aten.nll_loss_backward.default(torch.ones_like(loss), log_p, target, None, 1, -100, count)
        return loss, aten._log_softmax_backward_data.default(slope, log_p, 1, log_p.dtype)
    with torch.enable_grad():
        at = output.detach().requires_grad_()
        loss = loss_fn(at, target)
        return loss.detach(), torch.autograd.grad(loss, at)[0]


def _is_cross_entropy(loss_fn: LossFunction) -> bool:
    """Whether the loss is the plain mean cross-entropy."""
    if type(loss_fn) is nn.CrossEntropyLoss:
        plain = loss_fn.weight is None and loss_fn.ignore_index == -100
        return plain and loss_fn.reduction == "mean" and loss_fn.label_smoothing == 0
    return loss_fn is F.cross_entropy


# ---------------------------------------------------------------------------------------------------------------------
# Details
# ---------------------------------------------------------------------------------------------------------------------


class _Plan:
    """How a rule handles its batches, until something changes that it rests on."""

    def __init__(
        self,
        optimizer: Optimizers,
        groups: list[Group],
        passes: list[Group],
        engine: Engine,
        settings: Settings,
        *,
        joint: bool = False,
    ) -> None:
        self.groups = groups
        self.passes = passes
        self.engine = engine
        self.joint = joint
        self.held = parameters_of(optimizer)
        self.device = passes[0].parameters[0].device.type
        self._settings = settings

    def outdated(self, optimizer: Optimizers) -> bool:
        """Whether network or optimizer are no longer what they were."""
        return self._settings.changed() or len(self.held) != len(parameters_of(optimizer))


def _require_plain_sgd(optimizer: Optimizers) -> None:
    """Refuse any optimizer whose step is not -lr times the gradient.

    Raises:
        ValueError: It is not SGD, or has momentum, weight decay or maximize.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ValueError(f"engine='shortcut' needs torch.optim.SGD, not {type(optimizer).__name__}")
    for group in optimizer.param_groups:
        if group["momentum"] or group["weight_decay"] or group["maximize"]:
            raise ValueError("engine='shortcut' needs plain SGD: no momentum, weight decay or maximize")


def _independent(group: Group) -> str:
    return f"the loss does not depend on group {group.name!r}: freeze its parameters"


def _inputs(x: Any) -> tuple[Any, ...]:
    """The positional arguments of the forward; no gradient flows into them."""
    inputs = tuple(x) if isinstance(x, tuple | list) else (x,)
    return tuple(t.detach() if isinstance(t, Tensor) and t.requires_grad else t for t in inputs)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change every tensor in a nest of tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(change, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(change, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_map(change, item) for item in value)
    return value


def _cut_off(value: Any) -> Any:
    """The value without its graph, requiring a gradient if it did."""
    return _map(lambda t: t.detach().requires_grad_() if t.requires_grad else t, value)


def _autocast(device: str) -> bool:
    """Whether autocast is on.

    Raises:
        ValueError: It is on with float16, which needs a gradient scaler, whose scale moves within a batch.
    """
    if not torch.is_autocast_enabled(device):
        return False
    if torch.get_autocast_dtype(device) is torch.float16:
        raise ValueError("float16 autocast needs a gradient scaler, whose scale moves within a batch: take bfloat16")
    return True


def _reduced(reduce: Reduce, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """All gradients through one call of `reduce`."""
    present = [gradient for gradient in gradients if gradient is not None]
    flat = reduce(torch.cat([gradient.reshape(-1) for gradient in present]))
    parts = iter(flat.split([gradient.numel() for gradient in present]))
    return [None if g is None else next(parts).view_as(g).to(g.dtype) for g in gradients]
