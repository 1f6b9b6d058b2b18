"""What an update rule needs to know of a network in each batch: found once, and looked over at the start of each batch.

A walk through the modules costs as much as a few layers of a small network; to see that nothing has changed costs far
less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from backforward.batch import changes_only_buffers, is_compiled, may_draw
from backforward.groups import Order, owners


class Network:
    """A network's modules and weights, as they are now.

    Args:
        model: The network.

    Attributes:
        modules: By name.
        parameters: In order of registration.
        owner: The module that holds each parameter or buffer, by the tensor's id.
        quiet: Whether a forward changes nothing but buffers.
        draws: Whether a forward may draw random numbers.
        compiled: Whether `torch.compile` has compiled a part.
        scripted: Name of a scripted module, or None.
        order: The layers in the order of their use, for a quiet network in which they have been seen: no code but
            torch's and this library's runs in it, so the order is the same in each batch.
        leaves: Ids of the trained parameters, and of the leaf tensors that a loss of torch's depends on: with `order`
            known they are the same in each batch.
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
        """Whether modules, weights and buffers are the same objects as when this was made."""
        if self.scripted is not None or self.quiet is not changes_only_buffers(self.model, self.modules.values()):
            return False
        for own, contents, compiled in self._parts:
            if _contents(own) != contents or (own.get("_compiled_call_impl") is not None) is not compiled:
                return False
        return True


def _contents(own: dict[str, Any]) -> list[int]:
    """Ids of a module's children, parameters and buffers."""
    return [*map(id, [*own["_modules"].values(), 0, *own["_parameters"].values(), 0, *own["_buffers"].values()])]


def now(model: nn.Module, known: Network | None) -> Network:
    """What is known of a network, if it still fits, else what is found anew."""
    return known if known is not None and known.fits() else Network(model)
