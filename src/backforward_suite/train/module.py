"""Training with Lightning: manual optimization, any update rule, one `global_step` per batch."""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)
from backforward.flops import FlopCounter

# isort: split
import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from backforward.rules import Rule, StepResult
from backforward_suite.data import DataSplits, EpochLoader, Images
from backforward_suite.train.capture import Captured, say_ordinary, set_capturable
from backforward_suite.train.readings import Readings

Metrics = dict[str, float]
Batch = tuple[Tensor, Tensor]
Arithmetic = list[dict[str, float | None]]

EVALUATION_BATCH = 500  # samples; affects the result by rounding only


class EachBatch(L.Callback):
    """A callback that sees every batch; Lightning calls its own batch hooks once per turn (see `training_step`)."""

    def before_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, step: int) -> None:
        """Called before the training on a batch, after `step` others over all epochs."""

    def after_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, out: StepResult, step: int) -> bool:
        """Called after the training on the `step`-th batch over all epochs; return whether to end the turn with it."""
        return False


class Classification(L.LightningModule):
    """A network, an optimizer and an update rule, for Lightning.

    Metrics are sums over samples, in tensors that are read once per epoch: reading a number from a tensor, as
    `self.log` does, costs more than a small network's step. Training metrics are those of each batch before its update.

    Args:
        network: Maps float images [N, C, H, W] in [0, 1] to logits [N, classes].
        make_optimizer: `network -> optimizer`.
        make_rule: `(network, optimizer, loss_fn, reduce=, step=, after_update=) -> rule`.
        make_schedule: `optimizer -> scheduler`, or None for a constant learning rate.
        schedule_interval: `"epoch"` or `"step"` (one batch): how often the schedule advances.
        after_update: Called with the updated parameters after each optimizer step.
        check_every: Batches between two checks that the loss is finite.
        capture: Whether to record the rule's step as a CUDA graph (see `capture`): `auto`, where one process trains on
            a CUDA device and the step can be recorded, else one line says why not; `on`, or `BadInput` is raised;
            `off`.
        seed: Seed of random draws in training, such as dropout; each device draws its own.

    Attributes:
        diverged: Whether a loss was not finite, which ends the training.
    """

    def __init__(
        self,
        network: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        make_rule: Callable[..., Rule],
        make_schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        schedule_interval: str = "epoch",
        after_update: Callable[..., None] | None = None,
        check_every: int = 50,
        seed: int = 0,
        capture: Literal["auto", "on", "off"] = "off",
    ) -> None:
        super().__init__()
        self.capture = capture
        self.automatic_optimization = False
        self.network = network
        self.make_optimizer = make_optimizer
        self.make_rule = make_rule
        self.make_schedule = make_schedule
        self.schedule_interval = schedule_interval
        self.after_update = after_update
        self.check_every = check_every
        self.seed = seed
        self.diverged = False
        self.rule: Rule | None = None
        self._sums_seen = Readings()
        self._of_ranks: list[dict[str, Any]] | None = None
        # (sum of losses, correct, samples). Those of training are part of a checkpoint taken within an epoch.
        self.register_buffer("train_sums", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("joint_sums", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("eval_sums", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.evaluated: Metrics = {}
        self._each_batch: list[EachBatch] = []

    train_sums: Tensor
    joint_sums: Tensor
    eval_sums: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] to logits [N, classes]."""
        return self.network(x)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        """Return the network's optimizer, and its schedule if there is one."""
        optimizer = self.make_optimizer(self.network)
        return optimizer if self.make_schedule is None else ([optimizer], [self.make_schedule(optimizer)])

    def rehearse(self, x: Tensor, y: Tensor) -> Arithmetic:
        """Take one step on a copy: errors appear before anything starts, and the arithmetic is counted.

        Args:
            x: A few images, float [N, C, H, W] in [0, 1].
            y: Their labels, int64 [N].

        Returns:
            The cost of a batch of N images (`samples`): `forward` and `update` in multiply-accumulates (of matrix
            products and convolutions, as executed), and `updates`, how often it changes each weight (a mean over
            weights). One entry, from epoch 0; a rule that switches has a second one, from epoch `from_epoch`.

        Raises:
            ValueError, TypeError, ArithmeticError: Optimizer, schedule or rule refuse their arguments.
        """
        network = copy.deepcopy(self.network)
        optimizer = self.make_optimizer(network)
        moved: list[int] = []

        def step(_last: bool) -> None:
            moved.append(_size(network, moving=True))
            optimizer.step()

        rule = self.make_rule(network, optimizer, F.cross_entropy, step=step)
        rule.prepare(x)
        with torch.no_grad(), FlopCounter() as forward:
            network(x)
        found = []
        for epoch in sorted({0, getattr(rule, "at_epoch", 0)}):
            rule.set_epoch(epoch)
            moved.clear()
            with FlopCounter() as update:
                rule.step(x, y)
            found.append(
                {
                    "from_epoch": epoch,
                    "samples": len(y),
                    "forward": forward.get_total_flops() // 2,
                    "update": update.get_total_flops() // 2,
                    "updates": sum(moved) / _size(network) or None,  # the shortcut engine leaves no gradients to count
                }
            )
        if self.make_schedule is not None:
            with warnings.catch_warnings(action="ignore"):  # "call optimizer.step() first"
                self.make_schedule(optimizer).step()
        return found

    # --- training ----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Build the update rule, now that weights and optimizer are on their device."""
        optimizer, counted = self.optimizers(use_pl_optimizer=False), self.optimizers()
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert isinstance(counted, LightningOptimizer)
        self._counted = counted
        strategy = self.trainer.strategy
        self.rule = self.make_rule(
            self.network,
            optimizer,
            F.cross_entropy,
            # Gradients come from torch.autograd.grad, which bypasses DistributedDataParallel's hooks.
            reduce=(lambda flat: strategy.reduce(flat, reduce_op="mean")) if self.trainer.world_size > 1 else None,
            after_update=self.after_update,
        )
        if self.capture != "off":
            if self.device.type == "cuda" and self.trainer.world_size == 1:
                self.rule = Captured(self.rule, optimizer, must=self.capture == "on")
            elif self.global_rank == 0:
                say_ordinary("this run is on a CPU" if self.device.type == "cpu" else "this run is on several devices")
        if self.device.type == "cpu":  # its checkpoint may come from a GPU
            set_capturable(optimizer, optimizer.param_groups, False)
        self.rule.set_epoch(self.current_epoch, self.global_step)
        self._each_batch = [callback for callback in self.trainer.callbacks if isinstance(callback, EachBatch)]  # type: ignore[attr-defined]
        if self._of_ranks is None:
            torch.manual_seed(rank_seed(self.seed, self.global_rank))
        else:
            self._go_on_from(self._of_ranks[self.global_rank])
        if self.diverged:  # interrupted between the checkpoint of a diverged epoch and its result
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """Tell the rule which epoch starts (Lightning tells the loader)."""
        self.train_sums.zero_()
        self.joint_sums.zero_()
        self._sums_seen.take()
        assert self.rule is not None
        self.rule.set_epoch(self.current_epoch, self.global_step)

    def training_step(self, dataloader_iter: Iterator[tuple[Batch, int, int]]) -> None:
        """Train on the mini-batches of one turn.

        Lightning's work around this call costs a seventh of a small network's step. So a turn has many batches: it ends
        after every `check_every` batches of the epoch, or as soon as a callback asks for it, to save a checkpoint say.
        Steps and progress still count batches.
        """
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        step, place = self.global_step, progress.current.ready  # this includes the first batch of the turn
        for place, (batch, _, _) in enumerate(dataloader_iter, start=place):  # noqa: B020
            batch = self.trainer.precision_plugin.convert_input(batch)  # noqa: PLW2901
            turn_over = self._train_on(batch, step)
            step += 1
            if place % self.check_every == 0:
                if (seen := self._sums_seen.look(self._reduced(self.train_sums))) is not None:
                    self._check_finite(seen[1])
                break
            if turn_over or self.trainer.world_size > 1:  # turns of several processes must have the same length
                break
        progress.increment_by(place - progress.current.ready)

    def _train_on(self, batch: Batch, step: int) -> bool:
        """Take one step of the rule; return whether a callback asks to end the turn."""
        for callback in self._each_batch:
            callback.before_batch(self.trainer, self, batch, step)
        x, y = batch
        assert self.rule is not None
        # Count one global step as `LightningOptimizer.step` does, however many steps the rule takes. Calling it would
        # add a detour through strategy and precision plugin, with no effect, at a tenth of a small network's step.
        self._counted._on_before_step()
        out = self.rule.step(x, y)
        self._counted._on_after_step()
        # With micro-batches the output is a list.
        _add(self.train_sums, out.loss, torch.cat(out.output) if isinstance(out.output, list) else out.output, y)
        if out.joint_loss is not None:
            self.joint_sums[0] += out.joint_loss * len(y)
            self.joint_sums[2] += len(y)
        if self.make_schedule is not None and self.schedule_interval == "step":
            self.lr_schedulers().step()  # type: ignore[union-attr]
        turn_over = False
        for callback in self._each_batch:
            turn_over |= callback.after_batch(self.trainer, self, batch, out, step + 1)
        return turn_over

    def on_train_epoch_end(self) -> None:
        """Advance the schedule, after the record has logged the epoch's learning rate."""
        self._check_finite(self._reduced(self.train_sums).tolist())
        if self.make_schedule is not None and self.schedule_interval == "epoch":
            self.lr_schedulers().step()  # type: ignore[union-attr]

    def _check_finite(self, sums: Sequence[float]) -> None:
        loss, *_ = sums
        if not self.diverged and not math.isfinite(loss):
            self.diverged = True
            self.trainer.should_stop = True

    def train_metrics(self) -> Metrics:
        """Return the mean loss (nats) and accuracy over this epoch's samples so far, each before its batch's update.

        With a joint pass also `loss/train_joint`: the loss in that pass, after the single updates of its batch.
        """
        joint = self._means(self.joint_sums, "train_joint")
        return self._means(self.train_sums, "train") | {key: joint[key] for key in joint if key.startswith("loss")}

    # --- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self.eval_sums.zero_()
        if self.trainer.world_size > 1 and not self.trainer.sanity_checking:
            self._average_running_statistics()

    def _average_running_statistics(self) -> None:
        """Give all ranks the same network to evaluate.

        In training, each rank computes a batch's statistics on its share. Running statistics are linear in them, so
        averaging them here equals averaging the statistics of every batch.
        """
        for name, buffer in self.network.named_buffers():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))

    def validation_step(self, batch: Batch, _: int) -> None:
        """Add a batch of the validation set."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Read the sums."""
        self.evaluated = self._means(self.eval_sums, "validation")

    def on_test_epoch_start(self) -> None:
        """Reset the sums."""
        self.eval_sums.zero_()

    def test_step(self, batch: Batch, _: int) -> None:
        """Add a batch of the test set."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Read the sums."""
        self.evaluated = self._means(self.eval_sums, "test")

    def _evaluate(self, batch: Batch) -> None:
        x, y = batch
        logits = self.network(x)
        _add(self.eval_sums, F.cross_entropy(logits, y), logits, y)

    def _means(self, sums: Tensor, split: str) -> Metrics:
        return means(self._reduced(sums).tolist(), split)

    def _reduced(self, sums: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return sums
        # A copy: the strategy may reduce in place. Sums, not means: the ranks' shares may differ in size.
        return self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add each rank's own state: random generators, sums, running statistics."""
        own: dict[str, Any] = {"rng": {"cpu": torch.get_rng_state()}}
        if self.device.type == "cuda":
            own["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["diverged"] = self.diverged
        checkpoint["sums_seen"] = self._sums_seen.pending
        checkpoint["ranks"] = [own]
        if self.trainer.world_size > 1:
            own["buffers"] = {name: buffer.cpu() for name, buffer in self.named_buffers()}
            checkpoint["ranks"] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(checkpoint["ranks"], own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the ranks' states until training starts: until then Lightning gives every rank the first one's."""
        self.diverged, self._of_ranks = checkpoint["diverged"], checkpoint["ranks"]
        self._sums_seen.restore(checkpoint.get("sums_seen"))

    def _go_on_from(self, own: dict[str, Any]) -> None:
        torch.set_rng_state(own["rng"]["cpu"].cpu())
        if "cuda" in own["rng"]:
            torch.cuda.set_rng_state(own["rng"]["cuda"].cpu())
        buffers = dict(self.named_buffers())
        for name, value in own.get("buffers", {}).items():
            buffers[name].copy_(value)


class InMemoryData(L.LightningDataModule):
    """The splits of a data set in batches on the training device.

    Args:
        data: Images and labels, uint8.
        batch_size: Samples per training batch, over all devices.
        seed: With the epoch, determines the order of samples and the flips.
        augment: `"none"` or `"flip"`.
        shuffle: Whether to draw a new order of training samples each epoch; else it is that of the data set.
        limit: Training batches per epoch; None: all.
    """

    def __init__(
        self,
        data: DataSplits,
        batch_size: int,
        seed: int,
        augment: str = "none",
        shuffle: bool = True,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self.data, self.batch_size = data, batch_size
        self._how: dict[str, Any] = {"seed": seed, "augment": augment, "shuffle": shuffle, "limit": limit}
        # Refuses a batch larger than the training set before anything starts.
        self.steps_per_epoch = len(EpochLoader(data.train, batch_size, **self._how))

    def train_dataloader(self) -> EpochLoader:
        """Return the training batches, without the last short one."""
        return EpochLoader(self.data.train, self.batch_size, **self._how, **self._place())

    def train_loader(self) -> EpochLoader:
        """Return the same for one process on the host, without a trainer."""
        return EpochLoader(self.data.train, self.batch_size, **self._how)

    def val_dataloader(self) -> EpochLoader:
        """Return the whole validation set, in order."""
        return self._evaluation(self.data.validation)

    def test_dataloader(self) -> EpochLoader:
        """Return the whole test set, in order."""
        return self._evaluation(self.data.test)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch: it is on the device already."""
        return batch

    def _evaluation(self, images: Images) -> EpochLoader:
        return EpochLoader(images, EVALUATION_BATCH, shuffle=False, drop_last=False, **self._place())

    def _place(self) -> dict[str, Any]:
        assert self.trainer is not None
        strategy = self.trainer.strategy
        return {"device": strategy.root_device, "rank": self.trainer.global_rank, "world_size": self.trainer.world_size}


def _size(network: nn.Module, moving: bool = False) -> int:
    """Count the parameters' entries; with `moving`, of those that have a gradient now."""
    return sum(p.numel() for p in network.parameters() if not moving or p.grad is not None)


def rank_seed(seed: int, rank: int) -> int:
    """Return the seed of a rank's random draws in training: the run's own for rank 0, else derived from both."""
    return seed if rank == 0 else int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])


def means(sums: Sequence[float], split: str) -> Metrics:
    """Return mean loss and accuracy from (sum of losses, correct, samples); nothing without samples."""
    loss, correct, count = sums
    return {f"loss/{split}": loss / count, f"accuracy/{split}": correct / count} if count else {}


def weight_norms(network: nn.Module) -> Metrics:
    """Return L2 norms of the parameters.

    Returns:
        `weight_norm/total`: of all parameters as one vector. `weight_norm/sum`: the sum of the tensors' norms, as in
        the published Backforward runs. `weight_norm/<layer>`: of the parameters that a module has itself.
    """
    layers = {name: list(module.parameters(recurse=False)) for name, module in network.named_modules()}
    tensors = [parameter.detach() for own in layers.values() for parameter in own]
    values = torch.stack(torch._foreach_norm(tensors)).double().tolist()  # one read from the device
    rest = iter(values)
    per_layer = {name: [next(rest) for _ in own] for name, own in layers.items() if own}
    result = {"weight_norm/total": math.hypot(*values), "weight_norm/sum": sum(values)}
    return result | {f"weight_norm/{name}": math.hypot(*norms) for name, norms in per_layer.items()}


def _add(sums: Tensor, loss: Tensor, logits: Tensor, y: Tensor) -> None:
    """Add a batch to (sum of losses, correct, samples)."""
    losses, correct, samples = sums.unbind()
    losses.add_(loss.detach(), alpha=len(y))
    correct.add_((logits.argmax(dim=1) == y).sum())
    samples.add_(len(y))


def quiet_lightning() -> None:
    """Silence Lightning's general remarks: on GPUs, tips, that training has stopped."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")  # Lightning's own call of torch
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    warnings.filterwarnings("ignore", message="GPU available but not used")
    # It says that this is experimental; `Classification.training_step` keeps Lightning's progress right.
    warnings.filterwarnings("ignore", message=".*`dataloader_iter`")
    # The oldest supported torch does not have its successor.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
