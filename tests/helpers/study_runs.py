"""Synthetic runs of the experiments that take covariate shift apart, with known effects."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from tests.helpers.synthetic import curve, write_run

ARMS = {
    "sgd": 1.0,
    "bfp": 0.95,
    "bfp_reverse": 1.2,
    "bfp_random": 1.05,
    "fresh_direction": 0.7,
    "fresh_length": 1.3,
    "shift_noise": 1.0,
    "dose 2": 0.9,
    "dose -1": 1.1,
    "head": 0.5,
}
NORMS = ("none", "batch", "noisy_batch", "prop", "layer", "group", "weight", "weight_standardization", "selu")


def write_parts(root: Path, factors: dict[str, float] | None = None, seeds: int = 5) -> None:
    """Each arm's losses are SGD's of the same seed times its factor."""
    for arm, factor in (ARMS | (factors or {})).items():
        method, _, dose = arm.partition(" ")
        settings = {"method.dose": float(dose)} if dose else {"head_lr": 0.3} if arm == "head" else {}
        for lr in (0.05, 0.1):
            for seed in range(seeds):
                noise = 0.002 * np.random.default_rng((seed, list(ARMS).index(arm))).standard_normal()
                losses = [factor * math.exp(noise) * loss for loss in curve(1.0, seed=seed)]
                write_run(
                    root,
                    "bfp_parts",
                    method="sgd" if arm == "head" else method,
                    lr=lr,
                    seed=seed,
                    losses=losses,
                    settings=settings,
                    name=f"{arm.replace(' ', '_')}-{lr}-{seed}",
                )


def write_rates(root: Path, gain: float = 0.9, best: float = 0.2, seeds: int = 10) -> None:
    """A bowl of losses around the best rates, which BFP has at half of SGD's; there it has `gain` times SGD's loss."""
    grid = (0.05, 0.1, 0.2, 0.4)
    for method, centre, level in (("sgd", best, 1.0), ("bfp", best / 2, gain)):
        for lr in grid:
            for head in grid:
                far = math.log2(lr / centre) ** 2 + math.log2(head / best) ** 2
                for seed in (100, *range(200, 200 + seeds)) if far == 0 else (100,):
                    noise = 0.004 * np.random.default_rng((seed, method == "bfp")).standard_normal()
                    losses = [level * math.exp(noise + far / 4) * loss for loss in curve(1.0, seed=seed)]
                    write_run(
                        root,
                        "bfp_rates",
                        method=method,
                        lr=lr,
                        seed=seed,
                        losses=losses,
                        settings={"head_lr": head, "model.depth": 1},
                        name=f"{method}-{lr}-{head}-{seed}",
                    )


def write_to_loss(root: Path, pace: float = 2.0, seeds: int = 5) -> None:
    """SGD reaches the loss after some 10 epochs, the loop at `pace` times SGD's."""
    for method, speed in (("sgd", 1.0), ("bfp_poster", pace)):
        for seed in range(seeds):
            losses = curve(speed, epochs=12, seed=seed)
            losses = losses[: next(k for k, loss in enumerate(losses) if loss <= 0.01) + 1]
            write_run(root, "bfp_to_loss", method=method, seed=seed, losses=losses, settings={"stop_loss": 0.01})


def write_witnesses(root: Path, name: str, noisy: float = 0.95, slope: float = 0.0, seeds: int = 5) -> None:
    """Norms with a rising shift; accuracy falls by `slope` from one to the next; that of noisy BatchNorm is given."""
    for place, norm in enumerate(NORMS):
        for seed in range(seeds):
            draw = np.random.default_rng((seed, place))
            accuracy = noisy if norm == "noisy_batch" else 0.95 - slope * place
            shift = 0.1 * (place + 1) + 0.001 * draw.standard_normal()
            rows = [
                (1, 10, "shift/induced_relative", layer, 1, value) for layer, value in (("one", 0.0), ("two", shift))
            ]
            write_run(
                root,
                name,
                seed=seed,
                data="mnist" if name.startswith("bfp_") else "cifar10",
                accuracy=accuracy + 0.0005 * draw.standard_normal(),
                choices={"norm": norm},
                diagnostics=pd.DataFrame(rows, columns=["epoch", "step", "measure", "layer", "update", "value"]),
                name=f"{norm}-{seed}",
            )
