"""Backforward with one optimizer object for each group, in plain PyTorch: what `backforward.optimizers` must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn


def train(
    model: nn.Module,
    optimizers: Sequence[Sequence[Any]],
    groups: Sequence[Sequence[str]],
    loss_fn: Callable[[Any, Tensor], Tensor],
    batches: Iterable[tuple[Any, Tensor]],
    *,
    max_grad_norm: float | None = None,
    joint: bool = False,
    before_batch: Callable[[int], None] = lambda batch: None,
) -> None:
    """Train on some batches. The network has no randomness and no running statistics.

    Args:
        model: Its weights are changed.
        optimizers: For each group its own optimizers, each constructed with parameters of the group alone.
        groups: Names of the parameters of each group.
        loss_fn: Maps (output, target) to the loss.
        batches: Inputs and targets.
        max_grad_norm: Clips each update.
        joint: Whether one more gradient, of all groups, follows, along which each group's optimizers step.
        before_batch: Called with the number of the batch.
    """
    named = dict(model.named_parameters())
    every = [name for names in groups for name in names]
    for batch, (x, y) in enumerate(batches):
        before_batch(batch)
        updates = [(names, own) for names, own in zip(groups, optimizers, strict=True)]
        if joint:
            updates.append((every, [optimizer for own in optimizers for optimizer in own]))
        for names, own in updates:
            model.zero_grad()
            loss_fn(model(x), y).backward()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_([named[name] for name in names], max_grad_norm)
            for optimizer in own:
                optimizer.step()
    model.zero_grad()
