"""What an update rule knows about a network: found once, and checked at the start of each batch.

Walking through the modules costs as much as a few layers of a small network; checking that nothing changed costs far
less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from backforward.batch import changes_only_buffers, is_compiled, may_draw
from backforward.groups import Order, owners


class Network:
    """A network's modules and weights at one moment.

    Attributes:
        owner: The module that holds each parameter or buffer, by the tensor's id.
        quiet: Whether a forward changes nothing but buffers.
        draws: Whether a forward may draw random numbers.
        scripted: Name of a scripted module, or None.
        order: The layers in the order of their use, once seen in a quiet network. Such a network runs only code of
            torch and this library, so the order is the same in each batch.
        leaves: Ids of the trained parameters, and of the leaves that the loss depends on. Once `order` is known and
            the loss draws nothing, they are the same in each batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.parameters = list(model.parameters())
        self.owner = owners(model)
        self.quiet = changes_only_buffers(model)
        self.draws = may_draw(model)
        self.compiled = is_compiled(model)
        self.scripted = next((n for n, m in self.modules.items() if isinstance(m, torch.jit.ScriptModule)), None)
        self.order: Order | None = None
        self.leaves: tuple[list[int], set[int]] | None = None
        self._parts: list[tuple[dict[str, Any], list[int], bool]] = []
        if self.scripted is None:
            for module in self.modules.values():
                own = module.__dict__
                self._parts.append((own, _contents(own), module._compiled_call_impl is not None))

    def fits(self) -> bool:
        """Return whether modules, weights and buffers are still the same objects."""
        if self.scripted is not None or self.quiet is not changes_only_buffers(self.model, self.modules.values()):
            return False
        for own, contents, compiled in self._parts:
            if _contents(own) != contents or (own.get("_compiled_call_impl") is not None) is not compiled:
                return False
        return True


def _contents(own: dict[str, Any]) -> list[int]:
    """Return the ids of a module's children, parameters and buffers."""
    return [*map(id, [*own["_modules"].values(), 0, *own["_parameters"].values(), 0, *own["_buffers"].values()])]


def now(model: nn.Module, known: Network | None) -> Network:
    """Return `known` if it still fits the network, else a new `Network`."""
    return known if known is not None and known.fits() else Network(model)
