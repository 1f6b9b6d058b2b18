"""Trains many runs that differ in nothing but seed and learning rate as one stack of networks (see `stacking`).

Each has its own initial weights, order of samples, curves, record and result, as if it had been trained alone; what
rounds differently is the order in which a product sums. Without Lightning: a step is a few launches, however many runs.
"""

from __future__ import annotations

import backforward._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from backforward.callbacks.checkpoint import WholeFileIO, read_checkpoint
from backforward.callbacks.record import RunRecord
from backforward.capture import Captured, say_ordinary
from backforward.data import Images
from backforward.data.stacked import StackedBatches
from backforward.errors import Stopped
from backforward.fitting import close_logger, opened_logger
from backforward.hardware import process_age
from backforward.precision import set_matmul_precision
from backforward.readings import Reading, Readings
from backforward.results import assembled
from backforward.rules import Rule
from backforward.runs import Result
from backforward.settings import Settings, fingerprint
from backforward.stacking import (
    StackedRule,
    StackedSGD,
    StackLoss,
    keep_,
    projection,
    stack,
    stack_losses,
    unstack_,
)
from backforward.studying import place as place_of
from backforward.training import (
    EVALUATION_BATCH,
    Arithmetic,
    Classification,
    InMemoryData,
    Metrics,
    means,
    weight_norms,
)

Write = Callable[[Result], object]


@dataclass(eq=False)
class Member:
    """One run of a stack.

    Attributes:
        settings: The checked settings.
        asked: The same as plain values.
        choices: By group, the name of the config it was read from.
        module: Its network, optimizer, schedule and update rule, as for a training alone.
        loaders: Its data.
        arithmetic: What a batch costs.
        folder: Where its curves go; None writes nothing.
        write: Called with its result, once.
    """

    settings: Settings
    asked: dict[str, Any]
    choices: dict[str, str]
    module: Classification
    loaders: InMemoryData
    arithmetic: Arithmetic
    folder: Path | None
    write: Write
    record: RunRecord = field(init=False)
    logger: TensorBoardLogger | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.record = RunRecord(self.folder, self.settings.trainer.log_every_n_steps)

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return fingerprint(self.asked)


def fit_stack(members: Sequence[Member], checkpoint: Path | None = None) -> None:
    """Train runs together; hand each its result as soon as it has one.

    Args:
        members: The runs, alike in all but seed and learning rate.
        checkpoint: Where a stack that was cut off goes on, and where it leaves its checkpoints. Members that it does
            not know are left out.

    Raises:
        ValueError: Such networks or optimizers cannot be stacked.
        Stopped: SIGTERM came; there is a checkpoint.
        BadInput: The checkpoint is damaged.
    """
    saved = None
    if checkpoint is not None:
        for half_written in checkpoint.parent.glob(f".{checkpoint.name}.*.tmp"):  # by a stack that was killed
            half_written.unlink(missing_ok=True)
        saved = read_checkpoint(checkpoint) if checkpoint.exists() else None
    if saved is not None:
        members = [member for member in members if member.key in saved["members"]]
    if members:
        set_matmul_precision(members[0].settings.trainer.matmul_precision)
        with _sigterm() as told_to_end:
            _StackTraining(members, checkpoint, saved, told_to_end).run()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


def progress_of(checkpoint: Path) -> tuple[frozenset[str], int]:
    """The keys of the runs in a stack's checkpoint, and the steps that they have done.

    Raises:
        BadInput: The checkpoint is damaged.
    """
    saved = read_checkpoint(checkpoint)
    return frozenset(saved["members"]), int(saved["step"])


class _StackTraining:
    """The loop: epochs, batches, evaluations, checkpoints, of all members at once."""

    def __init__(
        self,
        members: Sequence[Member],
        checkpoint: Path | None,
        saved: dict[str, Any] | None,
        told_to_end: threading.Event,
    ) -> None:
        first = members[0]
        self.members = list(members)
        self.checkpoint = checkpoint
        self.told_to_end = told_to_end
        self.settings = first.settings
        self.began = time.perf_counter()
        where = place_of(self.settings)
        self.device, self.dtype = where["device"], where["dtype"]
        networks = [member.module.network.to(self.device, self.dtype) for member in members]
        self.network = stack(networks)
        optimizers = [member.module.make_optimizer(member.module.network) for member in members]
        names = {parameter: name for name, parameter in networks[0].named_parameters()}
        groups = [[names[parameter] for parameter in group["params"]] for group in optimizers[0].param_groups]
        self.optimizer = StackedSGD(self.network, groups, optimizers)
        make_schedule = first.module.make_schedule
        self.schedules: list[LRScheduler] = [make_schedule(each) for each in optimizers] if make_schedule else []
        loss = StackLoss()
        after_update = projection(self.network) if first.module.after_update is not None else None
        self.rule: Rule = StackedRule(
            first.module.make_rule(self.network, self.optimizer, loss, after_update=after_update), loss
        )
        if self.settings.capture != "off":
            if self.device.type == "cuda":
                self.rule = Captured(self.rule, self.optimizer, must=self.settings.capture == "on")
            else:
                say_ordinary("these runs are on a CPU")
        self.data = first.loaders.data
        self.batches = StackedBatches([member.loaders.train_loader() for member in members], self.device)
        self.evaluated_on = {
            name: images.to(self.device)
            for name, images in (("validation", self.data.validation), ("test", self.data.test))
        }
        self.epoch, self.place, self.step = 0, 0, 0  # batches of this epoch done, and of all
        # For each network (sum of losses, correct, samples), as in `Classification`.
        self.sums = torch.zeros(len(members), 3, dtype=torch.float64, device=self.device)
        self.joint = torch.zeros_like(self.sums)
        self._points, self._sums_seen = Readings(), Readings()
        if saved is not None:
            self._load(saved)
        for member in members:
            member.record.start_seconds = process_age()
            if member.folder is not None:
                resumed = None if saved is None else self.step
                member.logger = opened_logger(member.folder, member.asked, member.choices, resumed)
        self._set_due()

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end."""
        if not self.members[0].record.rows:
            self._record(self.members, epoch=0)
        while self.epoch < self.settings.max_epochs and self.members:
            self.rule.set_epoch(self.epoch, self.step)
            started = time.perf_counter()
            for x, y in self.batches.epoch(self.epoch, self.place):
                self._train_on(x.to(self.dtype), y)
                if self.place % self.settings.trainer.log_every_n_steps == 0 and self.place < len(self.batches):
                    self._drop_diverged()
                if self.told_to_end.is_set() or time.monotonic() >= self.due:
                    started = self._stop_clock(started)
                    self._save()
                if self.told_to_end.is_set():
                    raise Stopped
                if not self.members:
                    return
            self._stop_clock(started)
            self._end_epoch()
        for member, metrics in zip(self.members, self._evaluate("test"), strict=True):
            self._finish(member, "finished", metrics)

    def _train_on(self, x: Tensor, y: Tensor) -> None:
        out = self.rule.step(x, y)
        _add(self.sums, out.loss, out.output, y)
        if out.joint_loss is not None:
            self.joint[:, 0] += out.joint_loss * y.shape[1]
            self.joint[:, 2] += y.shape[1]
        if self.settings.schedule.interval == "step":
            self._move_schedules()
        self.place, self.step = self.place + 1, self.step + 1
        if self.step % self.settings.trainer.log_every_n_steps == 0:
            self._log(self._points.look(out.loss, self.step))

    def _log(self, point: Reading | None) -> None:
        """A point of the loss within the epoch, of each member."""
        if point is not None:
            step, losses = point
            for member, loss in zip(self.members, losses, strict=True):
                if member.logger is not None:
                    member.logger.log_metrics({"loss/batch": loss}, step=step)

    def _move_schedules(self) -> None:
        for optimizer, schedule in zip(self.optimizer.optimizers, self.schedules, strict=False):
            optimizer.step()  # without gradients: it only learns that it was used
            schedule.step()
        if self.schedules:
            self.optimizer.follow()

    def _end_epoch(self) -> None:
        self._log(self._points.take())
        self._sums_seen.take()
        self._record(self.members, epoch=self.epoch + 1)
        diverged = _not_finite(self.sums[:, 0].tolist())
        if self.settings.schedule.interval == "epoch":
            self._move_schedules()
        self.epoch, self.place = self.epoch + 1, 0
        self._leave_out(diverged)
        self.sums.zero_()
        self.joint.zero_()
        if self.members:
            self._save()
        if self.told_to_end.is_set():
            raise Stopped

    def _stop_clock(self, started: float) -> float:
        """Give each member its share of the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        for member in self.members:
            member.record.seconds += (now - started) / len(self.members)
            member.record.samples = self.step * self.settings.batch_size
        return now

    # --- those that diverge ------------------------------------------------------------------------------------------

    def _drop_diverged(self) -> None:
        """Within an epoch: a run alone would end here, with a last row."""
        seen = self._sums_seen.look(self.sums[:, 0])
        if seen is not None and (diverged := _not_finite(seen[1])):
            self._record([self.members[place] for place in diverged], epoch=self.epoch + 1)
            self._leave_out(diverged)

    def _leave_out(self, places: list[int]) -> None:
        """Finish diverged members; go on with the others."""
        if not places:
            return
        self._log(self._points.take())
        pending = self._sums_seen.take()
        for place in places:
            self._finish(self.members[place], "diverged", {})
        left = [place for place in range(len(self.members)) if place not in places]
        self.members = [self.members[place] for place in left]
        self.schedules = [self.schedules[place] for place in left] if self.schedules else []
        if left:
            kept = torch.tensor(left, device=self.device)
            keep_(self.network, kept)
            self.optimizer.keep_(kept)
            self.batches.keep_(left)
            self.sums, self.joint = self.sums[kept], self.joint[kept]
            if pending is not None:
                self._sums_seen.restore((pending[0], [pending[1][place] for place in left]))

    # --- records -----------------------------------------------------------------------------------------------------

    def _record(self, members: Sequence[Member], epoch: int) -> None:
        """A row of these members, measured now."""
        evaluated = self._evaluate("validation")
        sums, joint = self.sums.tolist(), self.joint.tolist()
        for place, member in enumerate(self.members):
            if member not in members:
                continue
            unstack_(member.module.network, place, self.network)
            after = means(joint[place], "train_joint")
            metrics = {
                **means(sums[place], "train"),
                **{key: after[key] for key in after if key.startswith("loss")},
                **evaluated[place],
                **weight_norms(member.module.network),
            }
            lr = float(self.optimizer.optimizers[place].param_groups[0]["lr"])
            member.record.add(metrics, epoch=epoch, step=self.step, lr=lr, logger=member.logger)

    @torch.no_grad()
    def _evaluate(self, split: str) -> list[Metrics]:
        """Loss and accuracy of each member on a split."""
        self.network.eval()
        images: Images = self.evaluated_on[split]
        count = len(self.members)
        sums = torch.zeros(count, 3, dtype=torch.float64, device=self.device)
        for start in range(0, len(images), EVALUATION_BATCH):
            batch = images.take(slice(start, start + EVALUATION_BATCH))
            x = batch.x.to(torch.float32).div_(255).to(self.dtype)
            y = batch.y.expand(count, -1)
            logits = self.network(x.expand(count, *x.shape))
            _add(sums, stack_losses(logits, y), logits, y)
        self.network.train()
        return [means(row, split) for row in sums.tolist()]

    def _finish(self, member: Member, status: str, tested: Metrics) -> None:
        final = {**member.record.rows[-1], **tested}
        if member.logger is not None:
            close_logger(member.logger, member.asked, member.choices, final, self.step)
        record = member.record
        member.write(
            assembled(
                {
                    "status": status,
                    "final": final,
                    "best": dict(record.best() or {}),
                    "arithmetic": member.arithmetic,
                    "parameters": sum(parameter.numel() for parameter in member.module.network.parameters()),
                },
                member.asked,
                member.choices,
                self.data,
                self.device,
                {
                    "seconds": time.perf_counter() - self.began,  # of this sitting, all members together
                    "start_seconds": record.start_seconds,
                    "training_seconds": record.seconds,  # its share
                    "samples_per_second": record.samples / record.seconds if record.seconds else None,
                    "stacked": len(self.members),
                },
            )
        )

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _set_due(self) -> None:
        self.due = time.monotonic() + 60 * self.settings.trainer.checkpoint_minutes

    def _save(self) -> None:
        self._set_due()
        if self.checkpoint is None:
            return
        self._log(self._points.take())  # a stack that goes on from here would not write it
        for member in self.members:
            if member.logger is not None:
                member.logger.save()
        state = {
            "state_dict": self.network.state_dict(),
            "momentum": [
                [self.optimizer.state[p].get("momentum_buffer") for p in group["params"]]
                for group in self.optimizer.param_groups
            ],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizer.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "members": [member.key for member in self.members],
            "records": [member.record.state_dict() for member in self.members],
            "epoch": self.epoch,
            "place": self.place,
            "step": self.step,
            "sums": self.sums,
            "joint": self.joint,
            "sums_seen": self._sums_seen.pending,
        }
        WholeFileIO().save_checkpoint(state, self.checkpoint)

    def _load(self, saved: dict[str, Any]) -> None:
        places = [saved["members"].index(member.key) for member in self.members]
        chosen = torch.tensor(places)
        own = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved["state_dict"][name][chosen])
        for group, buffers in zip(self.optimizer.param_groups, saved["momentum"], strict=True):
            for parameter, buffer in zip(group["params"], buffers, strict=True):
                if buffer is not None:
                    self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(
                        buffer[chosen]
                    )
        for here, place in enumerate(places):
            self.optimizer.optimizers[here].load_state_dict(saved["optimizers"][place])
            if self.schedules:
                self.schedules[here].load_state_dict(saved["schedules"][place])
            self.members[here].record.load_state_dict(saved["records"][place])
        self.optimizer.follow()
        self.epoch, self.place, self.step = saved["epoch"], saved["place"], saved["step"]
        self.sums, self.joint = (saved[key][chosen].to(self.device) for key in ("sums", "joint"))
        if (seen := saved.get("sums_seen")) is not None:
            self._sums_seen.restore((seen[0], [seen[1][place] for place in places]))


def _not_finite(losses: Sequence[float]) -> list[int]:
    """The places of those that have diverged."""
    return [place for place, loss in enumerate(losses) if not math.isfinite(loss)]


def _add(sums: Tensor, losses: Tensor, logits: Tensor, y: Tensor) -> None:
    """Add a batch to (sum of losses, correct, samples) of each network."""
    sums[:, 0] += losses.double() * y.shape[1]
    sums[:, 1] += (logits.argmax(dim=2) == y).sum(1)
    sums[:, 2] += y.shape[1]


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
