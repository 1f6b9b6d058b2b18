"""Measures internal covariate shift: how a layer's gradient changes while the layers below it learn.

    watch = Watch(network)
    rule = Backforward(network, optimizer, loss_fn, after_update=watch.observe)
    watch.begin()                                     # before a batch whose shift to measure
    rule.step(x, y)
    for update in watch.end():
        shifts = covariate_shift(watch.replica, layers(watch.replica, x), update, lambda net: loss_fn(net(x), y))

There are two measures, for each layer i and each update of a batch. Let G_i be the gradient of the batch's loss with
respect to layer i before the update. Let G'_i be the same gradient after the layers below i have taken their actual
step (with momentum, weight decay, clipping, projection), while layer i and those above are unchanged. Let g_i be the
gradient along which the update rule stepped.

- *Induced shift*, between G_i and G'_i (Santurkar et al., "How Does Batch Normalization Help Optimization?", NeurIPS
  2018, section 2.2): how much the layers below change layer i's gradient. For i > 1 it is nonzero under every rule.
- *Applied shift*, between g_i and G'_i: how outdated the gradient is along which layer i steps. Under ordinary
  backpropagation g_i = G_i, so it equals the induced shift; under exact Backforward Propagation it is 0.

G'_i is recomputed on a copy of the network and never taken from the update rule, so the measure exposes a rule that
uses outdated gradients. The functions change only the copy that they are given, and its generators.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backforward.batch import Generators, Inputs
from backforward.groups import Group, group_layers, survey

Loss = Callable[[nn.Module], Tensor]
Reduce = Callable[[Tensor], Tensor]


# --- Layers -----------------------------------------------------------------------------------------------------------


def layers(network: nn.Module, x: Any) -> list[Group]:
    """Return the parametric layers in forward order, each with the parameters of its normalisation layer.

    Args:
        network: Any network; its buffers and the generators stay unchanged.
        x: A batch of inputs, or a tuple of several inputs.

    Returns:
        (name, trainable parameters) of each layer, without those that are frozen or unused in the forward.
    """
    trainable = [p for p in network.parameters() if p.requires_grad]
    return group_layers(network, trainable, survey(network, Inputs.of(x)).order.used, "layer", {}).groups


def block_name(layer: str, others: Iterable[str]) -> str:
    """Return the largest module that contains this layer and none of the others: usually with its norm and activation.

    All names are qualified. The result is the layer's own name if its parent contains other layers too.
    """
    strangers = [name for name in others if name != layer]
    block = layer
    while "." in block:
        parent = block.rpartition(".")[0]
        if any(name == parent or name.startswith(f"{parent}.") for name in strangers):
            break
        block = parent
    return block


# --- Covariate shift --------------------------------------------------------------------------------------------------


class Shift(NamedTuple):
    """The difference between a gradient and the layer's gradient G' after the update of the layers below.

    Attributes:
        distance: L2 norm of the difference.
        relative: That norm divided by the norm of G'.
        cosine: Cosine of the angle between them.
    """

    distance: Tensor
    relative: Tensor
    cosine: Tensor


class LayerShift(NamedTuple):
    """The shift of one layer in one update.

    Attributes:
        layer: The layer's name.
        induced: Between its gradient before the update and G'.
        applied: Between the gradient stepped along and G'; None if the update left this layer out.
    """

    layer: str
    induced: Shift
    applied: Shift | None


@dataclass
class Update:
    """One update of a batch, as lists in the order of `network.parameters()`.

    Attributes:
        before: The parameters before the update.
        after: The parameters after the update.
        gradients: The gradient that each stepped along; None for a parameter that the update left out.
    """

    before: list[Tensor]
    after: list[Tensor]
    gradients: list[Tensor | None]


def compare(gradient: Tensor, real: Tensor) -> Shift:
    """Compare a flat gradient with the real one, in double precision."""
    double = real.double()
    norm = double.norm()
    if torch.equal(gradient, real):  # true for half of the calls, and costs a sixth of the comparison
        distance, product, length = 0 * norm, norm * norm, norm
    else:
        gradient = gradient.double()
        distance, product, length = (gradient - double).norm(), gradient @ double, gradient.norm()
    return Shift(distance, distance / norm, product / (length * norm))


def covariate_shift(
    replica: nn.Module, layers: Sequence[Group], update: Update, loss: Loss, reduce: Reduce | None = None
) -> list[LayerShift]:
    """Return the induced and applied shift of every layer in one update; costs one forward and backward per layer.

    Args:
        replica: A copy of the network; its parameters are overwritten.
        layers: The copy's layers in forward order (see `layers`).
        update: The update.
        loss: Maps the copy to the loss of the batch; must be the same function at every call (draws, statistics).
        reduce: Averages a flat gradient over ranks, as in the update rule.

    Returns:
        One entry per layer. The first layer's induced shift is 0, since no layer lies below it.
    """
    own = list(replica.parameters())
    place = {id(p): i for i, p in enumerate(own)}
    write(own, update.before)
    every = [p for layer in layers for p in layer.parameters]
    before = dict(zip(map(id, every), torch.autograd.grad(loss(replica), every, materialize_grads=True), strict=True))

    def flat(gradients: Iterable[Tensor]) -> Tensor:
        joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
        return joined if reduce is None else reduce(joined)

    shifts = []
    for k, layer in enumerate(layers):
        first = flat(before[id(p)] for p in layer.parameters)
        real = first
        if k:
            moved = [place[id(p)] for p in layers[k - 1].parameters]
            write([own[i] for i in moved], [update.after[i] for i in moved])
            real = flat(torch.autograd.grad(loss(replica), layer.parameters, materialize_grads=True))
        taken = [update.gradients[place[id(p)]] for p in layer.parameters]
        stepped = None if all(g is None for g in taken) else _joined(taken, layer.parameters)
        shifts.append(LayerShift(layer.name, compare(first, real), None if stepped is None else compare(stepped, real)))
    return shifts


def _joined(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])


def write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Overwrite parameters in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


class Watch:
    """Records the updates that a rule makes in one batch, through its `after_update` hook.

    A new update begins when a parameter is updated a second time: one pass of Backforward Propagation over all layers
    is one update, its joint pass another, and each repeat of `Backprop` another.

    Args:
        network: The network that the rule trains.

    Attributes:
        replica: A copy of the network to measure on.
    """

    def __init__(self, network: nn.Module) -> None:
        self.replica = copy.deepcopy(network)
        self._network = network
        self._parameters = list(network.parameters())
        self._place = {id(p): i for i, p in enumerate(self._parameters)}
        self._generators = Generators(p.device for p in self._parameters)
        self._watching = False
        self._updates: list[Update] = []
        self._start: list[Tensor] = []
        self._buffers: list[Tensor] = []

    def begin(self) -> None:
        """Begin a batch: save weights, buffers, modes and the generators' states."""
        weights = [p.detach().clone() for p in self._parameters]
        self._updates = [Update(weights, list(weights), [None] * len(weights))]
        self._buffers = [buffer.clone() for buffer in self._network.buffers()]
        self._start = self._generators.save()
        for mine, theirs in zip(self.replica.modules(), self._network.modules(), strict=True):
            mine.training = theirs.training
        self._watching = True

    def observe(self, parameters: Sequence[nn.Parameter]) -> None:
        """Record a step of these parameters, with the gradients in their `.grad`."""
        if not self._watching:
            return
        update = self._updates[-1]
        places = [self._place[id(p)] for p in parameters]
        if any(update.gradients[i] is not None for i in places):
            update = Update(list(update.after), list(update.after), [None] * len(self._parameters))
            self._updates.append(update)
        for i, parameter in zip(places, parameters, strict=True):
            update.after[i] = parameter.detach().clone()
            update.gradients[i] = None if parameter.grad is None else parameter.grad.detach().clone()

    def end(self) -> list[Update]:
        """End the batch and return its updates."""
        self._watching = False
        return self._updates

    def as_before(self) -> None:
        """Set the copy's buffers and the generators back to the start of the batch."""
        write(list(self.replica.buffers()), self._buffers)
        self._generators.restore(self._start)


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Restore the generators of CPU and devices at the end."""
    generators = Generators(p.device for p in network.parameters())
    states = generators.save()
    try:
        yield
    finally:
        generators.restore(states)
