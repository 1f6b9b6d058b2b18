"""The measures of `backforward.shift` the slow way, from their definitions, with nothing of the library in them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Recorder:
    """Copies the whole network before and after every optimizer step, through an update rule's hooks."""

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, project: Callable[..., None] | None
    ) -> None:
        self.network, self.optimizer, self.project = network, optimizer, project
        self.steps: list[tuple[nn.Module, nn.Module, dict[str, Tensor]]] = []

    def step(self, last: bool) -> None:
        gradients = {name: p.grad.clone() for name, p in self.network.named_parameters() if p.grad is not None}
        self.steps.append((copy.deepcopy(self.network), self.network, gradients))
        self.optimizer.step()

    def after_update(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.project is not None:
            self.project(parameters)
        before, network, gradients = self.steps[-1]
        self.steps[-1] = (before, copy.deepcopy(network), gradients)

    def updates(self, lengths: Sequence[int]) -> list[tuple[nn.Module, nn.Module, dict[str, Tensor]]]:
        """Join so many consecutive steps each: network before the first, after the last, all gradients."""
        joined, start = [], 0
        for length in lengths:
            part = self.steps[start : start + length]
            gradients = {name: g for _, _, own in part for name, g in own.items()}
            joined.append((part[0][0], part[-1][1], gradients))
            start += length
        assert start == len(self.steps)
        return joined


def covariate_shift(
    before: nn.Module,
    after: nn.Module,
    gradients: dict[str, Tensor],
    layers: Sequence[Sequence[str]],
    loss: Callable[[nn.Module], Tensor],
) -> list[tuple[tuple[float, float, float], tuple[float, float, float]]]:
    """For each layer, named by its parameters: (L2, relative, cosine) of the induced and of the applied shift."""
    found = []
    for i, names in enumerate(layers):
        below = {name for layer in layers[:i] for name in layer}
        mixed = copy.deepcopy(before)
        with torch.no_grad():
            for name, parameter in mixed.named_parameters():
                if name in below:
                    parameter.copy_(after.get_parameter(name))
        real = gradient_of(mixed, names, loss)
        first = gradient_of(copy.deepcopy(before), names, loss)
        stepped = [value for name in names for value in gradients[name].flatten().tolist()]
        found.append((apart(first, real), apart(stepped, real)))
    return found


def gradient_of(network: nn.Module, names: Sequence[str], loss: Callable[[nn.Module], Tensor]) -> list[float]:
    network.zero_grad()
    loss(network).backward()
    return [value for name in names for value in network.get_parameter(name).grad.flatten().tolist()]


def apart(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)))
    norms = [math.sqrt(sum(a * a for a in values)) for values in (one, other)]
    return distance, distance / norms[1], sum(a * b for a, b in zip(one, other, strict=True)) / (norms[0] * norms[1])


def input_moments(network: nn.Module, layer: str, x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each unit that arrives at a layer, over samples and positions."""
    seen = []
    module = network.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        network(x)
    handle.remove()
    means, stds = [], []
    for unit in range(seen[0].shape[1]):
        values = seen[0][:, unit].flatten().tolist()
        mean = sum(values) / len(values)
        means.append(mean)
        stds.append(math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)))
    return means, stds


def finite_difference_jacobian(block: nn.Module, x: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences, entry by entry, of a block in double precision: ``[outputs, inputs]``, all positions."""
    columns = []
    with torch.no_grad():
        for i in range(x.numel()):
            nudge = torch.zeros_like(x).flatten()
            nudge[i] = step
            nudge = nudge.view_as(x)
            columns.append((block((x + nudge)[None])[0] - block((x - nudge)[None])[0]).flatten() / (2 * step))
    return torch.stack(columns, dim=1)


def hessian(network: nn.Module, loss: Callable[[Any], Tensor]) -> Tensor:
    """The whole matrix, row by row."""
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss(network), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in flat]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def incoherence(W: list[list[float]]) -> tuple[float, float, float, float]:
    """Coherence, ||Sigma - diag(alpha)||_F, printed bound (NaN if imaginary), mended bound, by loops."""
    m = len(W)

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    pairs = [(i, j) for i in range(m) for j in range(m) if i != j]
    mu = max(abs(dot(W[i], W[j])) / math.sqrt(dot(W[i], W[i]) * dot(W[j], W[j])) for i, j in pairs)
    distance = math.sqrt(sum(dot(W[i], W[j]) ** 2 for i, j in pairs))
    squares = [dot(row, row) for row in W]
    printed = sum(s * (1 - s) for s in squares) + sum(m * (m - 1) * mu**2 * squares[i] * squares[j] for i, j in pairs)
    mended = mu * math.sqrt(sum(squares[i] * squares[j] for i, j in pairs))
    return mu, distance, math.sqrt(printed) if printed >= 0 else math.nan, mended


class StaleBackforward:
    """What claims to be Backforward Propagation, and is not: groups step in turn, along gradients from before all."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Tensor],
        *,
        step: Callable[[bool], None] | None = None,
        after_update: Callable[..., None] | None = None,
        **_: Any,
    ) -> None:
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self._step = step or (lambda last: optimizer.step())
        self._after_update = after_update or (lambda parameters: None)

    def prepare(self, x: Tensor) -> None:
        """Nothing to prepare."""

    def set_epoch(self, epoch: int, batch: int | None = None) -> None:
        """All epochs are alike."""

    def step(self, x: Tensor, y: Tensor) -> Any:
        from backforward.rules import StepResult

        output = self.model(x)
        loss = self.loss_fn(output, y)
        groups = [own for module in self.model.modules() if (own := list(module.parameters(recurse=False)))]
        gradients = [torch.autograd.grad(loss, group, retain_graph=True) for group in groups]
        for k, (group, own) in enumerate(zip(groups, gradients, strict=True)):
            for parameter, gradient in zip(group, own, strict=True):
                parameter.grad = gradient
            self._step(k == len(groups) - 1)
            self._after_update(group)
            for parameter in group:
                parameter.grad = None
        return StepResult(loss.detach(), output.detach())
