"""What normalisation costs: a training step of the Network in Network without norm, with BatchNorm, with NormProp."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backforward.models import NIN, weight_decay_groups
from backforward.normprop import unit_norm_projection
from backforward_suite.timing import Timing, interleaved

WIDTHS = (1.0, 0.25)
BATCHES = (50, 100)
LAYOUTS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
ROUNDS = 15
SECONDS_A_TURN = 0.2

RATIOS = (("prop", "none"), ("prop", "batch"), ("prop_unprojected", "none"))


def run() -> dict[str, Any]:
    """Time one training step on images of CIFAR's size: forward, cross-entropy, backward, SGD with momentum and decay.

    Images are in memory, normalised. ``prop`` projects its weights to unit norm after each step, ``prop_unprojected``
    does not. Every width and batch size is measured in the networks' own memory layout (channels last) and in PyTorch's
    default one: BatchNorm's overhead differs, and so does the step as a whole.

    Returns:
        ``cases``: width, batch, layout, ``milliseconds`` per step of each arm (the median round) and ``ratios``, each
        with the quartiles and the median of the ratio within a round. The paper has .875 for NormProp / BatchNorm.
    """
    return {"cases": [_case(*case) for case in product(WIDTHS, BATCHES, LAYOUTS)]}


def _case(width: float, batch: int, layout: str) -> dict[str, Any]:
    def arm(norm: str, *, project: bool = False) -> Callable[[], None]:
        network = NIN((3, 32, 32), 10, width, norm, seed=0)
        network.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]  # missing in torch's stubs
        return training_step(network, x, y, project=project)

    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.arange(batch) % 10
    arms = {
        "none": arm("none"),
        "batch": arm("batch"),
        "prop": arm("prop", project=True),
        "prop_unprojected": arm("prop"),
    }
    times = interleaved(arms, ROUNDS, SECONDS_A_TURN)
    return {
        "case": f"NIN, width {width:g}, batch {batch}, {layout}",
        "width": width,
        "batch": batch,
        "layout": layout,
        "milliseconds": {name: timing.median for name, timing in times.items()},
        "ratios": {f"{ours}/{theirs}": _ratio(times[ours], times[theirs]) for ours, theirs in RATIOS},
    }


def training_step(network: NIN, x: Tensor, y: Tensor, *, project: bool) -> Callable[[], None]:
    """One batch of plain training as a call: momentum 0.9, weight decay, and the projection where asked for."""
    optimizer = torch.optim.SGD(weight_decay_groups(network), lr=0.01, momentum=0.9, weight_decay=5e-4)
    parameters = list(network.parameters())
    after_update = unit_norm_projection(network)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        if project:
            after_update(parameters)

    return step


def _ratio(ours: Timing, theirs: Timing) -> dict[str, float]:
    low, middle, high = ours.ratio_quartiles(theirs)
    return {"lower_quartile": low, "median": middle, "upper_quartile": high}
