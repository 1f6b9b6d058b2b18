"""The `shortcut` engine: for a chain of linear layers under plain SGD, a layer's new output follows from its step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backforward.batch import Inputs, LossFunction, World, may_draw, tensors_in
from backforward.engines import Pass
from backforward.groups import Group


class _Call(NamedTuple):
    """A call of torch."""

    func: Any
    args: Any
    kwargs: Any
    out: Any
    in_place: bool


class _Recorder(TorchFunctionMode):
    """Records all calls that make tensors or change one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = [(tensor, tensor._version) for tensor in tensors_in([args, kwargs])]
        out = func(*args, **kwargs)
        in_place = any(tensor._version != version for tensor, version in before)
        if in_place or next(tensors_in(out), None) is not None:
            self.calls.append(_Call(func, args, kwargs, out, in_place))
        return out


def linear_chain(
    model: nn.Module, inputs: Inputs
) -> tuple[Callable[[Tensor], Tensor], list[nn.Linear], list[Callable[[Tensor], Tensor]]]:
    """Watch one forward of a network and split it into linear layers in a row, with fixed functions between them.

    Returns:
        The function from the input to the first layer; the layers; for each layer the function from its output to the
        next layer, or to the network's output.

    Raises:
        ValueError: The network is no such chain; the message says why.
    """
    given = [*inputs.args, *inputs.kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor):
        raise ValueError("it takes more than one tensor, so it is not a chain")
    of_weight = {
        id(module.weight): (name, module) for name, module in model.named_modules() if type(module) is nn.Linear
    }
    owner = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
    state = torch.default_generator.get_state()
    world = World(model, set())
    world.unseen = True
    try:
        with _Recorder() as recorder:
            output = model(*inputs.args, **inputs.kwargs)
        drew = not torch.equal(state, torch.default_generator.get_state())
    finally:
        torch.default_generator.set_state(state)
        world.end()
    linears: list[nn.Linear] = []
    runs: list[list[_Call]] = [[]]
    starts = [given[0]]
    value = given[0]  # the next call of the chain must take this
    chained = {id(value)}
    for call in recorder.calls:
        taken = [t for t in tensors_in([call.args, call.kwargs]) if id(t) in chained]
        weights = [t for t in tensors_in([call.args, call.kwargs]) if id(t) in owner]
        if not taken and not weights:
            runs[-1].append(call)  # computed from buffers and constants alone
            continue
        if len(taken) != 1 or taken[0] is not value:
            raise ValueError("its operations are no chain")
        if weights:
            name, linear = of_weight.get(id(weights[0]), (owner[id(weights[0])], None))
            if call.func is not F.linear or linear is None or linear in linears:
                raise ValueError(f"{name} is no linear layer used once")
            linears.append(linear)
            runs.append([])
            starts.append(call.out)
        else:
            runs[-1].append(call)
        value = call.out
        chained.add(id(value))
    if drew:
        raise ValueError("its forward may draw random numbers")
    if not linears:
        raise ValueError("it has no linear layer")
    if value is not output:
        raise ValueError("its operations are no chain")
    before, *after = [_function(run, start) for run, start in zip(runs, starts, strict=True)]
    return before, linears, after


def identity(value: Tensor) -> Tensor:
    """Return the value: the function between two adjacent layers."""
    return value


def _function(run: Sequence[_Call], start: Tensor) -> Callable[[Tensor], Tensor]:
    """Return recorded calls as a function: `identity` if there are none, `torch.relu` if it is the only one.

    The function never changes its argument, even if the calls do.
    """
    if not run:
        return identity
    if len(run) == 1 and run[0].func in {torch.relu, F.relu, Tensor.relu}:
        return torch.relu
    places = {id(start): 0}
    calls = []
    for i, call in enumerate(run, start=1):
        calls.append((call.func, _placed(call.args, places), _placed(call.kwargs, places)))
        places[id(call.out)] = i  # an in-place call returns the same tensor with a new value
    in_place = any(call.in_place for call in run)

    def function(value: Tensor) -> Tensor:
        values = [value.clone() if in_place else value]
        for func, args, kwargs in calls:
            values.append(func(*_given(args, values), **_given(kwargs, values)))
        return values[-1]

    return function


class _Place(NamedTuple):
    """Stands for a value computed earlier."""

    number: int


def _placed(value: Any, places: dict[int, int]) -> Any:
    if isinstance(value, Tensor):
        return _Place(places[id(value)]) if id(value) in places else value
    if isinstance(value, dict):
        return {key: _placed(item, places) for key, item in value.items()}
    return type(value)(_placed(item, places) for item in value) if type(value) in (tuple, list) else value


def _given(value: Any, values: list[Tensor]) -> Any:
    if type(value) is _Place:
        return values[value.number]
    if isinstance(value, dict):
        return {key: _given(item, values) for key, item in value.items()}
    return type(value)(_given(item, values) for item in value) if type(value) in (tuple, list) else value


def _alike(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return len(now) == len(then) and all(now.get(key) is value for key, value in then.items())


class Shortcut:
    """Computes the passes of a chain of linear layers under plain SGD without a forward of each layer's new weights.

    When a layer is updated, its input h [n, d_in] is final. With d [n, d_out] the gradient at its
    output z = h W^T + b, the step of W by -lr d^T h and of b by -lr 1^T d changes the output to

        z - lr (h h^T + 1 1^T) d,

    which costs n^2 (d_in + d_out) multiply-accumulates instead of the layer's n d_in d_out. The engine uses it if
    n < d_in d_out / (d_in + d_out). It computes the layers, ReLU and the mean cross-entropy and their derivatives
    directly; autograd handles other activations and losses. It takes the steps itself with the optimizer's learning
    rates, adding d^T h to the weight without storing the gradient; the optimizer's own step at the end of the batch
    finds no gradients and only counts.

    Mathematically exact, but not bitwise.

    Raises:
        ValueError: The network is no such chain, or the loss may draw.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        inputs: Inputs,
        groups: Sequence[Group],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        before, linears, after = linear_chain(model, inputs)
        if [set(group.parameters) for group in groups] != [set(linear.parameters()) for linear in linears]:
            raise ValueError("every linear layer must be trained, weight and bias")
        if may_draw(loss_fn):
            raise ValueError("the loss may draw random numbers: give one of torch.nn or torch.nn.functional")
        self._loss_fn = loss_fn
        self._optimizer = optimizer
        self._before = before
        self._layers = [(linear.weight, linear.bias, then) for linear, then in zip(linears, after, strict=True)]
        self._settings = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._every = Group("all", tuple(p for group in groups for p in group.parameters))
        self._state = [(vars(module), dict(vars(module))) for module in model.modules()]
        self._buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]

    def outdated(self, trained: Sequence[nn.Parameter]) -> bool:
        """Return whether the network has changed since its forward was watched."""
        same = [id(p) for p in trained] == [id(p) for p in self._every.parameters]
        return not (same and all(_alike(now, then) for now, then in [*self._state, *self._buffers]))

    def run(self, inputs: Inputs, target: Any) -> Generator[Pass, None, None]:
        """Yield one pass, with output and loss before the batch's updates, which are already made."""
        require_plain_sgd(self._optimizer)
        (x,) = [*inputs.args, *inputs.kwargs.values()]
        if torch.is_autocast_enabled(x.device.type):
            raise ValueError("engine='shortcut' needs full precision: no autocast")
        with torch.no_grad():
            output, loss = self._batch(x, target)
        yield Pass(self._every, output, loss, [None] * len(self._every.parameters), True)

    def _batch(self, x: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """Update the layers in turn; return the output and loss before any update."""
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
        """Return the output, the loss, and the loss's gradient at the output z of layer k."""
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
        """Take the step of layer k and return its new output (for the last layer the old one, which nothing uses)."""
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
    """Return an elementwise function's value at z, and the function that takes a gradient back through it."""
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
    """Return the loss and its gradient with respect to the output."""
    if _is_cross_entropy(loss_fn) and output.dim() == 2 and target.dtype is torch.long:
        aten = torch.ops.aten  # the kernels that autograd uses
        log_p = torch.log_softmax(output, 1)
        loss, count = aten.nll_loss_forward.default(log_p, target, None, 1, -100)
        slope = aten.nll_loss_backward.default(torch.ones_like(loss), log_p, target, None, 1, -100, count)
        return loss, aten._log_softmax_backward_data.default(slope, log_p, 1, log_p.dtype)
    with torch.enable_grad():
        at = output.detach().requires_grad_()
        loss = loss_fn(at, target)
        return loss.detach(), torch.autograd.grad(loss, at)[0]


def _is_cross_entropy(loss_fn: LossFunction) -> bool:
    """Return whether the loss is the plain mean cross-entropy."""
    if type(loss_fn) is nn.CrossEntropyLoss:
        plain = loss_fn.weight is None and loss_fn.ignore_index == -100
        return plain and loss_fn.reduction == "mean" and loss_fn.label_smoothing == 0
    return loss_fn is F.cross_entropy


def require_plain_sgd(optimizer: Any) -> None:
    """Raise `ValueError` unless the optimizer's step is -lr times the gradient."""
    if type(optimizer) is not torch.optim.SGD:
        raise ValueError(f"engine='shortcut' needs torch.optim.SGD, not {type(optimizer).__name__}")
    for group in optimizer.param_groups:
        if group["momentum"] or group["weight_decay"] or group["maximize"]:
            raise ValueError("engine='shortcut' needs plain SGD: no momentum, weight decay or maximize")
