"""A study, from its setting to its result: what `fitting` is for a training."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from backforward_suite import cli
from backforward_suite.build import Parts
from backforward_suite.config import Request, Settings
from backforward_suite.precision import set_matmul_precision
from backforward_suite.results import assembled, shows_progress
from backforward_suite.runs.files import Result, write_rows
from backforward_suite.runs.identity import own_sources
from backforward_suite.studies.study import Item, Setting, Study, Track

QUIET_SECONDS = 2.0  # a study that takes no longer shows no bar


def study(request: Request, folder: Path | None) -> Result:
    """Build what was asked for, try it on a few images, and make the study.

    Args:
        request: What was asked for.
        folder: As of `conduct`.

    Raises:
        BadInput: Something asked for cannot be had.
    """
    settings = request.settings
    with cli.refusing():
        asked_for: Study = instantiate(request.cfg.study, _convert_="all")
        parts = Parts(request)
        setting = Setting(
            seed=settings.seed,
            batch_size=settings.batch_size,
            data=parts.data,
            make_network=parts.network,
            make_optimizer=parts.optimizer,
            make_rule=lambda network, optimizer: parts.rule(
                network, optimizer, cross_entropy, after_update=parts.projection(network)
            ),
            track=_tracker(settings),
            **_place(settings),
        )
        network = parts.network(settings.seed)
        setting.make_rule(network, parts.optimizer(network)).prepare(parts.few()[0])
    return conduct(request, asked_for, setting, folder)


def conduct(
    request: Request,
    study: Study,
    setting: Setting,
    folder: Path | None,
) -> Result:
    """Let a study find out what it is for; write its rows, and say what came of it.

    Args:
        request: What was asked for.
        study: The study.
        setting: What it works with.
        folder: Where `study.csv` goes; None writes nothing.

    Returns:
        The content of `result.json`, as of a training.

    Raises:
        BadInput: The settings make no sense for this study.
    """
    set_matmul_precision(request.settings.trainer.matmul_precision)
    torch.manual_seed(setting.seed)  # of dropout
    own = own_sources(request.values)
    started = time.perf_counter()
    final, rows = study(setting)
    seconds = time.perf_counter() - started
    if folder is not None:
        write_rows(folder / "study.csv", rows)
    return assembled(
        {"status": "finished", "final": final, "best": {}, "arithmetic": [], "parameters": None},
        request,
        setting.data,
        setting.device,
        {"seconds": seconds, "training_seconds": 0.0, "samples_per_second": None},
        own,
    )


def _place(settings: Settings) -> dict[str, Any]:
    """Device and precision of a study, as Lightning would choose them for one device."""
    on_gpu = settings.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return {
        "device": torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        "dtype": torch.float64 if settings.trainer.precision == "64-true" else torch.float32,
    }


def _tracker(settings: Settings) -> Track:
    """Draws a bar for a loop that takes a while, where trainings draw theirs."""
    shown = shows_progress(settings)

    def track(items: Iterable[Item], *, total: int, what: str) -> Iterable[Item]:
        bar: Iterable[Item] = tqdm(items, what, total, delay=QUIET_SECONDS, leave=False, disable=not shown)
        return bar

    return track
