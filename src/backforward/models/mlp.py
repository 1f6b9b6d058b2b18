"""The multi-layer perceptron of the Backforward Propagation paper, of any depth and width."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from backforward.models.blocks import Blocks, Chain, at_least, dropout_or_none
from backforward.models.init import initialise_, undisturbed_generator
from backforward.models.norms import Norm


class MLP(Chain):
    """Fully connected network: ``flatten``, ``hidden1`` .. ``hidden<depth>``, ``head``.

    The defaults with MNIST's images give the 784-256-10 network of Stoica & Simionescu, "Backforward Propagation",
    AAAI 2023.

    Shape: ``[N, *in_shape]`` to logits ``[N, classes]``.

    Args:
        in_shape: Shape of one input, such as ``(1, 28, 28)``.
        classes: Number of logits.
        hidden: Units of each hidden layer.
        depth: Number of hidden layers.
        activation: ``relu``, ``tanh``, ... (``normprop.ACTIVATIONS``).
        norm: ``none``, ``batch``, ``prop``, or a function of a layer (``models.norms``).
        jacobian_factor: NormProp's J: ``none``, ``paper``, ``exact`` or a number. For ``norm="prop"`` only.
        dropout: Probability of dropping a hidden unit in training.
        init: ``he``, ``glorot``, ``lecun`` or ``default`` (``models.init``).
        seed: Seed of the initial weights; ``None`` draws one from torch's global generator.

    Raises:
        ValueError: A name is unknown or a size is out of range.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        classes: int,
        hidden: int = 256,
        depth: int = 1,
        *,
        activation: str = "relu",
        norm: str | Norm = "none",
        jacobian_factor: str | float = "exact",
        dropout: float = 0.0,
        init: str = "he",
        seed: int | None = None,
    ) -> None:
        at_least(1, classes=classes, hidden=hidden)
        at_least(0, depth=depth)
        blocks = Blocks(norm, activation, jacobian_factor)
        widths = [math.prod(in_shape)] + [hidden] * depth
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        with undisturbed_generator():
            for i in range(depth):
                layers[f"hidden{i + 1}"] = blocks.linear(widths[i], widths[i + 1])
                if drop := dropout_or_none(dropout):
                    layers[f"dropout{i + 1}"] = drop
            layers["head"] = blocks.last_linear(widths[-1], classes)
        super().__init__(layers)
        initialise_(self, init, seed)
