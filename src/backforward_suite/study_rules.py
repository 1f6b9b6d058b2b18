"""Update rules between SGD and Backforward Propagation that differ from one of them in one thing.

Exact Backforward Propagation changes both the direction and the length of the upper layers' steps. Like it, each rule
here updates the layers from first to last. It computes two gradients of each layer:

    g   the stale gradient: at the weights before the batch, as in SGD
    g'  the fresh gradient: after the layers below have taken their steps of this batch

The rules differ in the gradient that the layer steps along:

    Dose(a)                 g + a (g' - g): SGD at a = 0, Backforward Propagation at a = 1
    FreshDirection          |g| g' / |g'|
    FreshLength             |g'| g / |g|
    ShiftNoise              g + |g' - g| u, with u uniform on the unit sphere

|.| is the L2 norm over all parameters of a layer. At the first layer g' = g, and every rule steps along g.

Each pass runs the whole forward. The network must have no dropout and no batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backforward.data_norm import DataNorm
from backforward.models.init import generator
from backforward.rules import Backforward, Group, StepResult

LossFunction = Callable[[Any, Any], Tensor]


class _BetweenGradients:
    """The part that these rules share: the passes.

    Args:
        model: A network of one input that neither draws random numbers nor uses batch statistics.
        optimizer: Any torch optimizer that needs no closure.
        loss_fn: Maps (output, target) to a scalar loss.
        reduce: Averages a flat gradient over ranks.
        step: Takes the optimizer's step; its argument is True for the last step of a batch.
        after_update: Called with the updated parameters; their `.grad` is the gradient stepped along.

    Raises:
        ValueError: The network draws random numbers or uses batch statistics, or `max_grad_norm` or `micro_batches` is
            given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        *,
        max_grad_norm: float | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        step: Callable[[bool], None] | None = None,
        after_update: Callable[[Sequence[nn.Parameter]], None] | None = None,
        micro_batches: int = 1,
    ) -> None:
        name = type(self).__name__
        if micro_batches != 1:
            raise ValueError(f"{name} takes batches as a whole; leave out micro_batches={micro_batches}")
        if max_grad_norm is not None:
            raise ValueError(f"{name}: max_grad_norm={max_grad_norm} would change the lengths that it compares")
        if unfit := next((module for module in model.modules() if _differs_by_pass(module)), None):
            raise ValueError(f"{name} needs a network without dropout and batch statistics, not {unfit}")
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self._reduce = reduce
        self._step = step if step is not None else lambda _last: optimizer.step()
        self._after_update = after_update
        # Checks the arguments, and finds the layers in forward order.
        self._layers = Backforward(model, optimizer, loss_fn, engine="naive")
        self._groups: list[Group] = []
        self._batches = 0

    def prepare(self, x: Any) -> None:
        """Find the layers from the inputs of a batch."""
        self._layers.prepare(x)
        self._groups = self._layers.groups

    def set_epoch(self, epoch: int, batch: int | None = None) -> None:
        """Tell the rule how many batches precede an epoch (see `UpdateRule.set_epoch`)."""
        if batch is not None:
            self._batches = batch

    def step(self, x: Any, y: Any) -> StepResult:
        """Train on one mini-batch (see `UpdateRule.step`)."""
        if not self._groups:
            self.prepare(x)
        every = [parameter for _, parameters in self._groups for parameter in parameters]
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for k, (_, parameters) in enumerate(self._groups):
            output = self.model(x)
            loss = self.loss_fn(output, y)
            if k == 0:
                result = StepResult(loss.detach(), output.detach())
                stale = dict(zip(every, torch.autograd.grad(loss, every), strict=True))
                along = [self._averaged(stale[parameter]) for parameter in parameters]
            else:
                fresh = torch.autograd.grad(loss, parameters)
                along = self._mixed(k, [stale[parameter] for parameter in parameters], fresh)
            for parameter, gradient in zip(parameters, along, strict=True):
                parameter.grad = gradient
            self._step(k == len(self._groups) - 1)
            if self._after_update is not None:
                with torch.no_grad():
                    self._after_update(parameters)
            for parameter in parameters:
                parameter.grad = None
            torch.clear_autocast_cache()  # it has casts of the old weights
        self._batches += 1
        return result

    def _averaged(self, gradient: Tensor) -> Tensor:
        return gradient if self._reduce is None else self._reduce(gradient.reshape(-1)).view_as(gradient)

    def _mixed(self, k: int, stale: Sequence[Tensor], fresh: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient that layer k steps along."""
        g, f = (torch.cat([self._averaged(tensor).reshape(-1) for tensor in tensors]) for tensors in (stale, fresh))
        parts = self.along(g, f, k).split([tensor.numel() for tensor in stale])
        return [part.view_as(tensor) for part, tensor in zip(parts, stale, strict=True)]

    def along(self, stale: Tensor, fresh: Tensor, layer: int) -> Tensor:
        """Return the flat gradient that a layer steps along.

        Args:
            stale: Its flat gradient before the batch.
            fresh: The same after the layers below have been updated.
            layer: Its index in forward order, from 0.
        """
        raise NotImplementedError


class Dose(_BetweenGradients):
    """Step along g + a (g' - g): remove the share `a` of the shift.

    Bitwise SGD at a = 0 and Backforward Propagation at a = 1. At 2 it corrects twice as much, at -1 it doubles
    the shift.

    Args:
        model, optimizer, loss_fn: See `UpdateRule`.
        dose: a, any finite number.
        hooks: See `UpdateRule`.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: LossFunction, dose: float, **hooks: Any
    ) -> None:
        super().__init__(model, optimizer, loss_fn, **hooks)
        self.dose = float(dose)

    def along(self, stale: Tensor, fresh: Tensor, layer: int) -> Tensor:
        """Return the mixed gradient (see the class)."""
        return torch.lerp(stale, fresh, self.dose)  # exact at 0 and 1


class FreshDirection(_BetweenGradients):
    """Step along the fresh gradient, at the stale one's length: |g| g' / |g'|."""

    def along(self, stale: Tensor, fresh: Tensor, layer: int) -> Tensor:
        """Return the mixed gradient (see the class)."""
        return _at_length_of(stale, fresh)


class FreshLength(_BetweenGradients):
    """Step along the stale gradient, at the fresh one's length: |g'| g / |g|."""

    def along(self, stale: Tensor, fresh: Tensor, layer: int) -> Tensor:
        """Return the mixed gradient (see the class)."""
        return _at_length_of(fresh, stale)


class ShiftNoise(_BetweenGradients):
    """Step along g + |g' - g| u with u uniform on the unit sphere: as far from g as g' is, in a random direction.

    Args:
        model, optimizer, loss_fn: See `UpdateRule`.
        seed: The seed of u, which also depends on the layer and on the number of earlier batches, on nothing else.
        hooks: See `UpdateRule`.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: LossFunction, seed: int, **hooks: Any
    ) -> None:
        super().__init__(model, optimizer, loss_fn, **hooks)
        self.seed = seed

    def along(self, stale: Tensor, fresh: Tensor, layer: int) -> Tensor:
        """Return the mixed gradient (see the class)."""
        draw = generator("ShiftNoise", self.seed, self._batches, layer)
        noise = torch.randn(len(stale), generator=draw).to(stale)
        return stale + _at_length_of(fresh - stale, noise)


def _at_length_of(measure: Tensor, direction: Tensor) -> Tensor:
    """Scale a vector to the length of another one; a zero vector stays zero."""
    length = direction.norm()
    return direction * torch.where(length > 0, measure.norm() / length, torch.zeros_like(length))


def _differs_by_pass(module: nn.Module) -> bool:
    """Whether a second forward of a module draws new random numbers or changes statistics."""
    drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return drops or batch or (isinstance(module, DataNorm) and module.kind == "batch")
