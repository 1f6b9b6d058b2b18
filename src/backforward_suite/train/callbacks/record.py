"""The record of a run: a row of metrics an epoch, in `metrics.csv` and in TensorBoard."""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from backforward.rules import StepResult
from backforward_suite.hardware import process_age
from backforward_suite.runs.files import write_metrics
from backforward_suite.train.module import Batch, Classification, weight_norms
from backforward_suite.train.readings import Reading, Readings

Row = dict[str, float | int | None]


class RunRecord(L.Callback):
    """Collects a row of metrics before training and after each epoch.

    Its rows travel with the checkpoint: a run that was cut off and resumed writes the same file as one that was not.

    Args:
        folder: Where `metrics.csv` goes; None keeps the rows in memory alone.
        log_every: Batches between two points of `loss/batch` in TensorBoard.

    Attributes:
        rows: One a finished epoch, and row 0 from before training.
        seconds: Time in training steps, over all sittings of this run.
        samples: Samples trained on in that time.
        start_seconds: From the start of this process to its first batch; None where the system does not tell.
    """

    def __init__(self, folder: Path | None, log_every: int = 50) -> None:
        self.folder = folder
        self.log_every = log_every
        self.rows: list[Row] = []
        self.seconds = 0.0
        self.samples = 0
        self.start_seconds: float | None = None
        self._earlier = 0.0  # seconds of earlier sittings, up to their last checkpoints
        self._began = time.perf_counter()
        self._started = 0.0
        self._seen = 0
        self._points = Readings()

    # --- hooks -------------------------------------------------------------------------------------------------------

    def on_sanity_check_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Row 0: Lightning's check of the validation loop, over the whole set, is its evaluation before training."""
        assert isinstance(module, Classification)
        if self.rows:  # resumed at the end of an epoch: Lightning checks the loop again
            return
        self._add(trainer, {**module.evaluated, **weight_norms(module.network)}, epoch=0)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Set the clock, also after a resume within an epoch."""
        self.start_seconds = process_age()
        self._set_clock()

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Set the clock."""
        self._set_clock()

    def before_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, step: int) -> None:
        """Nothing to do."""

    def after_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, out: StepResult, step: int) -> bool:
        """Count samples; from time to time a point of the loss within the epoch."""
        self._seen += len(batch[1]) * trainer.world_size
        if step % self.log_every == 0 and trainer.logger is not None:
            loss = out.loss
            if trainer.world_size > 1:
                loss = trainer.strategy.reduce(loss.clone(), reduce_op="mean")
            self._log(trainer, self._points.look(loss, step))
        return False

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Stop the clock at the end of the last turn."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._stop_clock(module.device)  # before the evaluation

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The epoch's row."""
        assert isinstance(module, Classification)
        self._log(trainer, self._points.take())
        epoch = trainer.current_epoch + 1
        metrics = {**module.train_metrics(), **module.evaluated, **weight_norms(module.network)}
        self._add(trainer, metrics, epoch=epoch)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write out all points so far, which a run that goes on from here would not."""
        self._log(trainer, self._points.take())
        if trainer.logger is not None:
            trainer.logger.save()

    def state_dict(self) -> dict[str, Any]:
        """Rows and times so far."""
        return {"rows": self.rows, "seconds": self.seconds, "samples": self.samples, "elapsed": self.elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.rows, self.seconds, self.samples = state["rows"], state["seconds"], state["samples"]
        self._earlier = state.get("elapsed", 0.0)  # an older version did not keep it

    def elapsed(self) -> float:
        """Seconds over all sittings of this run, those of a sitting that was cut off up to its last checkpoint."""
        return self._earlier + time.perf_counter() - self._began

    # --- the rest ----------------------------------------------------------------------------------------------------

    def best(self) -> Row | None:
        """The row of the highest validation accuracy, the earliest of equals."""
        scored = [row for row in self.rows if row.get("accuracy/validation") is not None]
        return max(scored, key=lambda row: row["accuracy/validation"] or 0.0, default=None)

    def add(self, metrics: dict[str, float], *, epoch: int, step: int, lr: float, logger: Logger | None) -> None:
        """Note the row of an epoch (0 is before training) and write it."""
        self._note(metrics, epoch, step, lr)
        self.write()
        if logger is not None:
            speed = {"speed/samples_per_second": self.samples / self.seconds} if self.seconds else {}
            logger.log_metrics({**metrics, **speed, "lr": lr, "epoch": epoch}, step=step)
            logger.save()  # Lightning does so every so many turns, whatever their length

    def write(self) -> None:
        """Write `metrics.csv` from all rows."""
        if self.folder is not None:
            write_metrics(self.folder, self.rows)

    @staticmethod
    def _log(trainer: L.Trainer, point: Reading | None) -> None:
        if point is not None and trainer.logger is not None:
            step, (loss,) = point
            trainer.logger.log_metrics({"loss/batch": loss}, step=step)

    def _add(self, trainer: L.Trainer, metrics: dict[str, float], epoch: int) -> None:
        lr, step = float(trainer.optimizers[0].param_groups[0]["lr"]), trainer.global_step
        if trainer.is_global_zero:
            self.add(metrics, epoch=epoch, step=step, lr=lr, logger=trainer.logger)
        else:
            self._note(metrics, epoch, step, lr)

    def _note(self, metrics: dict[str, float], epoch: int, step: int, lr: float) -> None:
        row: Row = {"epoch": epoch, "step": step, "lr": lr, **metrics}
        self.rows = [*self.rows[:epoch], row]

    def _set_clock(self) -> None:
        self._seen, self._started = 0, time.perf_counter()

    def _stop_clock(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds += time.perf_counter() - self._started
        self.samples += self._seen
        self._set_clock()
