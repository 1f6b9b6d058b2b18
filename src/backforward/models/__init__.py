"""Networks that take ``norm=none|batch|prop``; a seed gives the same initial weights under each norm."""

from backforward.models.mlp import MLP
from backforward.models.nin import NIN
from backforward.models.residual import Residual
from backforward.models.weight_decay import weight_decay_groups

__all__ = ["MLP", "NIN", "Residual", "weight_decay_groups"]
