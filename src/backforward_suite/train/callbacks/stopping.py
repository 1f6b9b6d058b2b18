"""Early stopping: `stop_loss` and `patience`."""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split
from collections.abc import Sequence
from typing import Any

import lightning as L

from backforward_suite.train.callbacks.record import RunRecord


def why_stop(losses: Sequence[float], stop_loss: float | None, patience: int | None, min_delta: float) -> str | None:
    """Return the key that ends the training after these epochs, `stop_loss` or `patience`; None if none does.

    Args:
        losses: The training loss of each epoch so far.
        stop_loss: Stop once the last loss is at most this.
        patience: Stop after this many epochs in a row without a loss below the lowest one minus `min_delta`.
        min_delta: See `patience`.
    """
    if stop_loss is not None and losses and losses[-1] <= stop_loss:
        return "stop_loss"
    if patience is not None:
        lowest, waited = float("inf"), 0
        for loss in losses:
            lowest, waited = (loss, 0) if loss < lowest - min_delta else (lowest, waited + 1)
        if waited >= patience:
            return "patience"
    return None


class Stopping(L.Callback):
    """Ends the training by `why_stop`, from the rows of the run's record, which are part of the checkpoint.

    Args:
        record: The run's record.
        stop_loss, patience, min_delta: See `why_stop`.

    Attributes:
        found: For `result.json`: `stopped_by`, the key that ended the training, and `stopped_at`, the epoch after which
            it did; both are None if training reached its last epoch. Empty without the keys.
    """

    def __init__(self, record: RunRecord, stop_loss: float | None, patience: int | None, min_delta: float) -> None:
        self._record = record
        self._when = (stop_loss, patience, min_delta)
        self._asked = stop_loss is not None or patience is not None
        self.found: dict[str, Any] = {"stopped_by": None, "stopped_at": None} if self._asked else {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """End a run that was interrupted between its last checkpoint and its result: it has nothing left to train."""
        self._look(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Look at the losses, after the record has added this epoch's row."""
        self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        rows = [row for row in self._record.rows if row["epoch"]]
        if self._asked and (key := why_stop([float(row["loss/train"] or 0) for row in rows], *self._when)):
            self.found = {"stopped_by": key, "stopped_at": rows[-1]["epoch"]}
            trainer.should_stop = True
