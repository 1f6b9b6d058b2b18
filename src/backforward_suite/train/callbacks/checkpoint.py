"""Checkpoints: files that are whole or absent, load without executing code, and fit the run that resumes from them."""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split
import hashlib
import io
import os
import shutil
import signal
import stat
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from backforward.batch import tensors_in
from backforward.rules import StepResult
from backforward_suite.atomic import whole
from backforward_suite.config import Request, differing, fingerprint
from backforward_suite.errors import BadInput, Refused, Stopped, cause_of
from backforward_suite.processes import rank
from backforward_suite.runs.identity import changed_sources
from backforward_suite.train.module import Batch, Classification, EachBatch


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder and renames it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save tensors and plain values, with a checksum over all of them."""
        # Into memory first: when torch writes to a file itself, it hides the disk's error behind its own.
        content = io.BytesIO()
        torch.save({**checkpoint, "checksum": checksum(checkpoint)}, content)
        with whole(Path(path), "wb") as file:
            file.write(content.getbuffer())

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load tensors and plain values, nothing else.

        Raises:
            BadInput: The file is damaged.
        """
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU with `weights_only=True`, after comparing its checksums and checking its parts.

    Raises:
        BadInput: The file is damaged, or is no checkpoint of a run.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would never end
            raise ValueError("no regular file")
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            if (member := archive.testzip()) is not None:
                raise ValueError(f"bad checksum of {member}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        _check(checkpoint)
    except OSError as error:
        if error.errno is not None:  # from the disk, not from torch
            raise
        raise _damaged(path, error) from None
    except Exception as error:  # zipfile and torch raise many kinds of errors on damaged bytes
        raise _damaged(path, error) from None
    return checkpoint  # type: ignore[no-any-return]


def _damaged(path: Path, error: Exception) -> BadInput:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return BadInput(f"{path} is damaged ({reason}); delete it to start this run again")


_PARTS: dict[str, type] = {  # of a checkpoint, with their types
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "global_step": int,
    "epoch": int,
    "settings": dict,
    "ranks": list,
    "diverged": bool,
}


def _check(checkpoint: object) -> None:
    """Raise ValueError unless a checkpoint has all parts, as saved. Removes its checksum."""
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError("no weights in it")
    saved = checkpoint.pop("checksum", None)  # None: from an older version
    if saved is not None and saved != checksum(checkpoint):
        raise ValueError("its content does not match its checksum")
    for key, kind in _PARTS.items():
        if not isinstance(checkpoint.get(key), kind):
            raise ValueError(f"no {key} in it")  # noqa: TRY004
    if not all(isinstance(value, torch.Tensor) for value in checkpoint["state_dict"].values()):
        raise ValueError("weights that are no tensors")
    if "epoch_progress" not in checkpoint["loops"].get("fit_loop", {}):
        raise ValueError("no progress of its loops in it")
    if not checkpoint["optimizer_states"]:
        raise ValueError("no state of the optimizer in it")
    if saved is None and not checkpoint["diverged"] and not _is_finite(checkpoint):
        raise ValueError("weights that are not finite")


def checksum(values: object) -> str:
    """Return the SHA-256 of nested tensors and plain values."""
    digest = hashlib.sha256()
    for part in _bytes_of(values):
        digest.update(part)
    return digest.hexdigest()


def _bytes_of(values: object) -> Iterator[bytes | memoryview]:
    if isinstance(values, torch.Tensor):
        yield f"{values.dtype}{tuple(values.shape)}".encode()
        yield values.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(values, Mapping):
        yield b"{"
        for pair in values.items():
            yield from _bytes_of(pair)
        yield b"}"
    elif isinstance(values, list | tuple):
        yield b"["
        for value in values:
            yield from _bytes_of(value)
        yield b"]"
    else:
        yield repr(values).encode() + b","


def _is_finite(checkpoint: Mapping[str, Any]) -> bool:
    """Whether all weights, buffers and optimizer states are."""
    states = tensors_in([checkpoint["state_dict"], checkpoint["optimizer_states"]])
    return all(bool(tensor.isfinite().all()) for tensor in states if tensor.is_floating_point())


class Checkpoints(EachBatch, Checkpoint):
    """Saves `last.ckpt` after each epoch, every few minutes within an epoch, and when the process is told to end.

    After an epoch of the best validation accuracy so far, `best.ckpt` is a copy of it.

    On SIGTERM (from Slurm, or from an interrupted sweep) and on Ctrl-C, saves a checkpoint after the current batch and
    ends the training; a second Ctrl-C ends it at once. Outside training both end the process at once: nothing is lost.

    Args:
        folder: The run's folder.
        request: The run's settings; a checkpoint of other settings is refused.
        stands_on: What else decides the result, as SHA-256: `data`, and by module the user's `own` source. Likewise.
    """

    def __init__(self, folder: Path, request: Request, stands_on: dict[str, Any]) -> None:
        self.path = folder / "last.ckpt"
        self.request = request
        self.stands_on = stands_on
        self.seconds = 60 * request.settings.trainer.checkpoint_minutes
        # With several processes, batches between two agreements on whether to save: each costs a round of messages.
        self.agree_every = request.settings.trainer.log_every_n_steps
        self._due = time.monotonic() + self.seconds
        self._best = -1.0
        self._restored = False
        self._training = False
        self._told_to_end: type[BaseException] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the best validation accuracy so far."""
        return {"best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._best = state["best"]

    # Before these hooks Lightning installs its own handler, which saves nothing and exits with code 0.

    def on_sanity_check_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Handle SIGTERM and Ctrl-C."""
        self._listen()

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Handle SIGTERM and Ctrl-C."""
        self._listen()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Handle SIGTERM and Ctrl-C after the current batch from now on."""
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                shapes = {value.shape for value in state.values() if isinstance(value, torch.Tensor) and value.dim()}
                if shapes - {parameter.shape}:
                    raise self._does_not_fit("the optimizer's state has other shapes than the weights")
        self._training = self._restored = True
        self._listen()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Handle them at once again."""
        self._training = False

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored in the background
                signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        end = KeyboardInterrupt if number == signal.SIGINT else Stopped
        if not self._training or self._told_to_end is end is KeyboardInterrupt:
            raise end
        self._told_to_end = end

    def after_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, out: StepResult, step: int) -> bool:
        """End the turn when it is time to save."""
        return self._told_to_end is not None or time.monotonic() >= self._due

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save if it is time."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch or (trainer.world_size > 1 and progress.current.ready % self.agree_every):
            return  # the end of the epoch saves
        due, stop = self._any_rank(trainer, time.monotonic() >= self._due, self._told_to_end is not None)
        if due or stop:
            self._save(trainer)
        if stop:
            raise self._told_to_end or Stopped  # another process of this run was told to end

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save, with the epoch's metrics in the record."""
        assert isinstance(module, Classification)
        accuracy = module.evaluated.get("accuracy/validation", -1.0)
        better, self._best = accuracy > self._best, max(accuracy, self._best)
        if better:  # best.ckpt first: if killed in between, the run repeats this epoch and finds it the best again
            best = self.path.with_name("best.ckpt")
            trainer.save_checkpoint(best)
            if trainer.is_global_zero:
                with whole(self.path, "wb") as copy, best.open("rb") as source:
                    shutil.copyfileobj(source, copy)
            self._due = time.monotonic() + self.seconds
        else:
            self._save(trainer)
        if self._any_rank(trainer, self._told_to_end is not None)[0]:
            raise self._told_to_end or Stopped

    @staticmethod
    def _any_rank(trainer: L.Trainer, *wishes: bool) -> list[bool]:
        """Return which wishes at least one process has: all processes save, or none does."""
        if trainer.world_size == 1:
            return list(wishes)
        votes = torch.tensor(wishes, dtype=torch.float32, device=trainer.strategy.root_device)
        return [count > 0 for count in trainer.strategy.reduce(votes, reduce_op="sum").tolist()]

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the settings, and what else decides the result."""
        checkpoint["settings"] = self.request.values
        checkpoint["stands_on"] = self.stands_on

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._due = time.monotonic() + self.seconds

    # --- resuming ----------------------------------------------------------------------------------------------------

    def step_to_resume(self, module: Classification) -> int | None:
        """Check an existing checkpoint before the run resumes from it; first copy that of a shorter run if asked.

        Args:
            module: The training, as at its start.

        Returns:
            The checkpoint's global step; None without a checkpoint.

        Raises:
            BadInput: It is damaged, of other settings, data or source, or does not fit the network.
        """
        if self.request.settings.go_on_from is not None and not self.path.exists():
            self._begin_from(Path(self.request.settings.go_on_from))
        if not self.path.exists():
            return None
        checkpoint = read_checkpoint(self.path)
        found = checkpoint["settings"]
        if fingerprint(found) != self.request.hash:
            keys = differing(self.request.values, found)
            raise Refused(f"{self.path} is of other settings: {keys}; give another name=... to keep both")
        there = checkpoint.get("stands_on", {})  # missing in an older version's
        other = "its data have changed" if there.get("data", self.stands_on["data"]) != self.stands_on["data"] else ""
        if other := other or changed_sources(self.request, there.get("own")):
            raise Refused(
                f"{self.path} cannot be resumed: {other} since it was written; "
                "give another name=... to keep it, or delete it to start this run again"
            )
        if misfit := _misfit(checkpoint["state_dict"], module.state_dict()):
            raise self._does_not_fit(misfit)
        for own in checkpoint["ranks"]:
            random = own.get("rng", {}).get("cpu") if isinstance(own, dict) else None
            if not isinstance(random, torch.Tensor) or random.dtype != torch.uint8:
                raise self._does_not_fit("no state of the random generator in it")
        if not {"RunRecord", "Checkpoints"} <= checkpoint["callbacks"].keys():
            raise self._does_not_fit("no record of the run in it")
        if checkpoint["callbacks"]["Checkpoints"]["best"] >= 0:
            self._check_best()
        step = int(checkpoint["global_step"])
        if rank(self.request.settings.trainer.devices) == 0:
            print(f"goes on from step {step}, where its last checkpoint was written", flush=True)
        return step

    def _begin_from(self, run: Path) -> None:
        """Copy the checkpoints of a shorter run, which stays as it is.

        Raises:
            BadInput: It has no checkpoint, it diverged, or its settings differ in more than `max_epochs`.
        """
        source, epochs = run / "last.ckpt", self.request.settings.max_epochs
        if not source.is_file():
            raise BadInput(f"go_on_from={run}: no last.ckpt there; give the folder of a run that has trained")
        checkpoint = read_checkpoint(source)
        found = checkpoint["settings"]
        if keys := differing({**self.request.values, "max_epochs": found.get("max_epochs")}, found):
            raise BadInput(f"go_on_from={run} has other settings than max_epochs: {keys}; give the same ones")
        if found["max_epochs"] >= epochs:
            raise BadInput(f"go_on_from={run} has max_epochs={found['max_epochs']}; give a larger max_epochs")
        if checkpoint["diverged"]:
            raise BadInput(f"go_on_from={run} diverged; there is nothing to go on from")
        for name in ("best.ckpt", "last.ckpt"):  # last.ckpt at the end: with it, this run is half-done
            if (run / name).is_file():
                kept = {**read_checkpoint(run / name), "settings": self.request.values}
                WholeFileIO().save_checkpoint(kept, self.path.with_name(name))

    def _check_best(self) -> None:
        """Raise BadInput unless the best epoch's weights are there: training will not produce them again."""
        best = self.path.with_name("best.ckpt")
        try:
            of_this_run = fingerprint(read_checkpoint(best)["settings"]) == self.request.hash
        except (OSError, BadInput):
            of_this_run = False
        if not of_this_run:
            raise BadInput(f"{best} is missing, damaged or of another run; delete {self.path} to start this run again")

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Turn an error that Lightning raises while it restores a checkpoint into one line."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if self._restored or isinstance(error, BadInput | torch.OutOfMemoryError):
                raise
            raise self._does_not_fit(cause_of(error)) from None

    def _does_not_fit(self, reason: str) -> BadInput:
        return BadInput(f"{self.path} does not fit this run ({reason}); delete it to start this run again")


def _misfit(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """Describe the first tensor in which two states differ by name, shape or type; empty if there is none."""
    for key in [*expected, *found]:
        if key not in found or key not in expected:
            return f"{key} is {'missing' if key not in found else 'unknown'}"
        (one, other) = ((list(t.shape), str(t.dtype).removeprefix("torch.")) for t in (found[key], expected[key]))
        if one != other:
            return f"{key} is {one[1]} {one[0]}, not {other[1]} {other[0]}"
    return ""
