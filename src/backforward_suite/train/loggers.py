"""The curves of a run: TensorBoard, or another of Lightning's loggers. `metrics.csv` is written in any case.

`conf/logger` has a config for each; its `_target_` makes the logger from the run's folder. Your own works as well: any
function of `folder` and the further keys of its config that returns a Lightning `Logger`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from backforward_suite.atomic import whole
from backforward_suite.config import Request
from backforward_suite.errors import BadInput, cause_of
from backforward_suite.explain import causes
from backforward_suite.train import hparams

TENSORBOARD = "backforward_suite.train.loggers.tensorboard"
MLFLOW_RUN = "mlflow.txt"  # in a run's folder: MLflow's id of the run


def opened(folder: Path, request: Request, resumed_after: int | None) -> Logger:
    """Return the logger of a run, with the run's settings logged.

    Args:
        folder: The run's folder.
        request: The run's settings.
        resumed_after: The global step of the checkpoint from which the run resumes; None without one.

    Raises:
        BadInput: The logger cannot be opened: its package is missing, say, or its server does not answer.
    """
    asked = request.settings.logger
    if asked is None or asked.target == TENSORBOARD:  # None: settings of an older version
        return tensorboard(folder, request, resumed_after)
    name = str(asked.target).rpartition(".")[2]
    try:
        made: Logger = instantiate(request.cfg.logger, folder=folder, _convert_="all")
        made.log_hyperparams(hparams.readable(request))
    except Exception as error:  # each tracker has its own kinds: not logged in, no connection, a wrong key
        missing = any(isinstance(cause, ModuleNotFoundError) for cause in causes(error))
        if missing and name in ("wandb", "mlflow"):
            raise BadInput(f"logger={name}: its package is not installed; pip install -e '.[{name}]'") from None
        reason = cause_of(error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error)
        raise BadInput(f"logger={name} cannot be opened ({reason}); mend that, or give logger=tensorboard") from error
    return made


def close(logger: Logger, folder: Path, request: Request, final: Mapping[str, Any], step: int) -> None:
    """Log a run's final metrics, and close the logger."""
    if isinstance(logger, TensorBoardLogger):
        hparams.log(logger, folder, request, final, step)
    else:
        logger.log_metrics({key: final[key] for key in hparams.METRICS if hparams.is_finite(final.get(key))}, step)
        logger.save()
    logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()  # Lightning leaves it open until the process ends


def tensorboard(folder: Path, request: Request, resumed_after: int | None) -> TensorBoardLogger:
    """Return TensorBoard's logger; it hides the events after the checkpoint from which the run resumes."""
    earlier = any(folder.glob("events.out.*"))
    purge = None if not earlier else 0 if resumed_after is None else resumed_after + 1
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False, purge_step=purge)
    logger.hparams.update(hparams.readable(request))
    return logger


def csv(folder: Path) -> CSVLogger:
    """Return a logger of every point of every curve in `csv/version_0/metrics.csv`; a resumed run's in `version_1`."""
    return CSVLogger(folder, name="csv", flush_logs_every_n_steps=1_000_000)  # the record saves after logging


def wandb(folder: Path, **settings: Any) -> WandbLogger:
    """Return a logger for Weights & Biases; a resumed run continues its run there."""
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    group = folder.parent.name  # the sweep
    return WandbLogger(name=folder.name, save_dir=folder, id=identity, resume="allow", group=group, **settings)


def mlflow(folder: Path, **settings: Any) -> MLFlowLogger:
    """Return a logger for MLflow; a resumed run continues its run there."""
    kept = folder / MLFLOW_RUN
    known = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
    logger = MLFlowLogger(run_name=folder.name, run_id=known, **settings)
    if known is None and (made := logger.run_id):  # None except in the first process
        with whole(kept) as file:
            file.write(f"{made}\n")
    return logger
