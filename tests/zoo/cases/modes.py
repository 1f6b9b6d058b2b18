"""Autograd's modes, backwards written by hand, hooks, and derivatives taken within a forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tests.zoo.entry import CLASSES, FEATURES, ROWS, Cases, generator, labels, sequences, vectors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

MODES = Cases()


class Two(nn.Module):
    """Two linear layers, and what a case does between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.between(torch.tanh(self.first(x))))))

    def between(self, h: Tensor) -> Tensor:
        return h


# --- Grad modes ------------------------------------------------------------------------------------------------------


@MODES.add()
class NoGradBlock(Two):
    """A mean taken under no_grad is a constant for the backward."""

    def between(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            mean = h.mean(0)
        return h - mean


@MODES.add()
class NoGradMethod(Two):
    """A method decorated with no_grad."""

    @torch.no_grad()
    def scale(self, h: Tensor) -> Tensor:
        return h.std(0) + 1

    def between(self, h: Tensor) -> Tensor:
        return h / self.scale(h)


@MODES.add()
class NoGradOnWeights(Two):
    """A norm of the next layer's weights taken under no_grad."""

    def between(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            norm = self.middle.weight.norm()
        return h * norm


@MODES.add()
class GradModeSwitched(Two):
    """set_grad_enabled called as a function, off and on again."""

    def between(self, h: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        peak = h.abs().max()
        torch.set_grad_enabled(True)
        return h / (peak + 1)


def _tune(model: nn.Module, i: int) -> None:
    model.tune = i >= 2


@MODES.add(between=_tune)
class TrunkTunedLater(Two):
    """A trunk under set_grad_enabled(flag): the flag changes between batches, and the trunk joins."""

    tune = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.tune):
            h = torch.tanh(self.middle(torch.tanh(self.first(x))))
        return self.head(h)


@MODES.add()
class FrozenTrunk(Two):
    """A trunk under no_grad is not trained, though the optimizer holds its weights."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.tanh(self.middle(torch.tanh(self.first(x))))
        return self.head(h)


@MODES.add()
class EnableGradWithin(Two):
    """enable_grad inside no_grad: the middle is trained, the first is not."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.tanh(self.first(x))
            with torch.enable_grad():
                h = torch.tanh(self.middle(h))
        return self.head(h)


@MODES.add()
class InferenceTrunk(Two):
    """A trunk in inference mode, cloned to leave it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.middle(h.clone())))


@MODES.add()
class DetachedBranch(Two):
    """One branch is detached, as in BYOL or a stopped target."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.middle(h)) + h.detach())


@MODES.add()
class AutocastBlock(Two):
    """bfloat16 autocast around a part of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        with torch.autocast("cpu", torch.bfloat16):
            h = torch.tanh(self.middle(h))
            h = torch.tanh(self.middle(h))
        return self.head(h.float())


@MODES.add()
class AutocastMethod(Two):
    """autocast as a decorator, and switched off again inside."""

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(torch.tanh(self.first(x)))
        with torch.autocast("cpu", enabled=False):
            return self.head(torch.tanh(h.float()))


def _coarse(t: Tensor) -> Tensor:
    return t.to(torch.bfloat16) if t.is_floating_point() else t


def _fine(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() else t


@MODES.add()
class SavedTensorsHooks(Two):
    """Tensors saved for the backward are rounded, so the gradient differs from that without the hooks."""

    def between(self, h: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(_coarse, _fine):
            return h * h.sin()


@MODES.add()
class SaveOnCpu(Two):
    """save_on_cpu around a part."""

    def between(self, h: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return h * h.exp()


@MODES.add(batches=sequences)
class SdpaKernel(nn.Module):
    """The kernel of scaled dot product attention is chosen by a context."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(FEATURES, 12)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        with sdpa_kernel(SDPBackend.MATH):
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(h.mean((1, 2)))


# --- Backwards written by hand ---------------------------------------------------------------------------------------


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


class _SignModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Sign.apply(x)


@MODES.add()
class StraightThroughSign(Two):
    """A sign with a straight-through backward, in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.sign = _SignModule()

    def between(self, h: Tensor) -> Tensor:
        return self.sign(h)


@MODES.add()
class BinaryWeights(nn.Module):
    """Own weights of the root go through an autograd.Function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, FEATURES) / 2)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, _Sign.apply(self.weight))))


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        return x * x * factor, x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return (g * x + h) * ctx.factor, None  # half of the true derivative: it must be this one


@MODES.add()
class SetupContext(Two):
    """A Function in setup_context style, with two outputs and an argument that is no tensor."""

    def between(self, h: Tensor) -> Tensor:
        square, line = _Square.apply(h, 0.5)
        return square + line


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def _adversarial(output: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(output[0], y) + F.cross_entropy(output[1], y % 2)


@MODES.add(loss_of=lambda model: _adversarial)
class GradientReversal(Two):
    """Domain-adversarial training: a second head behind a reversed gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.domain = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.middle(torch.tanh(self.first(x))))
        return self.head(h), self.domain(_Reverse.apply(h))


class _ClipGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.bound = bound
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clamp(-ctx.bound, ctx.bound), None


@MODES.add()
class GradientClippingFunction(Two):
    """The gradient is clamped on its way back."""

    def between(self, h: Tensor) -> Tensor:
        return _ClipGradient.apply(h, 0.01)


class _DoubleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


@MODES.add()
class DirtyFunction(Two):
    """A Function that changes its input in place (mark_dirty)."""

    def between(self, h: Tensor) -> Tensor:
        h = h + 1
        return _DoubleInPlace.apply(h)


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            gradient @ weight if ctx.needs_input_grad[0] else None,
            gradient.t() @ x if ctx.needs_input_grad[1] else None,
        )


@MODES.add()
class FunctionOfInputAndWeight(Two):
    """A Function applied to the raw input and a weight, and again between layers; it asks needs_input_grad."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(_Cached.apply(x, self.first.weight))
        return self.head(torch.tanh(_Cached.apply(h, self.middle.weight)))


@MODES.add()
class RoundStraightThrough(Two):
    """Straight-through rounding by detach."""

    def between(self, h: Tensor) -> Tensor:
        return h + ((4 * h).round() / 4 - h).detach()


@torch.library.custom_op("backforward_zoo::halve", mutates_args=())
def _halve(x: Tensor) -> Tensor:
    return x / 2


_halve.register_autograd(lambda ctx, gradient: gradient)


@MODES.add()
class CustomOperator(Two):
    """A torch.library operator with a registered backward that is not its derivative."""

    def between(self, h: Tensor) -> Tensor:
        return _halve(h)


@MODES.add(refused="use_reentrant")
class CheckpointReentrant(Two):
    """Reentrant checkpointing runs an autograd.Function around a module."""

    def between(self, h: Tensor) -> Tensor:
        return checkpoint(self.middle, h, use_reentrant=True)


# --- Hooks -----------------------------------------------------------------------------------------------------------


@MODES.add()
class TensorHook(Two):
    """A hook on an intermediate tensor halves the gradient."""

    def between(self, h: Tensor) -> Tensor:
        h.register_hook(lambda gradient: gradient / 2)
        return h


@MODES.add()
def forward_hooks() -> nn.Module:
    """Forward hooks and pre-hooks that change a module's output and input."""
    model = Two()
    model.middle.register_forward_hook(lambda module, args, output: output * 2)
    model.middle.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.head.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] - 1,), kwargs), with_kwargs=True)
    return model


@MODES.add()
def backward_hooks() -> nn.Module:
    """Backward hooks and pre-hooks on modules that scale gradients."""
    model = Two()
    model.middle.register_full_backward_hook(lambda module, inputs, outputs: tuple(g * 0.5 for g in inputs))
    model.head.register_full_backward_pre_hook(lambda module, outputs: tuple(g * 3 for g in outputs))
    return model


@MODES.add(oracle=False)  # a copy of a weight has no hooks
def weight_hook() -> nn.Module:
    """A hook on a weight keeps some of its rows still."""
    model = Two()
    keep = torch.tensor([1.0, 0, 1, 0, 1, 1]).unsqueeze(1)
    model.middle.weight.register_hook(lambda gradient: gradient * keep)
    return model


class _Recorder:
    """A forward hook with a memory: the mean activation of a layer, kept on the layer."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        module.seen.append(output.detach().mean())


@MODES.add()
def hook_that_records() -> nn.Module:
    """A forward hook appends to a list on the module: once a batch."""
    model = Two()
    model.middle.seen = []
    model.middle.register_forward_hook(_Recorder())
    return model


# --- Derivatives and transforms within a forward ---------------------------------------------------------------------


@MODES.add()
class FunctionalCall(Two):
    """functional_call with weights made from the layer's own."""

    def between(self, h: Tensor) -> Tensor:
        weights = {name: 2 * value for name, value in self.middle.named_parameters()}
        return h + torch.func.functional_call(self.middle, weights, (h,))


@MODES.add()
class VmapEnsemble(nn.Module):
    """vmap over stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.weights = nn.Parameter(torch.randn(3, 6, 6) / 3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        members = torch.func.vmap(lambda weight: torch.tanh(h @ weight))(self.weights)
        return self.head(members.mean(0))


@MODES.add()
class VmapDropout(Two):
    """vmap with its own randomness for each member."""

    def between(self, h: Tensor) -> Tensor:
        drawn = torch.func.vmap(lambda row: F.dropout(row, 0.5), randomness="different")(h)
        return h + drawn


@MODES.add()
class FuncGrad(Two):
    """torch.func.grad of an energy within the forward."""

    def between(self, h: Tensor) -> Tensor:
        force = torch.func.grad(lambda z: torch.tanh(self.middle(z)).square().sum())(h)
        return h - 0.1 * force


@MODES.add()
class ForwardDerivative(Two):
    """torch.func.jvp within the forward."""

    def between(self, h: Tensor) -> Tensor:
        value, slope = torch.func.jvp(lambda z: torch.tanh(self.middle(z)), (h,), (torch.ones_like(h),))
        return value + slope


@MODES.add()
class AutogradGrad(Two):
    """autograd.grad with create_graph within the forward, as in force fields."""

    def between(self, h: Tensor) -> Tensor:
        energy = torch.tanh(self.middle(h)).square().sum()
        (force,) = torch.autograd.grad(energy, h, create_graph=True)
        return h - 0.1 * force


def _points() -> list[tuple[Any, Any]]:
    g = generator()
    return [(torch.randn(ROWS, FEATURES, generator=g).requires_grad_(), labels(ROWS, g)) for _ in range(3)]


@MODES.add(batches=_points)
class GradientOfInput(Two):
    """The input requires a gradient, and the forward takes it."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        (slope,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
        return h + slope[:, :CLASSES]


def _penalised(model: nn.Module) -> Any:
    def loss(output: Any, y: Tensor) -> Tensor:
        x, logits = output
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, y) + slope.square().sum()

    return loss


@MODES.add(loss_of=_penalised)
class GradientPenalty(Two):
    """The loss differentiates the output once more, as a gradient penalty does."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        return x, super().forward(x)


def _decayed(model: nn.Module) -> Any:
    return lambda output, y: F.cross_entropy(output, y) + 0.01 * sum(p.square().sum() for p in model.parameters())


@MODES.add(loss_of=_decayed)
class WeightsInTheLoss(Two):
    """The loss reads all weights: a penalty on their squares."""


def _noisy(model: nn.Module) -> Any:
    return lambda output, y: F.cross_entropy(output + 0.1 * torch.randn_like(output), y)


@MODES.add(loss_of=_noisy)
class NoiseInTheLoss(Two):
    """The loss draws random numbers."""

    def between(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.3)


class _Scaled(Tensor):
    """A tensor subclass with a torch function of its own."""


@MODES.add()
class TensorSubclass(Two):
    """The forward turns a value into a tensor subclass and back."""

    def between(self, h: Tensor) -> Tensor:
        return (h.as_subclass(_Scaled) * 2).sin().as_subclass(Tensor)


@MODES.add(batches=lambda: vectors(steps=5), optimizers=("adamw",))
class FivePlainBatches(Two):
    """Nothing special, for five batches."""
