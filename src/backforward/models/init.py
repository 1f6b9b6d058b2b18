"""Initial weights: a function of the seed, the layer's position in forward order and the tensor's name alone.

So the same seed gives every arm of a comparison (``norm=none|batch|prop``) the same weights, and a bias that only some
arms have changes no other draw.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

INITS = ("he", "glorot", "lecun", "default")


@contextmanager
def undisturbed_generator() -> Iterator[None]:
    """Restore torch's global generator at the end: building a layer draws weights that are drawn again later."""
    with torch.random.fork_rng(devices=[]):
        yield


def initialise_(model: nn.Module, init: str, seed: int | None = None) -> None:
    """Draw the weights of all linear and convolutional layers.

    | init    | weights                               | biases                  |
    |---------|---------------------------------------|-------------------------|
    | he      | N(0, 2 / fan_in)                      | U(-1, 1) / sqrt(fan_in) |
    | glorot  | U(-1, 1) sqrt(6 / (fan_in + fan_out)) | 0                       |
    | lecun   | N(0, 1 / fan_in)                      | 0                       |
    | default | U(-1, 1) / sqrt(fan_in)               | U(-1, 1) / sqrt(fan_in) |

    ``he`` is the setting of the published Backforward Propagation runs (weights of He et al., 2015, PyTorch's biases),
    ``glorot`` that of NormProp (section 4.3), ``lecun`` that of self-normalising networks (SELU), ``default`` PyTorch's
    own. The scales of BatchNorm and NormProp stay 1, the shifts 0.

    Args:
        model: Changed in place. Layers count in the order in which they were registered.
        init: One of the above.
        seed: Any integer; ``None`` draws one from torch's global generator.

    Raises:
        ValueError: ``init`` is unknown.
    """
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}: there are {', '.join(INITS)}")
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    layers = [module for module in model.modules() if _weight_matrix(module) is not None]
    for position, layer in enumerate(layers):
        weight = _weight_matrix(layer)
        assert weight is not None
        fan_in = weight[0].numel()
        fan_out = weight.shape[0] * weight[0, 0].numel()
        bound = 1 / math.sqrt(fan_in)
        draw = generator(seed, position, "weight")
        if init in ("he", "lecun"):
            drawn = torch.randn(weight.shape, generator=draw) * math.sqrt((2 if init == "he" else 1) / fan_in)
        else:
            drawn = _uniform(weight, math.sqrt(6 / (fan_in + fan_out)) if init == "glorot" else bound, draw)
        if parametrize.is_parametrized(layer, "weight"):
            layer.weight = drawn.to(weight)  # the parametrization computes its parameters from this weight
        else:
            _fill(weight, drawn)
        bias = getattr(layer, "bias", None)
        if isinstance(bias, Tensor):
            drawn = _uniform(bias, bound, generator(seed, position, "bias"))
            _fill(bias, torch.zeros_like(drawn) if init in ("glorot", "lecun") else drawn)


def _weight_matrix(module: nn.Module) -> Tensor | None:
    if parametrize.is_parametrized(module, "weight"):
        return module.weight.detach()  # type: ignore[operator]  # computed from the parametrization's parameters
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.ndim >= 2 else None


def generator(*purpose: object) -> torch.Generator:
    """Return a CPU generator seeded by a purpose (seed, position, name), so that no draw affects another's."""
    digest = hashlib.sha256("/".join(map(str, purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _uniform(like: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(like.shape, generator=generator) * 2 - 1) * bound


def _fill(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)
