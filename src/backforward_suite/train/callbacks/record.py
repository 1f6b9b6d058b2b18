"""The record of a run: one row of metrics per epoch, in `metrics.csv` and in TensorBoard."""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger

from backforward.rules import StepResult
from backforward_suite.hardware import process_age
from backforward_suite.runs.files import write_metrics
from backforward_suite.train.module import Batch, Classification, EachBatch, wait_for, weight_norms
from backforward_suite.train.readings import Reading, Readings

Row = dict[str, float | int | None]


class RunRecord(EachBatch):
    """Collects one row of metrics before training and one after each epoch.

    The rows are part of the checkpoint: an interrupted and resumed run writes the same file as one that was not.

    Args:
        folder: The folder of `metrics.csv`; None keeps the rows in memory only.
        log_every: Batches between two points of `loss/batch` in TensorBoard.

    Attributes:
        rows: Row 0 from before training, then one per finished epoch.
        seconds: Time in training steps, over all processes that have worked on this run.
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
        self._earlier = 0.0  # seconds of earlier processes, up to their last checkpoints
        self._began = time.perf_counter()
        self._started = 0.0
        self._seen = 0
        self._points = Readings()

    # --- hooks -------------------------------------------------------------------------------------------------------

    def on_sanity_check_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Add row 0: Lightning's sanity check, over the whole validation set, is the evaluation before training."""
        assert isinstance(module, Classification)
        if not self.rows:  # Lightning repeats the check when a run resumes
            self._add(trainer, {**module.evaluated, **weight_norms(module.network)}, epoch=0)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock, also when a run resumes within an epoch."""
        self.start_seconds = process_age()
        self._start_clock()

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self._start_clock()

    def after_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, out: StepResult, step: int) -> bool:
        """Count samples; every `log_every` batches, log the loss."""
        self._seen += len(batch[1]) * trainer.world_size
        if step % self.log_every == 0 and trainer.logger is not None:
            loss = out.loss
            if trainer.world_size > 1:
                loss = trainer.strategy.reduce(loss.clone(), reduce_op="mean")
            self._log(trainer, self._points.look(loss, step))
        return False

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Stop the clock after the epoch's last batch, before the evaluation."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            wait_for(module.device)
            self.seconds += time.perf_counter() - self._started
            self.samples += self._seen
            self._start_clock()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Add the epoch's row."""
        assert isinstance(module, Classification)
        self._log(trainer, self._points.take())
        metrics = {**module.train_metrics(), **module.evaluated, **weight_norms(module.network)}
        self._add(trainer, metrics, epoch=trainer.current_epoch + 1)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Log all points up to the checkpoint: a run that resumes from it will not."""
        self._log(trainer, self._points.take())
        if trainer.logger is not None:
            trainer.logger.save()

    def state_dict(self) -> dict[str, Any]:
        """Return rows and times so far."""
        return {"rows": self.rows, "seconds": self.seconds, "samples": self.samples, "elapsed": self.elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.rows, self.seconds, self.samples = state["rows"], state["seconds"], state["samples"]
        self._earlier = state.get("elapsed", 0.0)  # missing in an older version's

    # --- results -----------------------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Return the seconds of all processes of this run, of an interrupted one up to its last checkpoint."""
        return self._earlier + time.perf_counter() - self._began

    def timing(self) -> dict[str, float | None]:
        """Return the times for `result.json`."""
        return {
            "seconds": self.elapsed(),
            "start_seconds": self.start_seconds,
            "training_seconds": self.seconds,
            "samples_per_second": self.samples / self.seconds if self.seconds else None,
        }

    def best(self) -> Row | None:
        """Return the row of the highest validation accuracy, the earliest of equals."""
        scored = [row for row in self.rows if row.get("accuracy/validation") is not None]
        return max(scored, key=lambda row: row["accuracy/validation"] or 0.0, default=None)

    def add(self, metrics: dict[str, float], *, epoch: int, step: int, lr: float, logger: Logger | None) -> None:
        """Add the row of an epoch (0: before training), write and log it."""
        self._append(metrics, epoch, step, lr)
        self.write()
        if logger is not None:
            speed = {"speed/samples_per_second": self.samples / self.seconds} if self.seconds else {}
            logger.log_metrics({**metrics, **speed, "lr": lr, "epoch": epoch}, step=step)
            logger.save()

    def write(self) -> None:
        """Write all rows to `metrics.csv`."""
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
            self._append(metrics, epoch, step, lr)

    def _append(self, metrics: dict[str, float], epoch: int, step: int, lr: float) -> None:
        self.rows = [*self.rows[:epoch], {"epoch": epoch, "step": step, "lr": lr, **metrics}]

    def _start_clock(self) -> None:
        self._seen, self._started = 0, time.perf_counter()
