"""Networks: every one takes ``norm=none|batch|prop`` and the same seed gives the same initial weights in every arm."""

from backforward.models.mlp import MLP

__all__ = ["MLP"]
