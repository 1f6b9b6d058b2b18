"""Knowledge about a network is reused until the network changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backforward.models import MLP
from backforward.network import Network, now


class Own(nn.Module):
    """A module from neither torch nor this library."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_knows_a_network() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout())
    known = Network(model)
    assert list(known.modules) == ["", "0", "1", "2"]
    assert known.parameters == list(model.parameters())
    assert {known.owner[id(buffer)] for buffer in model.buffers()} == {"1"}
    assert (known.quiet, known.draws, known.compiled, known.scripted) == (True, True, False, None)
    assert not Network(Own()).quiet
    assert not Network(MLP((1, 2, 2), 3, hidden=4, seed=0)).draws
    assert Network(torch.jit.script(nn.Sequential(nn.Linear(2, 2)))).scripted == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.register_buffer("more", torch.zeros(1)),
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(3, 2))),
        lambda m: setattr(m[1], "running_mean", torch.zeros(3)),
        lambda m: m.append(nn.Linear(3, 3)),
        lambda m: m.__setitem__(2, nn.Tanh()),
        lambda m: m[0].register_forward_hook(lambda *_: None),
        lambda m: m[0].register_full_backward_hook(lambda *_: None),
        lambda m: m[2].compile(backend="eager"),
        lambda m: setattr(m[0], "forward", m[0].forward),
    ],
    ids=[
        "buffer",
        "weight",
        "buffer-replaced",
        "module",
        "module-replaced",
        "hook",
        "backward-hook",
        "compiled",
        "own",
    ],
)
def test_looks_again_at_a_changed_network(change: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU())
    known = now(model, None)
    model(torch.randn(4, 2))
    assert now(model, known) is known
    change(model)
    found = now(model, known)
    assert found is not known
    assert found.parameters == list(model.parameters())
