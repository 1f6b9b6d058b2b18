"""Further norms beside ``none``, ``batch`` and ``prop``.

    Blocks(norm=partial(group_norm, groups=4))        # in a config: _target_: backforward.models.norms.group_norm

A norm is a function of a hidden layer (`nn.Linear` or `nn.Conv2d`, with bias). It returns the module to put between the
layer and its activation, or it changes how the layer computes its weight and returns None. `Blocks` removes the layer's
bias if the module has a shift of its own. The last layer of a network stays plain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from backforward.moments import gaussian_moments

Norm: TypeAlias = Callable[[nn.Module], nn.Module | None]


def features(layer: nn.Module) -> int:
    """Return the number of outputs of a linear layer, or of filters of a convolution."""
    return int(layer.get_parameter("weight").shape[0])


def of_features(layer: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """Return a module made from the number of outputs: ``make=functools.partial(nn.BatchNorm2d, momentum=0.01)``."""
    return make(features(layer))


def layer_norm(layer: nn.Module, eps: float = 1e-5) -> nn.Module:
    """Layer normalisation (Ba, Kiros & Hinton, 2016): over all features, and positions in an image, of a sample."""
    if isinstance(layer, nn.Linear):
        return nn.LayerNorm(features(layer), eps)
    return nn.GroupNorm(1, features(layer), eps)


def group_norm(layer: nn.Module, groups: int, eps: float = 1e-5) -> nn.Module:
    """Group normalisation (Wu & He, 2018): over the features, and positions in an image, of each group.

    Raises:
        ValueError: The number of features is not a multiple of ``groups``.
    """
    return nn.GroupNorm(groups, features(layer), eps)


def weight_norm(layer: nn.Module) -> None:
    """Weight normalisation (Salimans & Kingma, 2016): W_i = g_i v_i / ||v_i||, torch's own; g starts at ||W_i||."""
    parametrizations.weight_norm(layer)


def weight_standardization(layer: nn.Module, activation: str = "relu", eps: float = 1e-8) -> None:
    """Scaled weight standardisation (Brock, De & Smith, 2021): see `ScaledStandardization`."""
    weight = layer.get_parameter("weight")
    if weight[0].numel() < 2:
        raise ValueError("weight_standardization: a unit with one weight has no standard deviation")
    parametrize.register_parametrization(layer, "weight", ScaledStandardization(len(weight), activation, eps))


class ScaledStandardization(nn.Module):
    """Computes the weight from a trained v ``[units, ...]`` with N numbers per unit.

        W_i = gain_i gamma (v_i - mean(v_i)) / sqrt(N var(v_i) + eps)

    The gain is trained and starts at 1. gamma is 1 / std(act(z)) for a standard normal z: 1.7129 for ReLU, the inverse
    of NormProp's .5838. Activations then keep variance 1 from layer to layer, and W_i x has mean 0 if all features of x
    have the same mean.

    Args:
        units: Outputs of the layer.
        activation: The activation after it (``normprop.ACTIVATIONS``).
        eps: Avoids a division by 0.

    Source: Brock, De & Smith, "Characterizing signal propagation to close the performance gap in unnormalized ResNets",
    ICLR 2021.
    """

    def __init__(self, units: int, activation: str = "relu", eps: float = 1e-8) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(units))
        self.gamma = 1 / float(gaussian_moments(activation).std)
        self.eps = eps

    def forward(self, v: Tensor) -> Tensor:
        """Return the weight that the layer uses."""
        flat = v.flatten(1)
        variance, mean = torch.var_mean(flat, dim=1, keepdim=True, correction=0)
        scale = self.gain[:, None] * self.gamma * torch.rsqrt(variance * flat.shape[1] + self.eps)
        return ((flat - mean) * scale).view_as(v)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Start training from the weight that was drawn."""
        return weight


def noisy_batch_norm(
    layer: nn.Module, mean: float = 0.5, std: float = 1.25, mean_radius: float = 0.1, std_radius: float = 0.1
) -> nn.Module:
    """BatchNorm followed by noise: see `NoisyBatchNorm`."""
    return NoisyBatchNorm(features(layer), mean, std, mean_radius, std_radius)


class NoisyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm followed by random scales and shifts, whose distribution changes at every step.

    In training, each step draws for each unit (feature or channel) j

        m_j ~ U(-mean, mean)        s_j ~ U(1, std)

    and then changes BatchNorm's output a for each sample (and position of an image) i:

        a_ij <- S_ij a_ij + M_ij    M_ij ~ U(m_j - mean_radius, m_j + mean_radius)    S_ij ~ N(s_j, std_radius^2)

    So the next layer's input shifts from step to step, by construction. In evaluation it is BatchNorm. All passes of a
    batch see the same noise, as with dropout.

    Shape: ``[N, features]`` or ``[N, features, H, W]`` to the same.

    Args:
        num_features: Features or channels.
        mean, std, mean_radius, std_radius: See above. The source gives the form; the defaults are this suite's choice.

    Source: Santurkar, Tsipras, Ilyas & Madry, "How does batch normalization help optimization?", NeurIPS 2018,
    section 2.
    """

    def __init__(
        self,
        num_features: int,
        mean: float = 0.5,
        std: float = 1.25,
        mean_radius: float = 0.1,
        std_radius: float = 0.1,
    ) -> None:
        if min(mean, mean_radius, std_radius) < 0 or std < 1 or not math.isfinite(mean + std):
            raise ValueError(f"NoisyBatchNorm: mean={mean}, std={std}: give mean and radii at least 0, std at least 1")
        super().__init__(num_features)
        self.noise = (mean, std, mean_radius, std_radius)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"NoisyBatchNorm takes [N, features] or [N, channels, H, W], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, and add noise in training."""
        a = super().forward(input)
        if not self.training:
            return a
        mean, std, mean_radius, std_radius = self.noise
        shape = [1, a.shape[1], *[1] * (a.dim() - 2)]
        m = (2 * torch.rand(shape, dtype=a.dtype, device=a.device) - 1) * mean
        s = 1 + torch.rand(shape, dtype=a.dtype, device=a.device) * (std - 1)
        shifts = m + (2 * torch.rand_like(a) - 1) * mean_radius
        scales = s + torch.randn_like(a) * std_radius
        return torch.addcmul(shifts, scales, a)

    def extra_repr(self) -> str:
        """Show the features and the noise."""
        return f"{self.num_features}, noise={self.noise}"
