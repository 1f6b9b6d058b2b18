"""Normalization Propagation: layers that normalise their output in closed form, without batch statistics.

    o_i = (act(gamma_i (W_i * x) / (J ||W_i||) + beta_i) - mean) / std          (NormProp, equations 9 and 11)

If x has mean 0 and variance 1 in each feature and the W_i are incoherent, act's argument is close to N(0, 1) (section
3.1). So mean and std of act(N(0, 1)) are known beforehand, and the output has mean 0 and variance 1 again. J brings the
mean squared singular value of the layer's Jacobian to 1 (section 3.4).

Source: Arpit, Zhou, Kota, Govindaraju, "Normalization Propagation: A Parametric Technique for Removing Internal
Covariate Shift in Deep Networks", ICML 2016, arXiv 1603.01431. Called NormProp below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from backforward.data_norm import DataNorm, visible
from backforward.moments import (
    ACTIVATIONS,
    Activation,
    ActivationMoments,
    gaussian_moments,
    leaky_moments,
    make_activation,
)

__all__ = [  # everything about Normalization Propagation in one import
    "ACTIVATIONS",
    "JACOBIAN_FACTORS",
    "ActivationMoments",
    "DataNorm",
    "NormPropConv2d",
    "NormPropLinear",
    "StandardizedActivation",
    "gaussian_moments",
    "make_activation",
    "project_unit_norm_",
    "unit_norm_projection",
]

JACOBIAN_FACTORS = ("none", "paper", "exact")

#: The factor printed in the paper for ReLU (section 3.4): sqrt(1/2) / std, rounded.
PAPER_JACOBIAN_FACTOR = 1.21


class _WithNorms(torch.autograd.Function):
    """``norms * W / ||W||`` per unit, by the kernels behind PyTorch's weight normalisation: one pass over W each way.

    The kernels' second derivative is wrong (it takes ||W|| as constant), so backward spells out the formula under
    ``create_graph``. On a CPU the kernels ignore the gradient's strides, so it is made contiguous first: in a
    convolution's second derivative it is not.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, norms: Tensor) -> Tensor:
        scaled: Tensor
        scaled, lengths = torch.ops.aten._weight_norm_interface(weight, norms, 0)
        ctx.save_for_backward(weight, norms, lengths)
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, norms, lengths = ctx.saved_tensors
        if not torch.is_grad_enabled():
            fast: tuple[Tensor, Tensor] = torch.ops.aten._weight_norm_interface_backward(
                grad.contiguous(), weight, norms, lengths, 0
            )
            return fast
        length = _lengths(weight)
        along = (grad * weight).sum(tuple(range(1, weight.ndim)), keepdim=True) / length
        return norms / length * (grad - along * weight / length), along


def _plain_operations_only() -> bool:
    """Return whether autograd.Function is unusable: `torch.func` refuses it and `torch.jit.trace` cannot save it."""
    return torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None


@visible
def _with_norms(weight: Tensor, norms: Tensor) -> Tensor:
    """Return ``norms * W / ||W||`` in the memory layout of W."""
    if weight.device.type not in ("cpu", "cuda") or _plain_operations_only():
        return norms * weight / _lengths(weight)
    out: Tensor
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        out = _WithNorms.apply(weight.permute(0, 2, 3, 1), norms).permute(0, 3, 1, 2)
    else:
        out = _WithNorms.apply(weight, norms)
    return out


def _lengths(weight: Tensor) -> Tensor:
    """Return the Frobenius norm of each unit's weight, shaped to broadcast."""
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return lengths


class _Clamp(torch.autograd.Function):
    """``max(z, floor)`` in place. Backward needs only the output, which the next layer keeps anyway.

    PyTorch's own functions keep z as well, and ``clamp_min`` has a slow backward.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, floor: float) -> Tensor:
        z.clamp_min_(floor)
        ctx.mark_dirty(z)
        ctx.save_for_backward(z)
        ctx.floor = floor
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        highest = ctx.floor + abs(ctx.floor) * torch.finfo(out.dtype).eps  # the largest value that the floor rounds to
        return torch.ops.aten.threshold_backward(grad, out, highest), None


@visible
def _clamp(z: Tensor, floor: float) -> Tensor:
    """Return ``max(z, floor)``; may overwrite z."""
    if _plain_operations_only():
        return F.threshold(z, floor, floor)
    out: Tensor = _Clamp.apply(z, floor)
    return out


def _affine(x: Tensor, scale: float, shift: float) -> Tensor:
    """Return ``scale * x + shift`` in one pass."""
    return torch.rsub(x, shift, alpha=-scale)


class _NormProp(nn.Module):
    """Base of NormPropLinear and NormPropConv2d.

    The layer runs as one plain linear or convolutional layer and one activation. gamma / (J ||W||) is folded into the
    weight. The standardisation depends on the activation:

    - ReLU: (relu(u) - mean) / std = max((u - mean) / std, -mean / std), so all of it becomes weight, bias and a clamp;
    - LeakyReLU, PReLU: act(u) / std = act(u / std), so 1 / std goes into weight and bias, and mean / std is subtracted
      later;
    - any other activation: one pass over its output remains.
    """

    weight: nn.Parameter
    gamma: nn.Parameter
    beta: nn.Parameter
    slope: nn.Parameter | None
    form: str

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        *,
        activation: Activation,
        jacobian_factor: str | float,
        project: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weight_shape, device=device, dtype=dtype))
        self.gamma = nn.Parameter(torch.empty(weight_shape[0], device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(weight_shape[0], device=device, dtype=dtype))
        self.jacobian_factor = check_jacobian_factor(jacobian_factor)
        self.project = project
        self._unit_shape = (-1, *(1,) * (len(weight_shape) - 1))  # broadcasts one value per unit over the weight
        act = make_activation(activation)
        self.register_parameter("slope", None)
        if isinstance(act, nn.PReLU):
            self.slope = nn.Parameter(act.weight.detach().to(device=device, dtype=dtype, copy=True))
            self.form = "prelu"
        elif isinstance(act, nn.Module) and any(True for _ in act.parameters()):
            raise ValueError("of the activations with parameters only PReLU can be normalised")
        else:
            self.form = _FORMS.get(type(act), "relu" if act in (F.relu, torch.relu) else "other")
            self.activation = act
            self.negative_slope = act.negative_slope if isinstance(act, nn.LeakyReLU) else 0.0
            self._moments = gaussian_moments(act)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as PyTorch's own layers do; set gamma to 1 and beta to 0."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def moments(self) -> ActivationMoments[Any]:
        """Return mean, std and the J in use; for PReLU at its current slopes and differentiable in them."""
        mean, std, exact = self._moments if self.slope is None else leaky_moments(self.slope)
        named = {"none": 1.0, "paper": PAPER_JACOBIAN_FACTOR, "exact": exact}
        factor = self.jacobian_factor
        return ActivationMoments(mean, std, named[factor] if isinstance(factor, str) else factor)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the plain layer that this one runs; gradients flow through ||W||."""
        mean, std, jacobian = self.moments()
        scale = 1 / jacobian
        bias: Tensor = self.beta
        if self.form in ("relu", "leaky_relu", "prelu"):
            scale = scale / std
            bias = _affine(bias, 1 / std, -mean / std) if self.form == "relu" else bias / std
        per_unit = (self.gamma * scale).view(self._unit_shape)
        return _with_norms(self.weight, per_unit), bias

    def pre_activation(self, x: Tensor) -> Tensor:
        """Return the activation's argument, ``gamma_i (W_i * x) / (J ||W_i||) + beta_i``, which `forward` skips."""
        per_unit = (self.gamma / self.moments().jacobian).view(self._unit_shape)
        return self._linear_map(x, _with_norms(self.weight, per_unit), self.beta)

    def _linear_map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Run the plain layer with this weight and bias."""
        raise NotImplementedError

    def _activate(self, z: Tensor) -> Tensor:
        """Map the plain layer's output ``[N, O, ...]`` to this layer's."""
        if self.form == "identity":
            return z
        mean, std, _ = self.moments()
        if self.form == "relu":
            return _clamp(z, -mean / std)
        if self.slope is not None:
            return F.prelu(z, self.slope.to(z.dtype)).sub_((mean / std).view(self._unit_shape[:-1]))
        if self.form == "leaky_relu":
            return F.leaky_relu(z, self.negative_slope).sub_(mean / std)
        return _affine(self.activation(z), 1 / std, -mean / std)

    def _repr(self) -> str:
        slopes = "" if self.slope is None else f", slopes={self.slope.numel()}"
        return f"{slopes}, jacobian_factor={self.jacobian_factor!r}" + ("" if self.project else ", project=False")


_FORMS: dict[type, str] = {nn.Identity: "identity", nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu"}


def check_jacobian_factor(factor: str | float) -> str | float:
    """Return the factor if it is ``none``, ``paper``, ``exact`` or a positive number; else raise `ValueError`."""
    known = factor in JACOBIAN_FACTORS if isinstance(factor, str) else factor > 0
    if not known:
        raise ValueError(
            f"unknown jacobian_factor {factor!r}: there are {', '.join(JACOBIAN_FACTORS)}, or a positive number"
        )
    return factor


class NormPropLinear(_NormProp):
    """Fully connected NormProp layer; replaces ``nn.Linear`` and its activation.

    ``o = (act(gamma * (x @ W.T) / (J ||W||) + beta) - mean) / std``, with ``||W||`` the length of each row (NormProp,
    equation 9).

    Shape: x ``[..., in_features]``, o ``[..., out_features]``, W ``[out_features, in_features]``, gamma and beta
    ``[out_features]``. If x has mean 0 and variance 1 in each feature, so has o approximately (with J = 1). A unit
    whose weights are all 0 has no direction and gives NaN.

    Examples:
        >>> layer = NormPropLinear(784, 256)
        >>> layer(torch.randn(64, 784)).shape
        torch.Size([64, 256])

    Args:
        in_features: Size of each input.
        out_features: Number of units.
        activation: A name in ``ACTIVATIONS`` (``identity`` for none) or a differentiable elementwise callable. PReLU
            learns its slopes as the parameter ``slope``.
        jacobian_factor: J: ``none`` is 1, ``paper`` 1.21, ``exact`` that of the activation
            (``ActivationMoments.jacobian``), or a number.
        project: Whether ``project_unit_norm_`` scales these weights. Use False in the network's last layer.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: A name is unknown, J is not positive, or the activation has parameters and is not PReLU.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: Activation = "relu",
        jacobian_factor: str | float = "exact",
        project: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (out_features, in_features),
            activation=activation,
            jacobian_factor=jacobian_factor,
            project=project,
            device=device,
            dtype=dtype,
        )
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return self._activate(self._linear_map(x, *self.folded()))

    def _linear_map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{self.in_features}, {self.out_features}" + self._repr()


class NormPropConv2d(_NormProp):
    """Convolutional NormProp layer; replaces ``nn.Conv2d`` and its activation.

    ``o_i = (act(gamma_i (W_i * x) / (J ||W_i||_F) + beta_i) - mean) / std``: a filter has one gamma, beta and norm for
    all positions (NormProp, equation 11).

    Shape: x ``[N, in_channels, H, W]``, W ``[out_channels, in_channels / groups, *kernel_size]``, gamma and beta
    ``[out_channels]``; the output as for ``nn.Conv2d``. x should have mean 0 and variance 1 in each channel.

    Examples:
        >>> layer = NormPropConv2d(3, 192, 5, padding=2)
        >>> layer(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 192, 32, 32])

    Args:
        in_channels: Channels of the input.
        out_channels: Number of filters.
        kernel_size, stride, dilation, groups: As for ``nn.Conv2d``.
        padding: Zeros around the input: a number, one per direction, ``"valid"`` or ``"same"``.
        activation, jacobian_factor, project, device, dtype: As for ``NormPropLinear``.

    Raises:
        ValueError: As for ``NormPropLinear``, or ``groups`` does not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        *,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        activation: Activation = "relu",
        jacobian_factor: str | float = "exact",
        project: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")
        kernel = _pair(kernel_size)
        super().__init__(
            (out_channels, in_channels // groups, *kernel),
            activation=activation,
            jacobian_factor=jacobian_factor,
            project=project,
            device=device,
            dtype=dtype,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel
        self.stride = _pair(stride)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""
        return self._activate(self._linear_map(x, *self.folded()))

    def _linear_map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Show the settings."""
        shown = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{shown}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}" + self._repr()


class StandardizedActivation(nn.Module):
    """``(act(z) - mean) / std`` for a z of mean 0 and variance 1 that no linear map precedes, such as a sum.

    Shape: any to the same.

    Args:
        activation: A name in ``ACTIVATIONS`` or a differentiable elementwise callable.
    """

    def __init__(self, activation: Activation = "relu") -> None:
        super().__init__()
        self.activation = make_activation(activation)
        self._moments = gaussian_moments(self.activation)

    def forward(self, z: Tensor) -> Tensor:
        """Activate and standardise."""
        act = self.activation
        mean, std, _ = leaky_moments(act.weight) if isinstance(act, nn.PReLU) else self._moments
        return (act(z) - mean) / std


def project_unit_norm_(target: nn.Module | Tensor | Iterable[nn.Module | Tensor]) -> None:
    """Scale each unit's or filter's weight to unit Frobenius norm, in place (NormProp, section 4.4).

    A unit whose weights are all 0 stays unchanged.

    Args:
        target: A weight (``W[i]`` belongs to unit i), a module, whose NormProp layers are projected except those with
            ``project=False`` (the last layer), or several of these.
    """
    if isinstance(target, nn.Module):
        project_unit_norm_(_projected_weights(target))
    elif isinstance(target, Tensor):
        weight = target.detach()
        weight.div_(_lengths(weight).clamp_min_(torch.finfo(weight.dtype).tiny))
    else:
        for one in target:
            project_unit_norm_(one)


def unit_norm_projection(model: nn.Module) -> Callable[[Iterable[Tensor]], None]:
    """Return an ``after_update`` hook for update rules that projects the updated hidden weights of NormProp layers.

    Examples:
        >>> rule = Backforward(model, optimizer, loss_fn, after_update=unit_norm_projection(model))

    Args:
        model: The network. A copy of it needs a hook of its own.
    """
    hidden = set(_projected_weights(model))

    def after_update(parameters: Iterable[Tensor]) -> None:
        project_unit_norm_(parameter for parameter in parameters if parameter in hidden)

    return after_update


def _projected_weights(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, _NormProp) and m.project]
