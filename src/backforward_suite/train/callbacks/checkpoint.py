"""Checkpoints that appear whole or not at all, and load without running anything that lies in them."""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from backforward.rules import StepResult
from backforward_suite.atomic import whole
from backforward_suite.config import differing, fingerprint
from backforward_suite.errors import BadInput, Stopped
from backforward_suite.train.module import Batch, Classification


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


class Checkpoints(Checkpoint):
    """Keeps `last.ckpt`: after each epoch, within one every few minutes, and when the process is told to end.

    After the epoch of best validation accuracy so far, `best.ckpt` is a copy of it.

    On SIGTERM (Slurm before it takes a machine away, a sweep that is interrupted) training ends after the batch at
    hand, with a checkpoint. Outside training it ends at once: nothing is lost.

    Args:
        folder: The run's folder.
        settings: What the run was asked for; a checkpoint of other settings is refused.
        minutes: Time between two checkpoints within an epoch.
        agree_every: With several processes, batches between two looks at whether one of them wants a checkpoint: they
            save together or not at all, and asking costs a round of messages.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], minutes: float, agree_every: int = 50) -> None:
        self.path = folder / "last.ckpt"
        self.settings = settings
        self.seconds = 60 * minutes
        self.agree_every = agree_every
        self._due = time.monotonic() + self.seconds
        self._best = -1.0
        self._training = False
        self._told_to_end = False

    def state_dict(self) -> dict[str, Any]:
        """The best validation accuracy so far."""
        return {"best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._best = state["best"]

    # Lightning sets a handler of its own before these hooks; it skips the checkpoint and leaves with exit code 0.

    def on_sanity_check_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Install the handler for SIGTERM."""
        self._listen()

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Install the handler for SIGTERM."""
        self._listen()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Hear SIGTERM, and answer it after a batch."""
        self._training = True
        self._listen()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The last epoch's checkpoint stands."""
        self._training = False

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: Any) -> None:
        if not self._training:
            raise Stopped
        self._told_to_end = True

    def before_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, step: int) -> None:
        """Nothing to do."""

    def after_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, out: StepResult, step: int) -> bool:
        """End the turn when it is time to save."""
        return self._told_to_end or time.monotonic() >= self._due

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save when the time has come."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch or (trainer.world_size > 1 and progress.current.ready % self.agree_every):
            return  # the end of the epoch saves
        due, stop = self._agreed(trainer, time.monotonic() >= self._due, self._told_to_end)
        if due or stop:
            self._save(trainer)
        if stop:
            raise Stopped

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save with the epoch's metrics in the record."""
        assert isinstance(module, Classification)
        accuracy = module.evaluated.get("accuracy/validation", -1.0)
        better, self._best = accuracy > self._best, max(accuracy, self._best)
        if better:  # first: cut off in between, the run does this epoch again and finds it the best again
            best = self.path.with_name("best.ckpt")
            trainer.save_checkpoint(best)
            if trainer.is_global_zero:
                with whole(self.path, "wb") as copy, best.open("rb") as source:
                    shutil.copyfileobj(source, copy)
            self._due = time.monotonic() + self.seconds
        else:
            self._save(trainer)
        if self._agreed(trainer, self._told_to_end)[0]:
            raise Stopped

    @staticmethod
    def _agreed(trainer: L.Trainer, *wishes: bool) -> list[bool]:
        """What any of the processes wishes."""
        if trainer.world_size == 1:
            return list(wishes)
        votes = torch.tensor(wishes, dtype=torch.float32, device=trainer.strategy.root_device)
        return [count > 0 for count in trainer.strategy.reduce(votes, reduce_op="sum").tolist()]

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
