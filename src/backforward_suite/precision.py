"""The precision of float32 products."""

from __future__ import annotations

import torch


def set_matmul_precision(precision: str) -> None:
    """Set the precision of matrix products and convolutions.

    PyTorch's own switch does not cover convolutions, which use TF32 (ten bits) on a GPU by default.

    Args:
        precision: `highest` (float32), `high` (TF32 on a GPU), `medium` (bfloat16; convolutions TF32).
    """
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
