"""How precisely float32 is multiplied."""

from __future__ import annotations

import torch


def set_matmul_precision(precision: str) -> None:
    """Set it for matrix products and convolutions alike.

    PyTorch's own switch leaves out convolutions, whose default on a GPU is TF32: ten bits, without being asked for.

    Args:
        precision: `highest` (float32), `high` (TF32 on a GPU), `medium` (bfloat16; convolutions TF32).
    """
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
