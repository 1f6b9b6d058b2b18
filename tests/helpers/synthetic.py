"""Run folders with a known effect, as training would have written them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from backforward_suite.report.reading import Run, read_runs
from backforward_suite.runs.files import write_metrics, write_result

STEPS = 100  # batches in an epoch
BATCH = 128
# By method, as a rehearsal of an MLP 784-256-10 on two images counts them: multiply-accumulates, updates of a weight.
ARITHMETIC = {"sgd": (1.0, 1.0), "bfp": (1.5, 1.0), "bfp_poster": (2.5, 2.0), "sgd_repeat": (2.0, 2.0)}
FORWARD = 203_264  # multiply-accumulates of one image


def write_run(
    root: Path,
    experiment: str,
    *,
    method: str = "sgd",
    lr: float = 0.1,
    seed: int = 0,
    scale: str = "small",
    losses: Sequence[float] = (0.4, 0.2, 0.1),
    accuracy: float = 0.97,
    status: str = "finished",
    data: str = "mnist",
    metrics: Mapping[str, Sequence[float]] | None = None,
    final: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    choices: Mapping[str, str] | None = None,
    arithmetic: Sequence[Mapping[str, float]] | None = None,
    seconds: float = 10.0,
    diagnostics: pd.DataFrame | None = None,
    study: pd.DataFrame | None = None,
    name: str = "",
) -> Path:
    """Write a run's folder, `root/scale/experiment/name`.

    Args:
        losses: Training loss of each epoch; the joint pass's is half of it.
        accuracy: After the last epoch, on validation and test data.
        metrics: Further columns, a value for each epoch.
        final: Further final numbers.
        settings: Further settings, by dotted key.
        choices: Further choices of groups.

    Returns:
        The folder.
    """
    folder = root / scale / experiment / (name or f"{method}-lr{lr:g}-seed{seed}")
    folder.mkdir(parents=True)
    columns: dict[str, Sequence[float]] = {
        "loss/train": losses,
        "loss/validation": [1.2 * loss for loss in losses],
        "accuracy/train": [1 - loss / 4 for loss in losses],
        "accuracy/validation": np.linspace(0.8, accuracy, len(losses)).tolist(),
        "weight_norm/total": [20 + 0.1 * epoch for epoch in range(len(losses))],
        "weight_norm/sum": [27 + 0.1 * epoch for epoch in range(len(losses))],
        **({"loss/train_joint": [loss / 2 for loss in losses]} if method == "bfp_poster" else {}),
        **(metrics or {}),
    }
    rows: list[dict[str, float | int | None]] = [{"epoch": 0, "step": 0, "lr": lr, "loss/validation": math.log(10)}]
    for k in range(len(losses)):
        rows.append({"epoch": k + 1, "step": STEPS * (k + 1), "lr": lr} | {key: x[k] for key, x in columns.items()})
    write_metrics(folder, rows)
    factor, updates = ARITHMETIC.get(method, (1.0, 1.0))
    all_settings: dict[str, Any] = {
        "method": {"_target_": method},
        "data": {"name": data, "train_images": None, "protocol": "holdout"},
        "lr": lr,
        "seed": seed,
        "batch_size": BATCH,
        "max_epochs": len(losses),
    }
    for key, value in (settings or {}).items():
        *path, leaf = key.split(".")
        inner = all_settings
        for part in path:
            inner = inner.setdefault(part, {})
        inner[leaf] = value
    counted = {
        "from_epoch": 0,
        "samples": 2,
        "forward": 2 * FORWARD,
        "update": 6 * FORWARD * factor,
        "updates": updates,
    }
    last = {key: value for key, value in rows[-1].items() if value is not None and math.isfinite(value)}
    tested = {} if status == "diverged" else {"accuracy/test": accuracy, "loss/test": 1.2 * losses[-1]}
    write_result(
        folder,
        {
            "status": status,
            "choices": {"method": method, "data": data, **(choices or {})},
            "settings": all_settings,
            "settings_hash": folder.name,
            "final": {**last, **tested, **(final or {})},
            "arithmetic": arithmetic or [counted | {"updates": updates}],
            "data": {"name": data, "train": 55_000, "classes": 10},
            "hardware": {"device": "a synthetic machine"},
            "timing": {"training_seconds": seconds * factor, "seconds": 1.5 * seconds * factor},
        },
    )
    for kind, frame in (("diagnostics", diagnostics), ("study", study)):
        if frame is not None:
            frame.to_csv(folder / f"{kind}.csv", index=False, na_rep="nan")
    return folder


def curve(speed: float, epochs: int = 8, seed: int = 0, noise: float = 0.02, start: float = 0.6) -> list[float]:
    """A loss that falls by `exp(-0.5 speed)` an epoch, its height moved by a draw that belongs to the seed.

    Two arms of one seed share the draw: their difference is free of it, as in training.
    """
    height = math.exp(noise * float(np.random.default_rng(seed).standard_normal()))
    return [start * height * math.exp(-0.5 * speed * epoch) for epoch in range(epochs)]


def write_sweep(
    root: Path,
    experiment: str,
    speeds: Mapping[str, float],
    *,
    lrs: Sequence[float] = (0.1,),
    seeds: int = 5,
    spread: float = 0.02,
    epochs: int = 8,
    **others: Any,
) -> list[Run]:
    """Write arms that differ in speed alone; `spread` is that of a run's speed about its arm's.

    Returns:
        What `read_runs` makes of them.
    """
    for k, (method, speed) in enumerate(speeds.items()):
        for lr in lrs:
            for seed in range(seeds):
                own = np.random.default_rng((seed, k, round(1000 * lr))).standard_normal()
                losses = curve(speed * math.exp(spread * own), epochs, seed)
                write_run(root, experiment, method=method, lr=lr, seed=seed, losses=losses, **others)
    return read_runs(root)
