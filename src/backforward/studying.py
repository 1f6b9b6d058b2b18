"""A study, from its setting to its result: what `fitting` is for a training."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from backforward.precision import set_matmul_precision
from backforward.results import assembled, shows_progress
from backforward.runs import Result, write_study
from backforward.settings import Settings
from backforward.studies.study import Item, Setting, Study, Track

QUIET_SECONDS = 2.0  # a study that takes no longer shows no bar


def conduct(
    settings: Settings,
    asked: dict[str, Any],
    study: Study,
    setting: Setting,
    folder: Path | None,
    choices: dict[str, str] | None = None,
) -> Result:
    """Let a study find out what it is for; write its rows, and say what came of it.

    Args:
        settings: The checked settings.
        asked: The same as plain values; hashed, and written into the result.
        study: The study.
        setting: What it works with.
        folder: Where `study.csv` goes; None writes nothing.
        choices: By group, the name of the config it was read from: `study: one_step`.

    Returns:
        The content of `result.json`, as of a training.

    Raises:
        BadInput: The settings make no sense for this study.
    """
    set_matmul_precision(settings.trainer.matmul_precision)
    torch.manual_seed(setting.seed)  # of dropout
    started = time.perf_counter()
    final, rows = study(setting)
    seconds = time.perf_counter() - started
    if folder is not None:
        write_study(folder, rows)
    return assembled(
        {"status": "finished", "final": final, "best": {}, "arithmetic": [], "parameters": None},
        asked,
        choices or {},
        setting.data,
        setting.device,
        {"seconds": seconds, "training_seconds": 0.0, "samples_per_second": None},
    )


def place(settings: Settings) -> dict[str, Any]:
    """Device and precision of a study, as Lightning would choose them for one device."""
    on_gpu = settings.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return {
        "device": torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        "dtype": torch.float64 if settings.trainer.precision == "64-true" else torch.float32,
    }


def tracker(settings: Settings) -> Track:
    """Draws a bar for a loop that takes a while, where trainings draw theirs."""
    shown = shows_progress(settings)

    def track(items: Iterable[Item], *, total: int, what: str) -> Iterable[Item]:
        bar: Iterable[Item] = tqdm(items, what, total, delay=QUIET_SECONDS, leave=False, disable=not shown)
        return bar

    return track
