"""Checkpoints that appear whole or not at all, and load without running anything that lies in them."""

from __future__ import annotations

import backforward._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from backforward.errors import BadInput
from backforward.runs import whole
from backforward.settings import differing, fingerprint


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; Lightning's own may copy across file systems."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save tensors and plain values."""
        with whole(Path(path), "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load tensors and plain values, nothing else.

        Raises:
            BadInput: The file is damaged.
        """
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU with `weights_only=True`.

    Raises:
        BadInput: The file is damaged, or holds something else than a checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(checkpoint, dict) and "state_dict" in checkpoint:
            return checkpoint
        raise ValueError("no weights in it")
    except OSError:
        raise
    except Exception as error:  # torch.load raises errors of many kinds on bytes that it did not write
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"{path} is damaged ({reason}); delete it to have this run start anew") from None


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: after each epoch, and within one every few minutes.

    Args:
        folder: The run's folder.
        settings: What the run was asked for; a checkpoint of other settings is refused.
        minutes: Time between two checkpoints within an epoch.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], minutes: float) -> None:
        self.path = folder / "last.ckpt"
        self.settings = settings
        self.seconds = 60 * minutes
        self._due = time.monotonic() + self.seconds

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save when the time has come."""
        due = time.monotonic() >= self._due
        if trainer.world_size > 1:
            due = trainer.strategy.broadcast(due)  # all ranks save together, or none
        if due and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save with the epoch's metrics in the record."""
        self._save(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the settings into the checkpoint."""
        checkpoint["settings"] = self.settings

    def step_to_resume(self) -> int:
        """Look at an existing checkpoint before a run goes on from it.

        Returns:
            Its global step.

        Raises:
            BadInput: It is damaged, or of other settings than those asked for.
        """
        checkpoint = read_checkpoint(self.path)
        found = checkpoint.get("settings", {})
        if fingerprint(found) != fingerprint(self.settings):
            keys = differing(self.settings, found)
            raise BadInput(f"{self.path} is of other settings: {keys}; give another name=... to keep both")
        return int(checkpoint["global_step"])

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._due = time.monotonic() + self.seconds
