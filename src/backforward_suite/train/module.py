"""Training with Lightning: manual optimization, any update rule, one `global_step` a batch."""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)
from backforward.flops import FlopCounter

# isort: split
import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

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

EVALUATION_BATCH = 500  # samples; of no effect on the result but for rounding


@runtime_checkable
class EachBatch(Protocol):
    """A callback that looks at every batch; Lightning's hooks of a batch run once a turn (see `training_step`)."""

    def before_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, step: int) -> None:
        """A batch is about to be trained on, after `step` others over all epochs."""

    def after_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, out: StepResult, step: int) -> bool:
        """A batch has been trained on, the `step`-th over all epochs; return whether the turn is to end with it."""


class Classification(L.LightningModule):
    """A network, an optimizer and an update rule, for Lightning.

    Metrics are sums over samples kept in tensors and read once an epoch: reading a number out of a tensor, like
    `self.log`, costs more than a small network's step. Training metrics are those of each batch before its update.

    Args:
        network: Takes float images [N, C, H, W] in [0, 1] to logits [N, classes].
        make_optimizer: `network -> optimizer`.
        make_rule: `(network, optimizer, loss_fn, reduce=, step=, after_update=) -> rule`.
        make_schedule: `optimizer -> scheduler`, or None for a constant learning rate.
        schedule_interval: `"epoch"` or `"step"` (a batch): how often the schedule moves.
        after_update: Called with the parameters just updated, after each optimizer step.
        check_every: Batches of an epoch between two looks at whether the loss is still finite.
        capture: Whether the rule's step is recorded as a CUDA graph (see `capture`): `auto` where one process trains on
            a CUDA device and it can be, else it says so once; `on`, or it raises `BadInput`; `off`.
        seed: Of what is drawn while training, such as dropout; each device draws its own.

    Attributes:
        diverged: Whether a loss was not finite; training then ends, with what it had recorded.
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
        # (sum of losses, correct, samples). Those of training travel with a checkpoint taken within an epoch.
        self.register_buffer("train_sums", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("joint_sums", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("eval_sums", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.evaluated: Metrics = {}
        self._each_batch: list[EachBatch] = []

    train_sums: Tensor
    joint_sums: Tensor
    eval_sums: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, classes]."""
        return self.network(x)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and its schedule if there is one, from the network."""
        optimizer = self.make_optimizer(self.network)
        return optimizer if self.make_schedule is None else ([optimizer], [self.make_schedule(optimizer)])

    def rehearse(self, x: Tensor, y: Tensor) -> Arithmetic:
        """Take one step on a copy, so that what cannot be is known before anything starts, and what it costs.

        Args:
            x: A few images, float [N, C, H, W] in [0, 1].
            y: Their labels, int64 [N].

        Returns:
            What a batch of N costs (`samples`): `forward` and `update`, in multiply-accumulates (of matrix products and
            convolutions, as they were carried out), and how many `updates` it makes of each weight (a mean over
            weights). One entry, but for a rule that changes: `from_epoch` is the first epoch that it holds for.

        Raises:
            ValueError, TypeError, ArithmeticError: What optimizer, schedule or rule refuse.
        """
        network = copy.deepcopy(self.network)
        optimizer = self.make_optimizer(network)
        moved: list[int] = []

        def step(_last: bool) -> None:
            moved.append(_size(network, moving=True))
            optimizer.step()

        rule = self.make_rule(network, optimizer, F.cross_entropy, step=step)
        rule.prepare(x)
        with torch.no_grad(), _counter() as forward:
            network(x)
        found = []
        for epoch in sorted({0, getattr(rule, "at_epoch", 0)}):
            rule.set_epoch(epoch)
            moved.clear()
            with _counter() as update:
                rule.step(x, y)
            found.append(
                {
                    "from_epoch": epoch,
                    "samples": len(y),
                    "forward": forward.get_total_flops() // 2,
                    "update": update.get_total_flops() // 2,
                    "updates": sum(moved) / _size(network) or None,  # the shortcut keeps no gradients to count by
                }
            )
        if self.make_schedule is not None:
            with warnings.catch_warnings(action="ignore"):  # that no optimizer step came before
                self.make_schedule(optimizer).step()
        return found

    # --- training ----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Build the update rule, now that weights and optimizer lie on their device."""
        optimizer, counted = self.optimizers(use_pl_optimizer=False), self.optimizers()
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert isinstance(counted, LightningOptimizer)
        self._counted = counted
        strategy = self.trainer.strategy
        self.rule = self.make_rule(
            self.network,
            optimizer,
            F.cross_entropy,
            # Gradients come from torch.autograd.grad, which DistributedDataParallel's hooks never see.
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
        if self.diverged:  # cut off between the checkpoint of a diverged epoch and its result
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """Tell the rule which epoch begins (Lightning tells the loader)."""
        self.train_sums.zero_()
        self.joint_sums.zero_()
        self._sums_seen.take()
        assert self.rule is not None
        self.rule.set_epoch(self.current_epoch, self.global_step)

    def training_step(self, dataloader_iter: Iterator[tuple[Batch, int, int]]) -> None:
        """Train on the mini-batches of a turn.

        What Lightning does around this call costs as much as a seventh of a small network's step. So a turn has many
        batches: it ends when `check_every` batches of the epoch are full, or as soon as a callback wants Lightning to
        go on, to save a checkpoint perhaps. All that is counted is counted in batches.
        """
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        step, place = self.global_step, progress.current.ready  # which counts the first batch of the turn already
        for place, (batch, _, _) in enumerate(dataloader_iter, start=place):  # noqa: B020
            batch = self.trainer.precision_plugin.convert_input(batch)  # noqa: PLW2901
            turn_over = self._train_on(batch, step)
            step += 1
            if place % self.check_every == 0:
                if (seen := self._sums_seen.look(self._reduced(self.train_sums))) is not None:
                    self._check_finite(seen[1])
                break
            if turn_over or self.trainer.world_size > 1:  # several processes must take turns of the same length
                break
        progress.increment_by(place - progress.current.ready)

    def _train_on(self, batch: Batch, step: int) -> bool:
        """Let the rule change the weights by one mini-batch; return whether a callback wants the turn to end."""
        for callback in self._each_batch:
            callback.before_batch(self.trainer, self, batch, step)
        x, y = batch
        assert self.rule is not None
        # What `LightningOptimizer.step` does to count a global step, whatever the rule's own steps are; its detour
        # through strategy and precision plugin does nothing here, and costs a tenth of a small network's step.
        self._counted._on_before_step()
        out = self.rule.step(x, y)
        self._counted._on_after_step()
        _add(self.train_sums, out.loss, out.output, y)
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
        """Move the schedule, once the epoch's record stands."""
        self._check_finite(self._reduced(self.train_sums).tolist())
        if self.make_schedule is not None and self.schedule_interval == "epoch":
            self.lr_schedulers().step()  # type: ignore[union-attr]

    def _check_finite(self, sums: Sequence[float]) -> None:
        loss, *_ = sums
        if not self.diverged and not math.isfinite(loss):
            self.diverged = True
            self.trainer.should_stop = True

    def train_metrics(self) -> Metrics:
        """Mean loss (nats) and accuracy over the samples of this epoch so far, each from before its batch's update.

        With a joint pass also `loss/train_joint`: the loss which that pass saw, after the single updates of its batch.
        """
        joint = self._means(self.joint_sums, "train_joint")
        return self._means(self.train_sums, "train") | {key: joint[key] for key in joint if key.startswith("loss")}

    # --- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin to sum."""
        self.eval_sums.zero_()
        if self.trainer.world_size > 1 and not self.trainer.sanity_checking:
            self._average_running_statistics()

    def _average_running_statistics(self) -> None:
        """Let all ranks evaluate one network.

        In training, a batch's statistics are those of each rank's share of it. Running ones are linear in them, so
        that their mean over ranks is what the means over ranks would have given, whenever it is taken.
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
        """Begin to sum."""
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
        # A copy: the strategy may reduce in place. Ranks may hold uneven shares, so sums are added, never means.
        return self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what each rank has of its own, so that it goes on where it stopped: random draws, sums, statistics."""
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
        """Keep it until training starts: until then Lightning gives every rank the first one's."""
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
    """The splits of a data set on the training device, batch by batch.

    Args:
        data: Images and labels, uint8.
        batch_size: Samples in a training batch, over all devices.
        seed: Decides, with the epoch, the order of samples and the flips.
        augment: `"none"` or `"flip"`.
        shuffle: A new order of training samples each epoch, else always that of the data set.
        limit: Train on so many batches of each epoch; None: all.
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
        # Made once here, so that a batch larger than the training set is refused before anything starts.
        self.steps_per_epoch = len(EpochLoader(data.train, batch_size, **self._how))

    def train_dataloader(self) -> EpochLoader:
        """Without the last short batch."""
        return EpochLoader(self.data.train, self.batch_size, **self._how, **self._place())

    def train_loader(self) -> EpochLoader:
        """The same for one process, without a trainer, on the host."""
        return EpochLoader(self.data.train, self.batch_size, **self._how)

    def val_dataloader(self) -> EpochLoader:
        """The validation set, in order, whole."""
        return self._evaluation(self.data.validation)

    def test_dataloader(self) -> EpochLoader:
        """The test set, in order, whole."""
        return self._evaluation(self.data.test)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The loader's batches are there already."""
        return batch

    def _evaluation(self, images: Images) -> EpochLoader:
        return EpochLoader(images, EVALUATION_BATCH, shuffle=False, drop_last=False, **self._place())

    def _place(self) -> dict[str, Any]:
        assert self.trainer is not None
        strategy = self.trainer.strategy
        return {"device": strategy.root_device, "rank": self.trainer.global_rank, "world_size": self.trainer.world_size}


def _size(network: nn.Module, moving: bool = False) -> int:
    """Numbers among the parameters; with `moving`, among those with a gradient at the moment."""
    return sum(p.numel() for p in network.parameters() if not moving or p.grad is not None)


class _NoModules:
    """Stands for torch's tracker of modules.

    The tracker hooks the inputs of each module, and `torch.autograd.grad` fails where one of them is a parameter, as in
    the modules of `torch.nn.utils.parametrize`.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _counter() -> FlopCounter:
    """Counts multiply-accumulates, twice each, of everything together."""
    counter = FlopCounter()
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def rank_seed(seed: int, rank: int) -> int:
    """Seed of what a rank draws while training: rank 0's is the run's own; no two runs' ranks share one by design."""
    return seed if rank == 0 else int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])


def means(sums: Sequence[float], split: str) -> Metrics:
    """Mean loss and accuracy from (sum of losses, correct, samples); none of no samples."""
    loss, correct, count = sums
    return {f"loss/{split}": loss / count, f"accuracy/{split}": correct / count} if count else {}


def weight_norms(network: nn.Module) -> Metrics:
    """L2 norms of the parameters.

    Returns:
        `weight_norm/total`: of all parameters as one vector. `weight_norm/sum`: the sum of the tensors' norms, as the
        published Backforward runs log it. `weight_norm/<layer>`: of all parameters that a module holds itself.
    """
    layers = {
        name: [parameter.detach() for parameter in module.parameters(recurse=False)]
        for name, module in network.named_modules()
    }
    tensors = [tensor for held in layers.values() for tensor in held]
    norms = torch.stack(torch._foreach_norm(tensors)).double()
    # One read from the device for all of them.
    values = iter(norms.tolist())
    per_layer = {name: [next(values) for _ in held] for name, held in layers.items() if held}
    flat = [value for held in per_layer.values() for value in held]
    result = {"weight_norm/total": _root_sum_square(flat), "weight_norm/sum": sum(flat)}
    return result | {f"weight_norm/{name}": _root_sum_square(held) for name, held in per_layer.items()}


def _root_sum_square(values: list[float]) -> float:
    return float(sum(value**2 for value in values) ** 0.5)


def _add(sums: Tensor, loss: Tensor, logits: Tensor, y: Tensor) -> None:
    """Add a batch to (sum of losses, correct, samples)."""
    losses, correct, samples = sums.unbind()
    losses.add_(loss.detach(), alpha=len(y))
    correct.add_((logits.argmax(dim=1) == y).sum())
    samples.add_(len(y))


def quiet_lightning() -> None:
    """Leave out what Lightning says to everyone: that a GPU is there or not, tips, that training has stopped."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")  # Lightning's own call of torch
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # it need not be used
    warnings.filterwarnings("ignore", message="GPU available but not used")  # as asked, or it is Apple's
    # Experimental since Lightning 1.5, says it; `Classification.training_step` keeps the count right.
    warnings.filterwarnings("ignore", message=".*`dataloader_iter`")
    # Its successor is younger than the oldest torch that will do.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
