"""Run a study and assemble its result, as `train` does for a training."""

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

QUIET_SECONDS = 2.0  # shorter studies show no progress bar


def study(request: Request, folder: Path | None) -> Result:
    """Build what the request asks for, try it on a few images, and run the study.

    Args:
        request: The request.
        folder: As in `conduct`.

    Raises:
        BadInput: The request asks for something impossible.
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
    """Run a study, write its rows and assemble its result.

    Args:
        request: The request.
        study: The study.
        setting: Its input.
        folder: The folder for `study.csv`; None writes nothing.

    Returns:
        The content of `result.json`, as for a training.

    Raises:
        BadInput: The settings make no sense for this study.
    """
    set_matmul_precision(request.settings.trainer.matmul_precision)
    torch.manual_seed(setting.seed)  # for dropout
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
    """Device and precision, as Lightning would choose them for one device."""
    on_gpu = settings.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return {
        "device": torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        "dtype": torch.float64 if settings.trainer.precision == "64-true" else torch.float32,
    }


def _tracker(settings: Settings) -> Track:
    """A progress bar for long loops, where trainings show theirs."""
    shown = shows_progress(settings)

    def track(items: Iterable[Item], *, total: int, what: str) -> Iterable[Item]:
        bar: Iterable[Item] = tqdm(items, what, total, delay=QUIET_SECONDS, leave=False, disable=not shown)
        return bar

    return track
