from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from backforward.models import MLP, NIN, Residual
from backforward.models.init import INITS, initialise_

BUILD = {
    "mlp": lambda **settings: MLP((1, 5, 5), 3, hidden=9, depth=2, **settings),
    "nin": lambda **settings: NIN((1, 17, 17), 3, width=0.05, **settings),
    "residual": lambda **settings: Residual((1, 8, 8), 3, depth=8, width=0.25, **settings),
}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim >= 2}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", BUILD)
def test_same_seed_gives_every_norm_the_same_weights(name: str, init: str):
    arms = [BUILD[name](norm=norm, init=init, seed=4) for norm in ("none", "batch", "prop")]
    first, *others = map(weights, arms)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)
    assert torch.equal(arms[0].head.bias, arms[1].head.bias)


@pytest.mark.parametrize("name", BUILD)
def test_a_seed_leaves_the_global_generator_alone(name: str):
    state = torch.get_rng_state()
    BUILD[name](seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(7)
    a, b = BUILD["mlp"](), BUILD["mlp"]()
    torch.manual_seed(7)
    again = BUILD["mlp"]()
    assert all(torch.equal(weights(a)[key], weights(again)[key]) for key in weights(a))
    assert not torch.equal(a.head.weight, b.head.weight)


def test_seeds_and_layers_differ():
    model, other = MLP((1, 5, 5), 25, hidden=25, seed=0), MLP((1, 5, 5), 25, hidden=25, seed=1)
    assert not torch.equal(model.hidden1.linear.weight, other.hidden1.linear.weight)
    assert not torch.equal(model.hidden1.linear.weight, model.head.weight)


@pytest.mark.parametrize("init", INITS)
def test_scale_of_the_draws(init: str):
    conv = nn.Conv2d(64, 32, 5)
    initialise_(conv, init, seed=0)
    fan_in, fan_out = 64 * 25, 32 * 25
    variances = {"he": 2 / fan_in, "glorot": 2 / (fan_in + fan_out), "lecun": 1 / fan_in, "default": 1 / (3 * fan_in)}
    variance = variances[init]
    assert conv.weight.var().item() == pytest.approx(variance, rel=0.03)
    assert abs(conv.weight.mean()) < 4 * math.sqrt(variance / conv.weight.numel())
    if init in ("glorot", "default"):
        assert conv.weight.abs().max() <= math.sqrt(3 * variance)
    if init in ("glorot", "lecun"):
        assert not conv.bias.any()
    else:
        assert 0.8 / math.sqrt(fan_in) < conv.bias.abs().max() <= 1 / math.sqrt(fan_in)


def test_known_draw():
    """A seed must give the same weights in every release."""
    layer = nn.Linear(2, 1)
    initialise_(layer, "he", seed=0)
    torch.testing.assert_close(layer.weight, torch.tensor([[0.8554931, -0.1623563]]))
    torch.testing.assert_close(layer.bias, torch.tensor([-0.3018048]))


def test_refuses_an_unknown_init_in_one_line():
    with pytest.raises(ValueError, match=r"^unknown init 'orthogonal': there are he, glorot, lecun, default$"):
        initialise_(nn.Linear(2, 2), "orthogonal")
