"""Where a run's curves go: TensorBoard, or another of Lightning's loggers. `metrics.csv` is written in any case.

`conf/logger` has a config for each; its `_target_` makes the logger from the run's folder. One's own works as well:
any function of `folder` and the further keys of its config that returns a Lightning `Logger`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from backforward_suite.atomic import whole
from backforward_suite.cli import refusing
from backforward_suite.config import Request
from backforward_suite.errors import BadInput
from backforward_suite.train import hparams

TENSORBOARD = "backforward_suite.train.loggers.tensorboard"
MLFLOW_RUN = "mlflow.txt"  # the file in a run's folder that holds MLflow's id of the run


def opened(folder: Path, request: Request, resumed_after: int | None) -> Logger:
    """The logger of a run, with the run's settings in it.

    Args:
        folder: The run's.
        request: What was asked for.
        resumed_after: The step of the checkpoint where this sitting goes on; None in a first sitting, and where one
            that was cut off left no checkpoint.

    Raises:
        BadInput: Its package is not installed, or it refuses its settings.
    """
    asked = request.settings.logger
    if asked is None or asked.target == TENSORBOARD:  # None: settings from before there was a choice
        return tensorboard(folder, request, resumed_after)
    try:
        with refusing():
            made: Logger = instantiate(request.cfg.logger, folder=folder, _convert_="all")
    except BadInput as error:
        missing = next((cause for cause in _causes(error) if isinstance(cause, ModuleNotFoundError)), None)
        if missing is None:
            raise
        name = str(asked.target).rpartition(".")[2]
        raise BadInput(f"logger={name}: its package is not installed; pip install {name}, or another logger") from None
    made.log_hyperparams(hparams.readable(request))
    return made


def close(logger: Logger, folder: Path, request: Request, final: Mapping[str, Any], step: int) -> None:
    """Log a run's final metrics, and end the logger."""
    if isinstance(logger, TensorBoardLogger):
        hparams.log(logger, folder, request, final, step)
    else:
        logger.log_metrics({key: final[key] for key in hparams.METRICS if hparams.is_finite(final.get(key))}, step)
        logger.save()
    logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()  # Lightning leaves it open until the process ends


def tensorboard(folder: Path, request: Request, resumed_after: int | None) -> TensorBoardLogger:
    """TensorBoard's events of a run; those after the checkpoint where it goes on are hidden."""
    earlier = any(folder.glob("events.out.*"))
    purge = None if not earlier else 0 if resumed_after is None else resumed_after + 1
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False, purge_step=purge)
    logger.hparams.update(hparams.readable(request))
    return logger


def csv(folder: Path) -> CSVLogger:
    """Every point of every curve in `csv/version_0/metrics.csv`, of the next sitting in `version_1`."""
    return CSVLogger(folder, name="csv", flush_logs_every_n_steps=1_000_000)  # the record saves when it has logged


def wandb(folder: Path, **settings: Any) -> WandbLogger:
    """A run of Weights & Biases, named as the folder; a later sitting goes on with it."""
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    group = folder.parent.name  # the sweep
    return WandbLogger(name=folder.name, save_dir=folder, id=identity, resume="allow", group=group, **settings)


def mlflow(folder: Path, **settings: Any) -> MLFlowLogger:
    """A run of MLflow, named as the folder; a later sitting goes on with it."""
    kept = folder / MLFLOW_RUN
    known = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
    logger = MLFlowLogger(run_name=folder.name, run_id=known, **settings)
    if known is None and (made := logger.run_id):  # none but on the first process
        with whole(kept) as file:
            file.write(f"{made}\n")
    return logger


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
