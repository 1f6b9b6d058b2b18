"""Normalization Propagation: layers that normalise their output in closed form, without batch statistics.

    o_i = (act(gamma_i (W_i * x) / (J ||W_i||) + beta_i) - mean) / std          (NormProp, equations 9 and 11)

Where x has mean 0 and variance 1 in each feature and the W_i are incoherent, act's argument is close to N(0, 1)
(section 3.1), so mean and std of act(N(0, 1)) are known beforehand and the output has again mean 0 and variance 1. J
brings the mean squared singular value of the layer's Jacobian to 1 (section 3.4).

Source: Arpit, Zhou, Kota, Govindaraju, "Normalization Propagation: A Parametric Technique for Removing Internal
Covariate Shift in Deep Networks", ICML 2016, arXiv 1603.01431. Called NormProp below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

Activation: TypeAlias = "str | Callable[[Tensor], Tensor]"
Scalar = TypeVar("Scalar", float, Tensor)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}

JACOBIAN_FACTORS = ("none", "paper", "exact")

#: The factor that the paper prints for ReLU (section 3.4): sqrt(1/2) / std, rounded.
PAPER_JACOBIAN_FACTOR = 1.21


def make_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The activation of that name; a callable is returned as it is.

    Raises:
        ValueError: If the name is unknown.
    """
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]()


class Moments(NamedTuple, Generic[Scalar]):
    """What NormProp needs to know of ``act(z)`` for z from N(0, 1): tensors for PReLU, else numbers.

    Attributes:
        mean: E[act(z)].
        std: Standard deviation of act(z).
        jacobian: sqrt(E[act'(z)^2]) / std, the exact J: with it the mean squared singular value of a layer's Jacobian
            is 1 where act is positively homogeneous.
    """

    mean: Scalar
    std: Scalar
    jacobian: Scalar


def gaussian_moments(activation: Activation, kinks: Sequence[float] = ()) -> Moments[Any]:  # noqa: PLR0911
    """Moments of an activation under N(0, 1): in closed form where there is one, else by quadrature.

    Closed forms: identity, ReLU, LeakyReLU, PReLU (differentiable in its slopes), ELU, SELU, exact GELU. All others are
    integrated to about 1e-14 by Gauss-Legendre panels with edges at the multiples of 1/4 and at ``kinks``.

    The last two columns are the mean squared singular value of a layer's Jacobian at input N(0, 1), without J and with
    the exact J: what the latter misses of 1 comes from J shrinking the activation's argument as well.

    ========== ====== ===== ====== ========= ======
    activation mean   std   J      without J with J
    ========== ====== ===== ====== ========= ======
    relu       .3989  .5838 1.2112 1.467     1.000
    leaky_relu .3950  .5866 1.2056 1.453     1.000
    prelu      .2992  .6646 1.0967 1.203     1.000
    elu        .1605  .7869 1.0388 1.079     1.007
    selu       .0000  1.000 1.0352 1.072     1.013
    gelu       .2821  .5879 1.1484 1.319     .960
    silu       .2066  .5595 1.1009 1.212     .965
    softplus   .8061  .5211 1.0395 1.081     .992
    tanh       .0000  .6279 1.0853 1.178     1.064
    sigmoid    .5000  .2083 1.0167 1.034     1.008
    ========== ====== ===== ====== ========= ======

    Args:
        activation: A name in ``ACTIVATIONS`` or any differentiable elementwise callable.
        kinks: Where a callable has kinks or jumps, other than at multiples of 1/4.

    Raises:
        ValueError: If the name is unknown or the activation is constant.
    """
    act = make_activation(activation)
    if isinstance(act, nn.Identity):
        return Moments(0.0, 1.0, 1.0)
    if isinstance(act, nn.ReLU) or act in (F.relu, torch.relu):
        return _leaky_moments(0.0)
    if isinstance(act, nn.LeakyReLU):
        return _leaky_moments(act.negative_slope)
    if isinstance(act, nn.PReLU):
        return _leaky_moments(act.weight)
    if isinstance(act, nn.ELU):
        return _elu_moments(act.alpha)
    if isinstance(act, nn.SELU):
        return _elu_moments(alpha=1.6732632423543772, scale=1.0507009873554805)
    if isinstance(act, nn.GELU) and act.approximate == "none":
        return _gelu_moments()
    return _quadrature_moments(act, kinks)


def _leaky_moments(slope: Scalar) -> Moments[Scalar]:
    """``max(z, 0) + slope * min(z, 0)`` (NormProp, section 3.3, has the case of slope 0)."""
    mean = (1 - slope) / math.sqrt(2 * math.pi)
    std = ((1 + slope**2 - (1 - slope) ** 2 / math.pi) / 2) ** 0.5
    return Moments(mean, std, ((1 + slope**2) / 2) ** 0.5 / std)


def _elu_moments(alpha: float, scale: float = 1.0) -> Moments[float]:
    """``scale * (z if z > 0 else alpha (e^z - 1))``: E[e^(kz); z < 0] = e^(k^2 / 2) Phi(-k)."""
    one = math.exp(0.5) * _normal_cdf(-1)
    two = math.exp(2.0) * _normal_cdf(-2)
    mean = 1 / math.sqrt(2 * math.pi) + alpha * (one - 0.5)
    square = 0.5 + alpha**2 * (two - 2 * one + 0.5)
    std = math.sqrt(square - mean**2)
    return Moments(scale * mean, scale * std, math.sqrt(0.5 + alpha**2 * two) / std)


def _gelu_moments() -> Moments[float]:
    """``z Phi(z)``: by Stein's lemma, E[z f(z)] = E[f'(z)]."""
    mean = 1 / (2 * math.sqrt(math.pi))
    std = math.sqrt(1 / 3 + 1 / (2 * math.pi * math.sqrt(3)) - mean**2)
    return Moments(mean, std, math.sqrt(1 / 3 + 2 / (3 * math.pi * math.sqrt(3))) / std)


def _normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


def _quadrature_moments(act: Callable[[Tensor], Tensor], kinks: Sequence[float]) -> Moments[float]:
    edges = torch.tensor(sorted({k / 4 for k in range(-48, 49)} | set(kinks)), dtype=torch.float64)
    nodes, weights = _gauss_legendre(12)
    half = edges.diff()[:, None] / 2
    z = (edges[:-1, None] + half * (nodes + 1)).flatten().requires_grad_()
    density = (half * weights).flatten() * torch.exp(-z.detach().square() / 2) / math.sqrt(2 * math.pi)
    with torch.enable_grad():
        y = act(z.clone())  # a copy, since some activations work in place
        (slope,) = torch.autograd.grad(y.sum(), z)
    y = y.detach()
    mean = (density * y).sum()
    std = (density * (y - mean).square()).sum().sqrt()
    if not std > 1e-12 * mean.abs():
        raise ValueError("an activation that is constant under N(0, 1) cannot be normalised")
    return Moments(mean.item(), std.item(), ((density * slope.square()).sum().sqrt() / std).item())


def _gauss_legendre(points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1] (Golub & Welsch, 1969)."""
    k = torch.arange(1, points, dtype=torch.float64)
    off_diagonal = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes, 2 * vectors[0].square()


class _WithNorms(torch.autograd.Function):
    """``norms * W / ||W||``, each unit's own, by the kernels behind PyTorch's weight normalisation.

    One pass over W forward, one backward. Their own second derivative is wrong (it takes ||W|| for a constant), so
    under ``create_graph`` backward is spelled out. On a CPU they read the gradient as if it were contiguous, whatever
    its strides; that of a convolution's second derivative is not.
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


@torch.fx.wrap
def _with_norms(weight: Tensor, norms: Tensor) -> Tensor:
    """``norms * W / ||W||`` in the memory layout of W."""
    if weight.device.type not in ("cpu", "cuda") or torch._C._are_functorch_transforms_active():
        return norms * weight / _lengths(weight)
    out: Tensor
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        out = _WithNorms.apply(weight.permute(0, 2, 3, 1), norms).permute(0, 3, 1, 2)
    else:
        out = _WithNorms.apply(weight, norms)
    return out


def _lengths(weight: Tensor) -> Tensor:
    """Frobenius norm of each unit's weight, shaped to broadcast."""
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return lengths


class _Clamp(torch.autograd.Function):
    """``max(z, floor)`` in the place of z: backward needs only the output, which the next layer keeps anyway.

    PyTorch's own ways keep z beside it, and ``clamp_min`` has a slow backward.
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
        highest = ctx.floor + abs(ctx.floor) * torch.finfo(out.dtype).eps  # that the floor can be rounded to
        return torch.ops.aten.threshold_backward(grad, out, highest), None


@torch.fx.wrap
def _clamp(z: Tensor, floor: float) -> Tensor:
    """``max(z, floor)``; z may be overwritten."""
    if torch._C._are_functorch_transforms_active():
        return F.threshold(z, floor, floor)
    out: Tensor = _Clamp.apply(z, floor)
    return out


def _affine(x: Tensor, scale: float, shift: float) -> Tensor:
    """``scale * x + shift`` in one pass."""
    return torch.rsub(x, shift, alpha=-scale)


class _NormProp(nn.Module):
    """What NormPropLinear and NormPropConv2d share: parameters, the fold, and what follows the linear map.

    The layer runs as one plain linear or convolutional layer and one activation: gamma / (J ||W||) goes into the
    weight, and of the rest

    - ReLU: (relu(u) - mean) / std = max((u - mean) / std, -mean / std), so all goes into weight, bias and a clamp;
    - LeakyReLU, PReLU: act(u) / std = act(u / std), so 1 / std goes into weight and bias; mean / std comes off later;
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
        self._unit_shape = (-1, *(1,) * (len(weight_shape) - 1))  # of a value per unit beside the weight
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
        """Draw the weights as PyTorch's own layers do; gamma 1, beta 0."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def moments(self) -> Moments[Any]:
        """Mean, std and the J in use; for PReLU at its present slopes, differentiable in them."""
        mean, std, exact = self._moments if self.slope is None else _leaky_moments(self.slope)
        named = {"none": 1.0, "paper": PAPER_JACOBIAN_FACTOR, "exact": exact}
        factor = self.jacobian_factor
        return Moments(mean, std, named[factor] if isinstance(factor, str) else factor)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain layer that this one runs; gradients flow through ||W||."""
        mean, std, jacobian = self.moments()
        scale = 1 / jacobian
        bias: Tensor = self.beta
        if self.form in ("relu", "leaky_relu", "prelu"):
            scale = scale / std
            bias = _affine(bias, 1 / std, -mean / std) if self.form == "relu" else bias / std
        per_unit = (self.gamma * scale).view(self._unit_shape)
        return _with_norms(self.weight, per_unit), bias

    def pre_activation(self, x: Tensor) -> Tensor:
        """What the activation is applied to, ``gamma_i (W_i * x) / (J ||W_i||) + beta_i``; the fold skips over it."""
        per_unit = (self.gamma / self.moments().jacobian).view(self._unit_shape)
        return self._linear_map(x, _with_norms(self.weight, per_unit), self.beta)

    def _linear_map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What the plain layer does with such a weight and bias."""
        raise NotImplementedError

    def _activate(self, z: Tensor) -> Tensor:
        """From the plain layer's output ``[N, O, ...]`` to this layer's."""
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
    """Return the factor if it is one of ``none``, ``paper``, ``exact`` or a positive number.

    Raises:
        ValueError: If it is not.
    """
    known = factor in JACOBIAN_FACTORS if isinstance(factor, str) else factor > 0
    if not known:
        raise ValueError(
            f"unknown jacobian_factor {factor!r}: there are {', '.join(JACOBIAN_FACTORS)}, or a positive number"
        )
    return factor


class NormPropLinear(_NormProp):
    """Fully connected NormProp layer, in the place of ``nn.Linear`` and its activation.

    ``o = (act(gamma * (x @ W.T) / (J ||W||) + beta) - mean) / std``, with ``||W||`` the length of each row (NormProp,
    equation 9).

    Shape: x ``[..., in_features]``, o ``[..., out_features]``, W ``[out_features, in_features]``, gamma and beta
    ``[out_features]``. x should have mean 0 and variance 1 in each feature; then so has o, near enough (J off). A unit
    whose weights are all 0 has no direction, and gives NaN.

    Example:
        >>> layer = NormPropLinear(784, 256)
        >>> layer(torch.randn(64, 784)).shape
        torch.Size([64, 256])

    Args:
        in_features: Inputs.
        out_features: Units.
        activation: A name in ``ACTIVATIONS`` (``identity`` for none) or a differentiable elementwise callable. PReLU
            learns its slopes as the parameter ``slope``.
        jacobian_factor: J: ``none`` is 1, ``paper`` 1.21, ``exact`` that of the activation (``Moments.jacobian``), or a
            number.
        project: Whether ``project_unit_norm_`` scales these weights: not those of the network's last layer.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If a name is unknown, J is not positive, or the activation has parameters and is not PReLU.
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
        """``[..., in_features]`` to ``[..., out_features]``."""
        return self._activate(self._linear_map(x, *self.folded()))

    def _linear_map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.in_features}, {self.out_features}" + self._repr()


class NormPropConv2d(_NormProp):
    """Convolutional NormProp layer, in the place of ``nn.Conv2d`` and its activation.

    ``o_i = (act(gamma_i (W_i * x) / (J ||W_i||_F) + beta_i) - mean) / std``: a filter's one gamma, beta and norm serve
    all positions (NormProp, equation 11).

    Shape: x ``[N, in_channels, H, W]``, W ``[out_channels, in_channels / groups, *kernel_size]``, gamma and beta
    ``[out_channels]``; output as of ``nn.Conv2d``. x should have mean 0 and variance 1 in each channel.

    Example:
        >>> layer = NormPropConv2d(3, 192, 5, padding=2)
        >>> layer(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 192, 32, 32])

    Args:
        in_channels: Channels of the input.
        out_channels: Filters.
        kernel_size: As of ``nn.Conv2d``, and so the next four.
        stride: In both directions, or one for each.
        padding: With zeros: a number, one for each direction, ``"valid"`` or ``"same"``.
        dilation: Distance between taps.
        groups: Channels are convolved in so many groups.
        activation: As of ``NormPropLinear``, and so all that follow.
        jacobian_factor: J.
        project: Whether ``project_unit_norm_`` scales these weights.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: As ``NormPropLinear``, or if ``groups`` does not divide the channels.
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
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""
        return self._activate(self._linear_map(x, *self.folded()))

    def _linear_map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{shown}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}" + self._repr()


class StandardizedActivation(nn.Module):
    """``(act(z) - mean) / std``: keeps mean 0 and variance 1 where no linear map precedes, as after a sum.

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
        mean, std, _ = _leaky_moments(act.weight) if isinstance(act, nn.PReLU) else self._moments
        return (act(z) - mean) / std


def project_unit_norm_(target: nn.Module | Tensor | Iterable[nn.Module | Tensor]) -> None:
    """Scale each unit's or filter's weight to unit Frobenius norm, in place (NormProp, section 4.4).

    A unit whose weights are all 0 is left alone.

    Args:
        target: A weight, ``W[i]`` belonging to unit i; or a module, whose NormProp layers are projected, those made
            with ``project=False`` (the last layer) excepted; or several of these.
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
    """The hook ``after_update(parameters)`` of an update rule: projects what needs it of those parameters.

    Args:
        model: Its hidden NormProp layers are the ones to project. Copy a model first, make its hook then.
    """
    hidden = set(_projected_weights(model))

    def after_update(parameters: Iterable[Tensor]) -> None:
        project_unit_norm_(parameter for parameter in parameters if parameter in hidden)

    return after_update


def _projected_weights(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, _NormProp) and m.project]


@torch.fx.wrap
def _scaled_and_shifted(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift``, both of a number for each channel or pixel ``[C, H, W]``."""
    # Spread over all pixels first: with two operands of one number a channel, addcmul takes four times as long.
    shift, scale = (each.expand(x.shape[-3:]).contiguous() for each in (shift, scale))
    return torch.addcmul(shift, x, scale)


DATA_NORMS = ("global", "channel", "batch", "none")

#: A standard deviation below this share of the input's range counts as 1: an ever-black pixel, say.
CONSTANT_FEATURE_STD = 1e-3


class DataNorm(nn.Module):
    """Normalise the network's input: ``(x - mean) / std``, without parameters; put it first in the network.

    ========= ======================================================================================
    kind      mean and std
    ========= ======================================================================================
    global    of each feature (channel and pixel) over the training set (NormProp, section 4.2)
    channel   of each channel over the training set
    batch     of each feature over the mini-batch in training (NormProp, section 4.2), its average over
              all training batches so far in evaluation
    none      0 and 1
    ========= ======================================================================================

    A std below 1e-3 counts as 1. The averages of ``batch`` weigh all batches alike, not the last ones more as those of
    BatchNorm do: the input's distribution does not move.

    Shape: ``[N, C, H, W]`` to the same; values in [0, 1].

    Args:
        kind: One of the above.
        mean: For ``global`` ``[C, H, W]``, for ``channel`` ``[C]``.
        std: As ``mean``.
        shape: For ``batch`` only: ``(C, H, W)``.

    Raises:
        ValueError: If the kind is unknown, what it needs is missing, or ``batch`` trains on a single image.
    """

    shift: Tensor
    scale: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor

    def __init__(
        self,
        kind: str,
        mean: Tensor | Sequence[float] | None = None,
        std: Tensor | Sequence[float] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if kind not in DATA_NORMS:
            raise ValueError(f"unknown data norm {kind!r}: there are {', '.join(DATA_NORMS)}")
        self.kind = kind
        if kind in ("global", "channel"):
            if mean is None or std is None:
                raise ValueError(f"data norm {kind!r} needs mean and std (or use DataNorm.fit)")
            scale = _inverse_std(torch.as_tensor(std, dtype=torch.float64))
            shift = -torch.as_tensor(mean, dtype=torch.float64) * scale
            shape = (-1, 1, 1) if kind == "channel" else shift.shape
            self.register_buffer("shift", shift.reshape(shape).to(torch.get_default_dtype()))
            self.register_buffer("scale", scale.reshape(shape).to(torch.get_default_dtype()))
        elif kind == "batch":
            if shape is None:
                raise ValueError("data norm 'batch' needs shape=(channels, height, width)")
            self.register_buffer("running_mean", torch.zeros(*shape))
            self.register_buffer("running_var", torch.ones(*shape))
            self.register_buffer("batches", torch.zeros(()))

    @classmethod
    def fit(cls, kind: str, images: Tensor) -> DataNorm:
        """Make the layer from training images, without a float copy of the set.

        Args:
            kind: As for the class.
            images: uint8 ``[N, C, H, W]``; 255 stands for 1.0.

        Raises:
            ValueError: If the kind is unknown.
            TypeError: If the images are not uint8 in four dimensions.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise TypeError(f"DataNorm.fit needs uint8 images [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if kind not in ("global", "channel"):
            return cls(kind, shape=images.shape[1:])
        total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
        squares = torch.zeros_like(total)
        for chunk in images.split(256):  # 256 * 255^2 < 2^24: every sum within a chunk is exact in float32
            values = chunk.to(torch.float32)
            total += values.sum(0)
            squares += values.square_().sum(0)
        count = len(images)
        if kind == "channel":
            count *= total[0].numel()
            total, squares = total.sum((1, 2)), squares.sum((1, 2))
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        return cls(kind, mean / 255, std / 255).to(images.device)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images ``[N, C, H, W]``."""
        if self.kind == "none":
            return x
        if self.kind != "batch":
            return _scaled_and_shifted(x, self.scale, self.shift)
        if self.training:
            var, mean = self._batch_moments(x)
        else:
            var, mean = self.running_var, self.running_mean
        scale = _inverse_std(var.sqrt())
        return torch.addcmul(-mean * scale, x, scale)

    def _batch_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Biased variance and mean of each feature over the batch; moves the running estimates (variance unbiased)."""
        n = x.shape[0]
        if n < 2:
            raise ValueError("data norm 'batch' trains on batches of at least 2 images: use 'global' for batch size 1")
        var, mean = torch.var_mean(x, dim=0, correction=0)
        with torch.no_grad():
            self.batches += 1
            weight = 1 / self.batches
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_(var.to(self.running_var.dtype) * (n / (n - 1)), weight)
        return var, mean

    def extra_repr(self) -> str:
        """The kind."""
        return self.kind


def _inverse_std(std: Tensor) -> Tensor:
    return torch.where(std < CONSTANT_FEATURE_STD, 1.0, std).reciprocal()
