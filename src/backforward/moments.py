"""Mean, standard deviation and Jacobian factor of an activation applied to N(0, 1), as `normprop` needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def make_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    """Return the activation of that name; return a callable unchanged.

    Raises:
        ValueError: The name is unknown.
    """
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]()


class ActivationMoments(NamedTuple, Generic[Scalar]):
    """Moments of ``act(z)`` for z ~ N(0, 1): tensors for PReLU, else floats.

    Attributes:
        mean: E[act(z)].
        std: Standard deviation of act(z).
        jacobian: The exact J, sqrt(E[act'(z)^2]) / std. For a positively homogeneous act it makes the mean squared
            singular value of a layer's Jacobian 1.
    """

    mean: Scalar
    std: Scalar
    jacobian: Scalar


def gaussian_moments(activation: Activation, kinks: Sequence[float] = ()) -> ActivationMoments[Any]:  # noqa: PLR0911
    """Return the moments of an activation under N(0, 1), in closed form if there is one, else by quadrature.

    Closed forms: identity, ReLU, LeakyReLU, PReLU (differentiable in its slopes), ELU, SELU, exact GELU. All others are
    integrated to about 1e-14 by Gauss-Legendre panels with edges at the multiples of 1/4 and at ``kinks``.

    The last two columns are the mean squared singular value of a layer's Jacobian at input N(0, 1), without J and with
    the exact J. The latter is not always 1, because J also shrinks the activation's argument.

    | activation | mean  | std   | J      | without J | with J |
    |------------|-------|-------|--------|-----------|--------|
    | relu       | .3989 | .5838 | 1.2112 | 1.467     | 1.000  |
    | leaky_relu | .3950 | .5866 | 1.2056 | 1.453     | 1.000  |
    | prelu      | .2992 | .6646 | 1.0967 | 1.203     | 1.000  |
    | elu        | .1605 | .7869 | 1.0388 | 1.079     | 1.007  |
    | selu       | .0000 | 1.000 | 1.0352 | 1.072     | 1.013  |
    | gelu       | .2821 | .5879 | 1.1484 | 1.319     | .960   |
    | silu       | .2066 | .5595 | 1.1009 | 1.212     | .965   |
    | softplus   | .8061 | .5211 | 1.0395 | 1.081     | .992   |
    | tanh       | .0000 | .6279 | 1.0853 | 1.178     | 1.064  |
    | sigmoid    | .5000 | .2083 | 1.0167 | 1.034     | 1.008  |

    Examples:
        >>> gaussian_moments("relu").mean
        0.3989422804014327

    Args:
        activation: A name in ``ACTIVATIONS`` or any differentiable elementwise callable.
        kinks: Kinks or jumps of a callable, other than at multiples of 1/4.

    Raises:
        ValueError: The name is unknown or the activation is constant.
    """
    act = make_activation(activation)
    if isinstance(act, nn.Identity):
        return ActivationMoments(0.0, 1.0, 1.0)
    if isinstance(act, nn.ReLU) or act in (F.relu, torch.relu):
        return leaky_moments(0.0)
    if isinstance(act, nn.LeakyReLU):
        return leaky_moments(act.negative_slope)
    if isinstance(act, nn.PReLU):
        return leaky_moments(act.weight)
    if isinstance(act, nn.ELU):
        return _elu_moments(act.alpha)
    if isinstance(act, nn.SELU):
        return _elu_moments(alpha=1.6732632423543772, scale=1.0507009873554805)
    if isinstance(act, nn.GELU) and act.approximate == "none":
        return _gelu_moments()
    return _quadrature_moments(act, kinks)


def leaky_moments(slope: Scalar) -> ActivationMoments[Scalar]:
    """Moments of ``max(z, 0) + slope * min(z, 0)``; slope 0 is NormProp, section 3.3."""
    mean = (1 - slope) / math.sqrt(2 * math.pi)
    std = ((1 + slope**2 - (1 - slope) ** 2 / math.pi) / 2) ** 0.5
    return ActivationMoments(mean, std, ((1 + slope**2) / 2) ** 0.5 / std)


def _elu_moments(alpha: float, scale: float = 1.0) -> ActivationMoments[float]:
    """Moments of ``scale * (z if z > 0 else alpha (e^z - 1))``, by E[e^(kz); z < 0] = e^(k^2 / 2) Phi(-k)."""
    one = math.exp(0.5) * _normal_cdf(-1)
    two = math.exp(2.0) * _normal_cdf(-2)
    mean = 1 / math.sqrt(2 * math.pi) + alpha * (one - 0.5)
    square = 0.5 + alpha**2 * (two - 2 * one + 0.5)
    std = math.sqrt(square - mean**2)
    return ActivationMoments(scale * mean, scale * std, math.sqrt(0.5 + alpha**2 * two) / std)


def _gelu_moments() -> ActivationMoments[float]:
    """Moments of ``z Phi(z)``, by Stein's lemma E[z f(z)] = E[f'(z)]."""
    mean = 1 / (2 * math.sqrt(math.pi))
    std = math.sqrt(1 / 3 + 1 / (2 * math.pi * math.sqrt(3)) - mean**2)
    return ActivationMoments(mean, std, math.sqrt(1 / 3 + 2 / (3 * math.pi * math.sqrt(3))) / std)


def _normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


def _quadrature_moments(act: Callable[[Tensor], Tensor], kinks: Sequence[float]) -> ActivationMoments[float]:
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
    return ActivationMoments(mean.item(), std.item(), ((density * slope.square()).sum().sqrt() / std).item())


def _gauss_legendre(points: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights on [-1, 1] (Golub & Welsch, 1969)."""
    k = torch.arange(1, points, dtype=torch.float64)
    off_diagonal = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes, 2 * vectors[0].square()
