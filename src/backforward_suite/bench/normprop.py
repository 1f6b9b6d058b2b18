"""Cost of normalisation: the study of a training step without norm, with BatchNorm and with NormProp, in turn."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from backforward_suite.bench.common import Row, data_overrides, train

WIDTHS = (1.0, 0.25)
BATCHES = (50, 100)


def run(root: Path) -> list[Row]:
    """Time a training step of NIN with momentum, weight decay and, for NormProp, the projection to unit norm.

    Returns:
        One row per width and batch size: milliseconds per step, and medians of the ratios within a round. The paper
        reports .875 for NormProp / BatchNorm.
    """
    return [_row(root, width, batch) for width, batch in product(WIDTHS, BATCHES)]


def _row(root: Path, width: float, batch: int) -> Row:
    choice = [f"model.width={width:g}", f"batch_size={batch}", "optimizer=sgd_momentum", "weight_decay=5e-4"]
    final = train(["study=speed", "model=nin", *data_overrides("cifar10", root), *choice])["final"]
    return {
        "case": f"nin, width {width:g}, batch {batch}",
        **{f"{norm}_ms": final[f"time/median_ms/{norm}"] for norm in ("none", "batch", "prop")},
        **{f"prop/{norm}": final[f"time/ratio/prop_{norm}"] for norm in ("none", "batch")},
    }
