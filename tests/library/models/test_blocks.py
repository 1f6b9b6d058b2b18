from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backforward import Backforward
from backforward.data_norm import DataNorm
from backforward.models import MLP, NIN, Residual, weight_decay_groups
from backforward.models.blocks import Blocks
from backforward.normprop import NormPropConv2d, NormPropLinear, unit_norm_projection


def test_modules_of_a_block():
    kinds = {norm: [type(m) for m in Blocks(norm).conv(2, 3, 3)] for norm in ("none", "batch", "prop")}
    assert kinds == {
        "none": [nn.Conv2d, nn.ReLU],
        "batch": [nn.Conv2d, nn.BatchNorm2d, nn.ReLU],
        "prop": [NormPropConv2d],
    }
    assert [type(m) for m in Blocks("batch", "tanh").linear(2, 3)] == [nn.Linear, nn.BatchNorm1d, nn.Tanh]
    assert [type(m) for m in Blocks("prop").linear(2, 3)] == [NormPropLinear]
    assert Blocks("batch").conv(2, 3, 3).conv.bias is None
    assert Blocks("batch").last_conv(2, 3).bias is not None


def test_a_block_does_not_overwrite_its_input():
    for norm in ("none", "batch", "prop"):
        x = torch.randn(4, 2, 6, 6)
        before = x.clone()
        Blocks(norm).conv(2, 3, 3)(x)
        assert torch.equal(x, before)


@pytest.mark.parametrize("norm", ["none", "batch", "prop"])
def test_weight_decay_is_for_weights_only(norm: str):
    model = NIN((1, 17, 17), 3, width=0.05, norm=norm, activation="prelu")
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = weight_decay_groups(model)
    assert all(names[id(p)].endswith(".weight") and p.ndim == 4 for p in decay["params"])
    assert len(decay["params"]) == 9
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    optimizer = torch.optim.SGD([decay, rest], lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


NETWORKS = {
    "mlp": lambda norm: MLP((1, 17, 17), 3, hidden=8, depth=2, norm=norm, seed=0),
    "nin": lambda norm: NIN((1, 17, 17), 3, width=0.05, norm=norm, dropout=0.2, seed=0),
    "residual": lambda norm: Residual((1, 17, 17), 3, depth=8, width=0.25, norm=norm, seed=0),
}


@pytest.mark.parametrize("data_norm", ["global", "batch"])
@pytest.mark.parametrize("norm", ["none", "batch", "prop"])
@pytest.mark.parametrize("name", NETWORKS)
def test_backforward_replays_every_network_bitwise(name: str, norm: str, data_norm: str):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 1, 17, 17), dtype=torch.uint8, generator=generator)
    start = nn.Sequential(DataNorm.fit(data_norm, images), NETWORKS[name](norm))
    ends = []
    for engine in ("naive", "replay"):
        network = copy.deepcopy(start)
        optimizer = torch.optim.SGD(weight_decay_groups(network), lr=0.05, momentum=0.9, weight_decay=1e-3)
        project = unit_norm_projection(network)
        rule = Backforward(network, optimizer, F.cross_entropy, engine=engine, after_update=project)
        torch.manual_seed(0)
        for _ in range(2):
            rule.step(images.float() / 255, torch.tensor([0, 1, 2, 0, 1, 2]))
        ends.append(network.state_dict())
        layers = [m for m in network.modules() if isinstance(m, NormPropLinear | NormPropConv2d) and m.project]
        assert len(rule.groups) == sum(p.ndim >= 2 for p in network.parameters())
        for layer in layers:
            torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), torch.ones(len(layer.weight)))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert any(not torch.equal(value, ends[0][key]) for key, value in start.state_dict().items())
    if data_norm == "batch":
        assert ends[0]["0.batches"] == 2


@pytest.mark.parametrize("norm", ["none", "batch", "prop"])
@pytest.mark.parametrize("name", NETWORKS)
def test_fx_traces_every_network(name: str, norm: str):
    network = NETWORKS[name](norm).eval()
    x = torch.rand(2, 1, 17, 17)
    assert torch.equal(torch.fx.symbolic_trace(network)(x), network(x))


def test_networks_can_be_sliced():
    model = NETWORKS["nin"]("none")
    assert type(model[:3]) is nn.Sequential
    assert list(dict(model[1:3].named_children())) == ["conv2", "pool1"]
    assert model[0] is model.conv1
