"""Many networks of one shape as a single network, whose layers hold the weights of all of them.

    network = stack([one, other, ...])     # x [R, B, ...] -> logits [R, B, classes], one batch for each of R networks
    loss = StackLoss()                     # the sum of the networks' losses
    optimizer = StackedSGD(network, names_of_the_parameters_by_group, optimizers_of_the_single_ones)
    rule = StackedRule(Backforward(network, optimizer, loss), loss)

The networks share nothing, so that the gradient of the sum of their losses is each one's own gradient: an update rule
needs no word of this. What it saves is everything that costs the same for one network as for many: Python, launches,
processes. The products themselves are as many as before.

Depends on torch, `normprop` and `rules` only.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from backforward.normprop import DataNorm, NormPropLinear, project_unit_norm_
from backforward.rules import Result, Rule

_LAYERS = (nn.Linear, NormPropLinear, nn.Flatten)  # further ones that act on each sample alone
_ELEMENTWISE = "torch.nn.modules.activation"  # where activations live


class StackedLayer(nn.Module):
    """A layer with a leading dimension for the network: x ``[R, B, ...]``, parameters ``[R, ...]`` under their names.

    Args:
        layers: One of each network, alike but for their weights.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        # In a list, so that its parameters are none of this layer's.
        self._one = [copy.deepcopy(layers[0]).to("meta")]
        parameters, buffers = stack_module_state(list(layers))
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(self.laid_out(name, value.detach())))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def laid_out(self, name: str, value: Tensor) -> Tensor:
        """Lay a parameter out in memory as its gradient will be: going across it would cost half a product's time."""
        if isinstance(self._one[0], nn.Linear) and name == "weight":  # `forward` has weights [R, in, out]
            return value.transpose(1, 2).contiguous().transpose(1, 2)
        return value

    @property
    def projected(self) -> bool:
        """Whether NormProp scales each unit's weights to length 1 after an update."""
        return isinstance(self._one[0], NormPropLinear) and self._one[0].project

    def forward(self, x: Tensor) -> Tensor:
        """``[R, B, ...]``, each network's batch through its own layer."""
        if isinstance(self._one[0], nn.Linear) and x.dim() == 3:  # what vmap comes to, in one call
            weight, bias = self._parameters["weight"], self._parameters.get("bias")
            assert weight is not None
            by_input = weight.transpose(1, 2)
            return x @ by_input if bias is None else torch.baddbmm(bias[:, None], x, by_input)

        def one(state: dict[str, Tensor], inputs: Tensor) -> Any:
            return functional_call(self._one[0], state, (inputs,))

        # A view of each, outside vmap, within which an update rule that looks for a network's layers sees nothing.
        held = [*self._parameters.items(), *self._buffers.items()]
        state = {name: value.view_as(value) for name, value in held if value is not None}
        return cast(Tensor, vmap(one)(state, x))

    def extra_repr(self) -> str:
        """The layer that it stands for."""
        return repr(self._one[0])


def stack(networks: Sequence[nn.Module]) -> nn.Module:
    """Networks of one shape as a single one; its state has their keys, and a leading dimension for the network.

    Args:
        networks: Sequences, nested if need be, of linear and fully connected NormProp layers, activations, and a
            `DataNorm` that the training set has fixed. All alike but for their weights.

    Raises:
        ValueError: They hold something else, such as BatchNorm's running statistics, or dropout, of which each network
            draws its own.
    """
    first = networks[0]
    if isinstance(first, nn.Sequential):
        children = zip(*(network.named_children() for network in networks), strict=True)
        return nn.Sequential(OrderedDict((named[0][0], stack([child for _, child in named])) for named in children))
    of_the_data = isinstance(first, DataNorm) and first.kind != "batch"
    if of_the_data or (type(first).__module__ == _ELEMENTWISE and not list(first.parameters())):
        return copy.deepcopy(first)  # the same for one network as for many
    if not isinstance(first, _LAYERS):
        raise ValueError(f"{type(first).__name__} cannot be stacked")  # noqa: TRY004  (a right type, a wrong layer)
    return StackedLayer(networks)


def unstack_(network: nn.Module, place: int, stacked: nn.Module) -> None:
    """Copy the weights of one network of a stack into it."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(stacked.get_parameter(name)[place])


def keep_(stacked: nn.Module, places: Tensor) -> None:
    """Leave only the networks at these places (int64) in a stack."""
    for layer in stacked.modules():
        if isinstance(layer, StackedLayer):
            for held in (layer._parameters, layer._buffers):
                for name, value in held.items():
                    if value is not None:
                        kept = layer.laid_out(name, value.data[places])
                        # Where a graph of the whole stack is still held, autograd would go on to ask for gradients of
                        # its shape. A change of type makes it forget; one of the shape alone does not.
                        value.data = kept.new_empty(0, dtype=torch.half if kept.dtype != torch.half else torch.float)
                        value.data = kept


def projection(stacked: nn.Module) -> Callable[[Iterable[Tensor]], None]:
    """The hook ``after_update`` of an update rule: the stack's form of `normprop.unit_norm_projection`."""
    hidden = {layer.weight for layer in stacked.modules() if isinstance(layer, StackedLayer) and layer.projected}

    def after_update(parameters: Iterable[Tensor]) -> None:
        # The units of all networks, one below the other.
        project_unit_norm_(parameter.flatten(0, 1) for parameter in parameters if parameter in hidden)

    return after_update


class StackLoss:
    """The sum of the networks' mean cross-entropies.

    Attributes:
        seen: The loss of each network, detached [R], in each pass since it was emptied.
    """

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """Logits [R, B, classes] and labels [R, B] to a scalar."""
        losses = stack_losses(logits, y)
        self.seen.append(losses.detach())
        return losses.sum()


class StackedRule:
    """An update rule of a stack, whose result has the loss of each network in the place of their sum.

    Args:
        rule: Made with the stack, its optimizer, and `loss`.
        loss: The stack's.
    """

    def __init__(self, rule: Rule, loss: StackLoss) -> None:
        self.rule, self.loss = rule, loss

    @property
    def active(self) -> Rule:
        """The rule of this epoch."""
        return getattr(self.rule, "active", self.rule)

    def prepare(self, x: Tensor) -> None:
        """Plan the passes for batches such as x [R, B, ...]."""
        self.rule.prepare(x)

    def set_epoch(self, epoch: int, batch: int | None = None) -> None:
        """Say which epoch begins (from 0)."""
        self.rule.set_epoch(epoch, batch)

    def step(self, x: Tensor, y: Tensor) -> Result:
        """Let a mini-batch of each network, x [R, B, ...] and y [R, B], change its weights; losses are [R]."""
        self.loss.seen.clear()
        out = self.rule.step(x, y)
        seen = self.loss.seen
        return Result(seen[0], out.output, None if out.joint_loss is None else seen[-1])


def stack_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy [R] of each network: logits [R, B, classes], labels [R, B]."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


class StackedSGD(torch.optim.Optimizer):
    """SGD for a stack of networks, each with a learning rate of its own.

    Args:
        stacked: The network.
        names: The parameters of each group.
        optimizers: The single networks' own `torch.optim.SGD`, which never step: schedules move their learning rates,
            and `follow` reads them. In all else they are alike.

    Raises:
        ValueError: An optimizer is not SGD, or maximises, or they differ.
    """

    def __init__(
        self, stacked: nn.Module, names: Sequence[Sequence[str]], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        for optimizer in optimizers:
            if type(optimizer) is not torch.optim.SGD:
                raise ValueError(f"{type(optimizer).__name__} is not SGD")
            if any(group["maximize"] for group in optimizer.param_groups):
                raise ValueError("a stack only minimises")
            for group, other in zip(optimizer.param_groups, optimizers[0].param_groups, strict=True):
                if any(group[key] != other[key] for key in ("momentum", "weight_decay", "dampening", "nesterov")):
                    raise ValueError("their optimizers differ in more than the learning rate")
        groups = [
            {"params": [stacked.get_parameter(name) for name in held], **{key: group[key] for key in _OF_SGD}}
            for held, group in zip(names, optimizers[0].param_groups, strict=True)
        ]
        super().__init__(groups, {})
        self.optimizers = list(optimizers)
        self.follow()

    def follow(self) -> None:
        """Take the learning rates of the single networks' optimizers.

        Into the same memory, from which a recorded step reads them.
        """
        for place, group in enumerate(self.param_groups):
            rates = [float(optimizer.param_groups[place]["lr"]) for optimizer in self.optimizers]
            of_each = torch.tensor(rates, dtype=torch.float64)
            parameter = group["params"][0]
            if "lr" not in group or group["lr"].shape != of_each.shape:
                group["lr"] = torch.empty_like(of_each, dtype=parameter.dtype, device=parameter.device)
            group["lr"].copy_(of_each, non_blocking=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """The step of `torch.optim.SGD`, learning rates [R] in the place of one."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    lr = group["lr"].view(-1, *(1,) * (parameter.dim() - 1))
                    parameter.addcmul_(self._direction(parameter, group), lr, value=-1)

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        direction = parameter.grad
        assert direction is not None
        if group["weight_decay"]:
            direction = direction.add(parameter, alpha=group["weight_decay"])
        if not group["momentum"]:
            return direction
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = direction.clone()
        else:
            state["momentum_buffer"].mul_(group["momentum"]).add_(direction, alpha=1 - group["dampening"])
        buffer: Tensor = state["momentum_buffer"]
        return direction.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer

    def keep_(self, places: Tensor) -> None:
        """Leave only the networks at these places, after `stacking.keep_` of the network."""
        self.optimizers = [self.optimizers[place] for place in places.tolist()]
        for parameter, state in self.state.items():
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"][places])
        self.follow()


_OF_SGD = ("momentum", "weight_decay", "dampening", "nesterov")
