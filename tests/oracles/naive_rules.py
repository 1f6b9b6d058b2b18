"""Update rules written out in the plainest way, from the definitions, with nothing of the library in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def sgd_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Tensor], Tensor],
    batches: Iterable[tuple[Any, Tensor]],
) -> list[float]:
    """The loop in every textbook."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(*x) if isinstance(x, tuple) else model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def backforward_batch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Tensor], Tensor],
    x: Any,
    y: Tensor,
    groups: list[list[str]],
    statistics: dict[str, int],
    max_grad_norm: float | None = None,
    after_update: Callable[[list[nn.Parameter]], None] | None = None,
    micro_batches: int = 1,
) -> Tensor:
    """One batch of Backforward Propagation.

    Args:
        groups: Names of the parameters of each group.
        statistics: For each module with running statistics the pass in which they move.

    Returns:
        The loss before any update.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    after = dict(before)
    draws = torch.get_rng_state()
    first = None
    for k, names in enumerate(groups):
        torch.set_rng_state(draws)
        model.load_state_dict(before, strict=False)
        model.zero_grad()
        losses = []
        for i in range(micro_batches):
            part = slice(i * len(y) // micro_batches, (i + 1) * len(y) // micro_batches)
            loss = loss_fn(model(*(each[part] for each in x)) if isinstance(x, tuple) else model(x[part]), y[part])
            loss = loss / micro_batches
            loss.backward()
            losses.append(loss.detach())
        first = sum(losses[1:], losses[0]) if first is None else first
        for name, buffer in model.named_buffers():
            if statistics[name.rpartition(".")[0]] == k:
                after[name] = buffer.clone()
        own = [named[name] for name in names]
        for parameter in model.parameters():
            if all(parameter is not p for p in own):
                parameter.grad = None
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(own, max_grad_norm)
        optimizer.step()
        if after_update is not None:
            with torch.no_grad():
                after_update(own)
    model.load_state_dict(after, strict=False)
    model.zero_grad()
    assert first is not None
    return first
