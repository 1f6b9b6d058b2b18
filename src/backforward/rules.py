"""Update rules: how one mini-batch changes the weights of a network.

    rule = Backforward(model, optimizer, loss_fn)
    for x, y in batches:
        out = rule.step(x, y)      # out.loss and out.output are computed before any update of this batch

Backforward Propagation (Stoica & Simionescu, AAAI 2023) updates the layers one at a time, from input to output. It
repeats forward and backward after each update, so every layer steps along the gradient at the current weights:

    for each group of parameters, in forward order:
        loss     = loss_fn(model(x), y)           # earlier groups are already updated, later ones are not
        gradient = d loss / d group
        one optimizer step of this group alone

`UpdateRule.step` is this loop. A rule wraps any `torch.optim.Optimizer` that needs no closure. `engines` computes the
passes; `batch` keeps the state that they share.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from backforward.batch import Inputs, LossFunction, Part, detached, split
from backforward.engines import Naive, Pass, Tape
from backforward.groups import (
    Group,
    Groups,
    GroupSpec,
    check_spec,
    group_layers,
    refuse_scripted,
    survey,
)
from backforward.network import Network, now
from backforward.optimizers import clip_grad_norm_, one_per_group, parameters_of, step_each
from backforward.shortcut import Shortcut, require_plain_sgd

__all__ = ["Backforward", "Backprop", "Group", "Rule", "StepResult", "UpdateRule"]

Reduce: TypeAlias = Callable[[Tensor], Tensor]
TakeStep: TypeAlias = Callable[[bool], None]
Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
AfterUpdate: TypeAlias = Callable[[Sequence[nn.Parameter]], None]


class StepResult(NamedTuple):
    """The result of a batch.

    Attributes:
        loss: Scalar, detached: the loss before any update of this batch. May be infinite or NaN.
        output: The network's output before any update of this batch, detached.
        joint_loss: With `joint_pass`, the loss in the joint pass: after the single updates, before the joint one.
    """

    loss: Tensor
    output: Any
    joint_loss: Tensor | None = None


class Rule(Protocol):
    """What a training loop needs from an update rule."""

    def prepare(self, x: Any) -> None:
        """Refuse a network or groups that the rule cannot handle, before training starts."""

    def set_epoch(self, epoch: int, batch: int | None = None) -> None:
        """Set the epoch that begins (from 0) and the number of batches before it, over all epochs."""

    def step(self, x: Any, y: Any) -> StepResult:
        """Update the weights on one mini-batch."""
        ...


# --- The rules --------------------------------------------------------------------------------------------------------


class UpdateRule:
    """Base of all update rules: a batch is a sequence of passes, each followed by an update.

    Args:
        model: The network.
        optimizer: A torch optimizer that needs no closure, or a list of several that share the parameters. Each acts
            as one optimizer per group (see `optimizers`).
        loss_fn: Maps (output, target) to a scalar loss.
        max_grad_norm: Clips the gradient of every update to this L2 norm.
        micro_batches: Gradient accumulation: each pass splits the batch into this many equal parts and averages their
            gradients. `output` is then a list.
        reduce: Averages a flat gradient over ranks; called once per update, it keeps the weights bitwise equal on all
            ranks. Without it ranks diverge silently. BatchNorm still normalises by each rank's part of the batch
            (unless it is `SyncBatchNorm`), so its running statistics differ between ranks, and a run differs from one
            process on the joined batch.
        step: Takes the optimizer's step; its argument is True for the last step of a batch only. Default:
            `optimizer.step()`.
        after_update: Called under `no_grad` with the updated parameters after every optimizer step (a projection, say);
            later passes of the batch see its effect. In `step` and `after_update`, `.grad` is the gradient of this
            update; it is None for all other parameters.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The optimizer needs a closure, the network is wrapped for data parallelism, or a number is out of
            range.
    """

    joint_pass = False
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
        micro_batches: int = 1,
    ) -> None:
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: model is a {type(model).__name__}; give a torch.nn.Module")
        if isinstance(model, DataParallel | DistributedDataParallel):  # a module, so no TypeError
            raise ValueError(f"{name}: give the network itself, not {type(model).__name__}, and average with reduce=")  # noqa: TRY004
        if not callable(loss_fn):
            raise TypeError(f"{name}: loss_fn is a {type(loss_fn).__name__}; give a function of (output, target)")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"{name}: max_grad_norm={max_grad_norm}; give a positive number or None")
        if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
            raise ValueError(f"{name}: micro_batches={micro_batches!r}; give an integer >= 1")
        self._optimizers = one_per_group(model, optimizer, name, alone=self._of_all)
        if step is not None and len(self._optimizers) > 1:
            raise ValueError(f"{name}: step= takes the step of one optimizer; leave it out with several")
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.max_grad_norm = max_grad_norm
        self.micro_batches = micro_batches
        self._reduce = reduce
        self._step = step
        self._after_update = after_update
        self._groups: list[Group] | None = None
        self._batches = 0
        self._network: Network | None = None

    @property
    def groups(self) -> list[Group]:
        """The groups (name, parameters) of the last batch, in the order of updates; known after `prepare` or a step."""
        if self._groups is None:
            raise RuntimeError("groups are known after the first batch; call rule.prepare(x) to have them before")
        return self._groups

    def prepare(self, x: Any) -> None:
        """Find the groups from a batch's inputs without changing anything. Optional: `step` does it itself."""
        raise NotImplementedError

    def set_epoch(self, epoch: int, batch: int | None = None) -> None:
        """Set the epoch that begins (from 0) and the number of batches trained on before it, over all epochs.

        `batch=None` keeps the rule's own count. Pass it when resuming from a checkpoint with `order="random"`.
        """
        if batch is not None:
            self._batches = batch

    def step(self, x: Any, y: Any) -> StepResult:
        """Update the weights on one mini-batch.

        Args:
            x: The input: a tensor, a tuple of positional inputs or a dict of keyword inputs.
            y: The target, passed to the loss function.

        Returns:
            The loss and the output before any update of this batch.

        Raises:
            ValueError: The loss depends on no parameter, autocast is float16, or the network changes its input.
        """
        parts = split(x, y, self.micro_batches)
        trained = self._trainable()
        autocast = _autocast(trained[0].device.type)
        for parameter in parameters_of(self.optimizer):
            parameter.grad = None
        result: StepResult | None = None
        with closing(self._passes(parts, trained)) as passes:
            for group, output, loss, gradients, last in passes:  # earlier groups are already updated
                if result is None:
                    result = StepResult(loss.detach(), detached(output))
                if last and self.joint_pass:
                    result = result._replace(joint_loss=loss.detach())
                owners = self.groups if last and self.joint_pass else [group]
                self._update(group.parameters, gradients, [owner.parameters for owner in owners], last=last)
                del output, loss, gradients  # free them before the next pass
                if autocast:
                    torch.clear_autocast_cache()  # its casts are of the old weights
        assert result is not None
        self._batches += 1
        return result

    def _passes(self, parts: list[Part], trained: list[nn.Parameter]) -> Generator[Pass, None, None]:
        """Yield the passes of a batch: each a group and its gradient at the current weights."""
        raise NotImplementedError

    def _update(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor | None],
        parts: Sequence[Sequence[nn.Parameter]],
        *,
        last: bool,
    ) -> None:
        """Step these parameters once, with the optimizer of each group in `parts`."""
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

    def _trainable(self) -> list[nn.Parameter]:
        """Return the optimizer's parameters that are not frozen, in the network's order."""
        held = {id(p) for p in parameters_of(self.optimizer)}
        self._network = now(self.model, self._network)
        own = self._network.parameters
        if held - {id(p) for p in own}:
            raise ValueError(f"{type(self).__name__}: the optimizer holds parameters that are not the network's")
        trainable = [p for p in own if p.requires_grad and id(p) in held]
        if not trainable:
            raise ValueError(f"{type(self).__name__}: the optimizer holds no trainable parameter of the network")
        return trainable


class Backprop(UpdateRule):
    """Backpropagation: one forward and backward, then one step of all parameters (`sgd`).

    Args:
        model, optimizer, loss_fn, max_grad_norm, reduce, step, after_update, micro_batches: See `UpdateRule`.
        repeats: Number of updates on each batch (a control of equal cost). All updates see the same dropout draws;
            running statistics change in the first only.
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
        micro_batches: int = 1,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            loss_fn,
            max_grad_norm=max_grad_norm,
            reduce=reduce,
            step=step,
            after_update=after_update,
            micro_batches=micro_batches,
        )
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"Backprop: repeats={repeats!r}; give an integer >= 1")
        self.repeats = repeats
        self._engine = Naive(model, loss_fn)
        self._trainable()

    @property
    def groups(self) -> list[Group]:
        """One group of all trainable parameters."""
        return [_all(self._trainable())]

    def prepare(self, x: Any) -> None:
        """Do nothing: there is one group."""

    def _passes(self, parts: list[Part], trained: list[nn.Parameter]) -> Generator[Pass, None, None]:
        assert self._network is not None
        if self.repeats == 1:
            return self._engine.plain(self._network, parts, _all(trained))
        whole = Groups([_all(trained)], {}, [])
        return self._engine.run(self._network, parts, trained, lambda _: whole, joint=self.repeats - 1)


class Backforward(UpdateRule):
    """Backforward Propagation: for each group in turn, one pass at the current weights and one step of that group.

    Examples:
        >>> rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.functional.cross_entropy)
        >>> out = rule.step(x, y)      # replaces zero_grad, backward and step

    Args:
        model, optimizer, loss_fn, max_grad_norm, reduce, step, after_update, micro_batches: See `UpdateRule`.
        groups: "layer": one group per module that directly holds parameters; a normalisation layer joins the layer
            before it. An integer k: k groups of neighbouring layers with near-equal multiply-accumulates (1 is ordinary
            backpropagation). Or a list of lists of module names, in the order of updates.
        engine: "naive" runs the whole network in each pass; "replay" recomputes only what changed since the pass before
            and is bitwise equal to "naive" on a CPU; "auto" is "replay"; "shortcut" handles chains of linear layers
            under plain SGD, and equals "naive" up to rounding.
        joint_pass: Append one ordinary update of all groups, as the paper's published code does.
        order: "forward" updates the groups first to last, "reverse" last to first, "random" in an order drawn for each
            batch. A joint pass stays last, and running statistics change in the pass of their own group.
        seed: Seed of the "random" order, which depends only on it and on the number of batches before.

    Raises:
        TypeError, ValueError: An argument is wrong; raised at construction if possible, else at the first batch.
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
        order: str = "forward",
        seed: int = 0,
        micro_batches: int = 1,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            loss_fn,
            max_grad_norm=max_grad_norm,
            reduce=reduce,
            step=step,
            after_update=after_update,
            micro_batches=micro_batches,
        )
        check_spec(model, groups)
        if order not in {"forward", "reverse", "random"}:
            raise ValueError(f"order={order!r}: give 'forward', 'reverse' or 'random'")
        if engine not in {"auto", "replay", "naive", "shortcut"}:
            raise ValueError(f"engine={engine!r}: give 'auto', 'replay', 'naive' or 'shortcut'")
        if engine == "shortcut":
            without = {
                "groups='layer'": groups == "layer",
                "no joint_pass": not joint_pass,
                "order='forward'": order == "forward",
                "no max_grad_norm": max_grad_norm is None,
                "micro_batches=1": micro_batches == 1,
                "no reduce: one device": reduce is None,
                "no after_update: no projection": after_update is None,
            }
            if not all(without.values()):
                needs = next(need for need, given in without.items() if not given)
                raise ValueError(f"engine='shortcut' needs {needs}")
            require_plain_sgd(optimizer)
        self.engine = engine
        self.joint_pass = joint_pass
        self.order, self.seed = order, seed
        self._spec = groups
        self._engine: Naive = Naive(model, loss_fn) if engine == "naive" else Tape(model, loss_fn)
        self._shortcut: Shortcut | None = None
        self._known: dict[tuple[Any, ...], Groups] = {}
        self._same: dict[tuple[int, ...], Group] = {}
        self._macs: dict[str, int] | None = None
        self._warned: set[str] = set()
        self._trainable()

    @property
    def engine_reason(self) -> str:
        """Why passes of the last batch ran in full although the engine is not "naive"; empty if none did."""
        return self._engine.reason

    def prepare(self, x: Any) -> None:
        """Find the groups from a batch's inputs (see `UpdateRule.prepare`)."""
        trained = self._trainable()
        if self._is_plain():
            self._groups = [_all(trained)]
            return
        watch = survey(self.model, split(x, None, self.micro_batches)[0].inputs, count=isinstance(self._spec, int))
        self._macs = watch.macs
        self._arrange(watch.order.used, trained)

    def _is_plain(self) -> bool:
        return self._spec == 1 and not self.joint_pass

    def _passes(self, parts: list[Part], trained: list[nn.Parameter]) -> Generator[Pass, None, None]:
        assert self._network is not None
        if self._is_plain():
            self._groups = [_all(trained)]
            return self._engine.plain(self._network, parts, self._groups[0])
        if self._network.scripted is not None:
            refuse_scripted(self.model)
        if self._network.compiled:
            self._warn("compiled", "Backforward: runs the network uncompiled, since it has to see each call of torch")
        if self.engine == "shortcut":
            return self._by_shortcut(*parts[0], trained)
        if isinstance(self._spec, int) and self._macs is None:
            self._macs = survey(self.model, parts[0].inputs, count=True).macs
        return self._engine.run(
            self._network,
            parts,
            trained,
            lambda order: self._arrange(order, trained),
            joint=int(self.joint_pass),
        )

    def _by_shortcut(self, inputs: Inputs, target: Any, trained: list[nn.Parameter]) -> Generator[Pass, None, None]:
        if self._shortcut is None or self._shortcut.outdated(trained):
            found = self._arrange(survey(self.model, inputs).order.used, trained)
            try:
                self._shortcut = Shortcut(self.model, self.loss_fn, inputs, found.groups, self._optimizers[0].optimizer)
            except ValueError as error:
                raise ValueError(f"engine='shortcut' cannot be used with this network: {error}") from None
        return self._shortcut.run(inputs, target)

    def _arrange(self, order: Sequence[str], trained: list[nn.Parameter]) -> Groups:
        """Return the batch's groups, given its layers in order of first use."""
        key = (tuple(order), tuple(map(id, trained)))
        found = self._known.get(key)
        if found is None:
            found = group_layers(self.model, trained, order, self._spec, self._macs or {})
            groups = [self._same.setdefault(tuple(map(id, group.parameters)), group) for group in found.groups]
            found = self._known[key] = found._replace(groups=groups)
            self._warn_of(found, trained)
        found = self._ordered(found)
        self._groups = found.groups
        return found

    def _ordered(self, found: Groups) -> Groups:
        """Return the groups in the order of this batch's updates."""
        if self.order == "forward":
            return found
        order = list(range(len(found.groups)))
        if self.order == "reverse":
            order.reverse()
        else:
            random.Random(f"{self.seed}/{self._batches}").shuffle(order)  # noqa: S311  (no secret)
        home = {name: order.index(group) for name, group in found.home.items()}
        return found._replace(groups=[found.groups[k] for k in order], home=home)

    def _warn_of(self, found: Groups, trained: list[nn.Parameter]) -> None:
        if found.unused:
            self._warn(
                "unused",
                f"Backforward: the forward does not use {', '.join(found.unused)}: not updated by batches that do not",
            )
        matrices = sum(p.dim() > 1 for p in trained)
        if self._spec == "layer" and len(found.groups) == 1 and matrices > 1 and not found.unused:
            self._warn(
                "one group",
                "Backforward: one module holds all weights, so there is one group: ordinary backpropagation;"
                " give groups as lists of parameter names",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=6)


# --- Details ----------------------------------------------------------------------------------------------------------


def _all(trained: Sequence[nn.Parameter]) -> Group:
    return Group("all", tuple(trained))


def _autocast(device: str) -> bool:
    """Return whether autocast is on; raise `ValueError` if it is float16.

    Float16 needs a gradient scaler, whose scale changes within a batch.
    """
    if not torch.is_autocast_enabled(device):
        return False
    if torch.get_autocast_dtype(device) is torch.float16:
        raise ValueError("float16 autocast needs a gradient scaler, whose scale moves within a batch: take bfloat16")
    return True


def _reduced(reduce: Reduce, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Average all gradients with one call of `reduce`."""
    present = [gradient for gradient in gradients if gradient is not None]
    flat = reduce(torch.cat([gradient.reshape(-1) for gradient in present]))
    parts = iter(flat.split([gradient.numel() for gradient in present]))
    return [None if g is None else next(parts).view_as(g).to(g.dtype) for g in gradients]
