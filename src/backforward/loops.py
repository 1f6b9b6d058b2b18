"""Update rules inside the training loops of Lightning and Accelerate.

    class Network(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False        # the rule computes gradients and takes the steps
            self.network = ...

        def configure_optimizers(self):
            return torch.optim.SGD(self.network.parameters(), lr=0.1)

        def on_train_start(self):
            self.rule = Backforward(self.network, loss_fn=F.cross_entropy, **in_lightning(self))

        def training_step(self, batch, batch_idx):
            self.log("loss", self.rule.step(*batch).loss)

    network, optimizer, batches = accelerator.prepare(network, optimizer, batches)
    network = accelerator.unwrap_model(network)
    rule = Backforward(network, loss_fn=F.cross_entropy, **in_accelerate(accelerator, optimizer))
    for x, y in batches:
        rule.step(x, y)

Neither package is imported here: the functions use what they are given.

Depends on torch only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

# Strategies that give a process a part of each parameter, where a layer's gradient cannot be had by itself.
SHARDED = ("fsdp", "deepspeed", "modelparallel", "megatron", "tensorparallel", "xla")


def in_lightning(module: Any) -> dict[str, Any]:
    """The arguments of an update rule that fit it into a Lightning `Trainer`.

    - `optimizer`: the module's own, without Lightning's wrapper.
    - `step`: one step of a batch, the last, goes through the wrapper. Lightning then counts one `global_step` a batch.
      If all steps went through it, the count would be a multiple; if none did, it would stay 0, and `ModelCheckpoint`
      would never save.
    - `reduce`: the mean over processes. Gradients come from `torch.autograd.grad`, which DDP's hooks do not see.

    Args:
        module: A `LightningModule` with manual optimization and one optimizer, once training has started: call this in
            `on_train_start`, which also comes after a checkpoint is restored.

    Returns:
        Keyword arguments of `Backforward`, `Backprop` or another rule.

    Raises:
        ValueError: The module optimizes automatically, has no or several optimizers, or the strategy shards parameters.
    """
    if module.automatic_optimization:
        raise ValueError("set self.automatic_optimization = False: the update rule computes gradients and takes steps")
    trainer, counted = module.trainer, module.optimizers()
    if not isinstance(counted, torch.optim.Optimizer):
        raise ValueError(  # noqa: TRY004  (the right kind, not the right number)
            f"configure_optimizers returned {len(counted)} optimizers; an update rule in Lightning works with one"
        )
    _refuse_sharded(type(trainer.strategy).__name__)
    optimizer: torch.optim.Optimizer = module.optimizers(use_pl_optimizer=False)

    def step(last: bool) -> None:
        (counted if last else optimizer).step()

    hooks: dict[str, Any] = {"optimizer": optimizer, "step": step}
    if trainer.world_size > 1:
        hooks["reduce"] = partial(trainer.strategy.reduce, reduce_op="mean")
    return hooks


def in_accelerate(accelerator: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The arguments of an update rule that fit it into a loop with Hugging Face Accelerate.

    - `optimizer`: without Accelerate's wrapper.
    - `reduce`: the mean over processes.

    Give the rule `accelerator.unwrap_model(network)`; leave out `accelerator.backward`, `optimizer.step` and
    `optimizer.zero_grad`. Save and load with `accelerator.save_state` as usual.

    Args:
        accelerator: The `Accelerator`.
        optimizer: The optimizer as `accelerator.prepare` returned it.

    Returns:
        Keyword arguments of `Backforward`, `Backprop` or another rule.

    Raises:
        ValueError: Mixed precision is fp16, gradients are accumulated, or parameters are sharded.
    """
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision='fp16' needs a gradient scaler, whose scale moves within a batch; give 'bf16'"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps}: an update rule steps once per "
            "batch; give 1, and micro_batches= to the rule"
        )
    _refuse_sharded(str(accelerator.distributed_type))
    hooks: dict[str, Any] = {"optimizer": getattr(optimizer, "optimizer", optimizer)}
    if accelerator.num_processes > 1:

        def mean(flat: Tensor) -> Tensor:
            averaged: Tensor = accelerator.reduce(flat, reduction="mean")
            return averaged

        hooks["reduce"] = mean
    return hooks


def _refuse_sharded(kind: str) -> None:
    if any(name in kind.lower().replace("_", "") for name in SHARDED):
        raise ValueError(
            f"{kind} gives each process a part of every parameter; an update rule needs all of it; use DDP"
        )
