"""Update rules in the training loops of Lightning and Accelerate, neither of which is imported here."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

# Strategies that give each process a part of each parameter, so that a layer's gradient is not available on its own.
SHARDED = ("fsdp", "deepspeed", "modelparallel", "megatron", "tensorparallel", "xla")


def in_lightning(module: Any) -> dict[str, Any]:
    """Return the arguments that make an update rule work in a Lightning `Trainer`.

    - `optimizer`: the module's own, without Lightning's wrapper.
    - `step`: only the last step of a batch goes through the wrapper, so Lightning counts one `global_step` per batch.
      If every step did, the count would be a multiple of the batches; if none did, it would stay 0 and
      `ModelCheckpoint` would never save.
    - `reduce`: the mean over processes. DDP's hooks do not see gradients from `torch.autograd.grad`.

    Examples:
        >>> def on_train_start(self):      # of a module with self.automatic_optimization = False
        ...     self.rule = Backforward(self.network, loss_fn=F.cross_entropy, **in_lightning(self))

    Args:
        module: A `LightningModule` with manual optimization and one optimizer. Call this function in `on_train_start`,
            which also runs after a checkpoint is restored.

    Raises:
        ValueError: Optimization is automatic, there is not exactly one optimizer, or the strategy shards parameters.
    """
    if module.automatic_optimization:
        raise ValueError("set self.automatic_optimization = False: the update rule computes gradients and takes steps")
    trainer, counted = module.trainer, module.optimizers()
    if not isinstance(counted, torch.optim.Optimizer):
        raise ValueError(  # noqa: TRY004  (optimizers, but not exactly one)
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
    """Return the arguments that make an update rule work in a loop with Hugging Face Accelerate.

    - `optimizer`: without Accelerate's wrapper.
    - `reduce`: the mean over processes.

    Pass the rule the unwrapped network, and do not call `accelerator.backward`, `optimizer.step` or
    `optimizer.zero_grad`. Save and load with `accelerator.save_state` as usual.

    Examples:
        >>> network = accelerator.unwrap_model(network)
        >>> rule = Backforward(network, loss_fn=F.cross_entropy, **in_accelerate(accelerator, optimizer))

    Args:
        accelerator: The `Accelerator`.
        optimizer: The optimizer that `accelerator.prepare` returned.

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
