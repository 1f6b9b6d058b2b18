"""The progress bar of a single run."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from backforward.rules import StepResult
from backforward_suite.train.module import Batch, Classification, EachBatch, means
from backforward_suite.train.readings import Readings


class ProgressBar(EachBatch, TQDMProgressBar):
    """Lightning's bar, with the epoch's loss and accuracy so far; on a GPU, those at the previous redraw.

    Args:
        seconds: Time between two redraws. Lightning counts batches instead, which redraws too often for a small
            network, whose step takes no longer than a redraw, and too rarely for a large one.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        super().__init__()
        self._seconds = seconds
        self._drawn = -math.inf
        self._sums_seen = Readings()

    def _should_update(self, current: int, total: int) -> bool:
        """Whether to redraw a bar: it is time, or the bar is full."""
        now = time.monotonic()
        if not self.is_enabled or (now < self._drawn + self._seconds and current != total):
            return False
        self._drawn = now
        return True

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start a new bar."""
        super().on_train_epoch_start(trainer, *_)
        self._sums_seen.take()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float]:  # type: ignore[override]
        """Return what the bar shows at its end."""
        assert isinstance(pl_module, Classification)
        if not trainer.training or trainer.world_size > 1:
            return {}
        seen = self._sums_seen.look(pl_module.train_sums)
        if trainer.global_step % int(trainer.num_training_batches) == 0:  # the epoch's last
            seen = self._sums_seen.take() or seen
        metrics = {} if seen is None else means(seen[1], "train")
        return {key.partition("/")[0]: f"{value:.3f}" for key, value in metrics.items()}

    def after_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, out: StepResult, step: int) -> bool:
        """Redraw within a turn, which may take long."""
        place = (step - 1) % int(trainer.num_training_batches) + 1
        super().on_train_batch_end(trainer, module, None, batch, place - 1)
        return False

    def on_train_batch_end(self, *_: Any) -> None:
        """Do nothing: `after_batch` has seen each batch of the turn."""
