"""Norms that are functions of a layer: against their formulas, and in every network under Backforward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backforward import Backforward
from backforward.models import MLP, NIN, Residual, weight_decay_groups
from backforward.models.blocks import Blocks
from backforward.models.norms import (
    NoisyBatchNorm,
    Norm,
    group_norm,
    layer_norm,
    noisy_batch_norm,
    of_features,
    weight_norm,
    weight_standardization,
)

NORMS: dict[str, Norm] = {
    "layer": layer_norm,
    "group": partial(group_norm, groups=2),
    "noisy batch": noisy_batch_norm,
    "weight": weight_norm,
    "weight standardization": weight_standardization,
    "of features": partial(of_features, make=partial(nn.BatchNorm1d, affine=False)),
}
NETWORKS: dict[str, Callable[[Norm], nn.Module]] = {
    "mlp": lambda norm: MLP((1, 17, 17), 3, hidden=8, depth=2, norm=norm, seed=0),
    "nin": lambda norm: NIN((1, 17, 17), 3, width=1 / 16, norm=norm, seed=0),
    "residual": lambda norm: Residual((1, 17, 17), 3, depth=8, width=0.25, norm=norm, seed=0),
}
DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randn(6, 4, 5, 5, generator=DRAW)
ROWS = torch.randn(6, 4, generator=DRAW)


def test_norms_come_between_layer_and_activation() -> None:
    block = Blocks(layer_norm).linear(4, 6)
    assert [type(m) for m in block] == [nn.Linear, nn.LayerNorm, nn.ReLU]
    assert block.linear.bias is None
    block = Blocks(partial(group_norm, groups=2)).conv(4, 6, 3)
    assert [type(m) for m in block] == [nn.Conv2d, nn.GroupNorm, nn.ReLU]
    assert block.conv.bias is None
    block = Blocks(weight_norm).conv(4, 6, 3)
    assert isinstance(block.conv, nn.Conv2d)
    assert len(block) == 2
    assert block.conv.bias is not None
    block = Blocks(partial(of_features, make=partial(nn.BatchNorm1d, affine=False))).linear(4, 6)  # has no shift
    assert block.linear.bias is not None
    assert isinstance(Blocks(layer_norm).last_linear(4, 3), nn.Linear)


def test_layer_norm_is_over_all_features_and_positions_of_a_sample() -> None:
    over = (IMAGES - IMAGES.mean((1, 2, 3), keepdim=True)) / IMAGES.std((1, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(layer_norm(nn.Conv2d(1, 4, 1))(IMAGES), over, atol=1e-4, rtol=1e-4)
    rows = (ROWS - ROWS.mean(1, keepdim=True)) / ROWS.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(layer_norm(nn.Linear(1, 4))(ROWS), rows, atol=1e-4, rtol=1e-4)


def test_group_norm_is_over_the_channels_of_a_group() -> None:
    norm = group_norm(nn.Conv2d(1, 4, 1), groups=2)
    half = IMAGES[:, :2]
    half = (half - half.mean((1, 2, 3), keepdim=True)) / half.std((1, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(norm(IMAGES)[:, :2], half, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="divisible"):
        group_norm(nn.Linear(1, 5), groups=2)


def test_weight_norm_starts_as_the_plain_layer() -> None:
    with_norm, plain = NETWORKS["nin"](weight_norm).eval(), NETWORKS["nin"]("none").eval()  # type: ignore[arg-type]
    x = torch.randn(2, 1, 17, 17)
    torch.testing.assert_close(with_norm(x), plain(x), rtol=1e-4, atol=1e-5)
    conv = with_norm.get_submodule("conv4.conv")
    g, v = (conv.parametrizations.weight.original0, conv.parametrizations.weight.original1)  # type: ignore[union-attr]
    by_hand = g * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(conv.weight, by_hand)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_scaled_standardization_is_its_formula(shape: tuple[int, ...], activation: str) -> None:
    layer = nn.Linear(4, 6) if len(shape) == 2 else nn.Conv2d(4, 6, 3)
    v = layer.weight.detach().clone()
    weight_standardization(layer, activation)
    gain = torch.rand(6) + 0.5
    layer.parametrizations.weight[0].gain.data.copy_(gain)  # type: ignore[union-attr, index, operator]
    z = torch.randn(2_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gamma = 1 / {"relu": torch.relu, "tanh": torch.tanh}[activation](z).std()
    for unit in range(6):
        one, count = v[unit], v[unit].numel()
        by_hand = gain[unit] * gamma * (one - one.mean()) / (count * one.var(correction=0)).sqrt()
        torch.testing.assert_close(layer.weight[unit], by_hand.float(), rtol=3e-3, atol=1e-5)


def test_with_scaled_standardization_every_hidden_layer_has_output_of_variance_one() -> None:
    net = MLP((400,), 10, hidden=400, depth=6, norm=weight_standardization, init="he", seed=0)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            p.data.zero_()
    h = torch.randn(2000, 400, generator=torch.Generator().manual_seed(0))
    for k in range(1, 7):
        h = net.get_submodule(f"hidden{k}")(h)
        assert h.var(0).mean().item() == pytest.approx(1, abs=0.15)


def test_noise_has_its_distribution_and_changes_at_every_step() -> None:
    torch.manual_seed(0)
    norm = NoisyBatchNorm(2, mean=0.5, std=1.25, mean_radius=0.1, std_radius=0.1)
    x = torch.randn(4000, 2)
    plain = nn.BatchNorm1d(2)(x)
    means, scales = [], []
    for _ in range(200):
        noisy = norm(x)
        slope = (noisy * plain).mean(0) / plain.square().mean(0)
        means.append(noisy.mean(0))
        scales.append(slope)
    m, s = torch.stack(means), torch.stack(scales)
    assert (m.abs() <= 0.52).all()
    assert (s >= 0.98).all()
    assert (s <= 1.27).all()
    torch.testing.assert_close(m.std(0), torch.full((2,), 0.5 / 3**0.5), rtol=0.15, atol=0)
    torch.testing.assert_close(s.mean(0), torch.full((2,), 1.125), rtol=0.02, atol=0)
    rest = noisy - m[-1] - s[-1] * plain
    expected = (0.1**2 / 3 + 0.1**2 * plain.square().mean(0)).sqrt()  # from the shifts and from the scales
    torch.testing.assert_close(rest.std(0), expected, rtol=0.1, atol=0)
    assert not torch.allclose(m[0], m[1], atol=1e-3)


def test_in_evaluation_noisy_batch_norm_is_batch_norm() -> None:
    noisy, plain = NoisyBatchNorm(4), nn.BatchNorm2d(4)
    for _ in range(3):
        noisy(IMAGES)
        plain(IMAGES)
    assert torch.equal(noisy.running_mean, plain.running_mean)  # type: ignore[arg-type]
    assert torch.equal(noisy.eval()(IMAGES), plain.eval()(IMAGES))
    quiet = NoisyBatchNorm(4, mean=0, std=1, mean_radius=0, std_radius=0)
    torch.testing.assert_close(quiet(IMAGES), plain.train()(IMAGES))
    with pytest.raises(ValueError, match="std at least 1"):
        NoisyBatchNorm(4, std=0.5)
    with pytest.raises(ValueError, match="takes"):
        NoisyBatchNorm(4)(torch.randn(2, 4, 3))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_backforward_replays_every_network_bitwise(name: str, norm: Norm) -> None:
    if name != "mlp" and norm is NORMS["of features"]:
        pytest.skip("BatchNorm1d is for rows")
    x, y = torch.randn(4, 1, 17, 17, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    models = []
    for engine in ("naive", "auto"):
        torch.manual_seed(1)
        model = copy.deepcopy(NETWORKS[name](norm))
        rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.05), F.cross_entropy, engine=engine)
        for _ in range(3):
            rule.step(x, y)
        models.append(model)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert len(rule.groups) == len(layers)
    naive, other = (model.state_dict() for model in models)
    assert all(torch.equal(naive[key], other[key]) for key in naive)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_seed_alone_gives_the_initial_weights(norm: Norm) -> None:
    """They equal those without a norm if the norm does not change the weight."""
    one, again = (NETWORKS["mlp"](norm) for _ in range(2))
    plain = NETWORKS["mlp"]("none")  # type: ignore[arg-type]
    assert all(map(torch.equal, one.state_dict().values(), again.state_dict().values()))
    if norm is not weight_standardization:
        for name in ("hidden1.linear", "hidden2.linear", "head"):
            torch.testing.assert_close(one.get_submodule(name).weight, plain.get_submodule(name).weight)
    else:
        trained: Any = one.get_submodule("hidden1.linear").parametrizations
        assert torch.equal(trained.weight.original, plain.get_submodule("hidden1.linear").weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_weight_decay_is_for_weights_only(norm: Norm) -> None:
    model = NETWORKS["mlp"](norm)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in weight_decay_groups(model)[0]["params"]}
    kinds = {"weight", "original", "original1"}
    assert len(decayed) == 3
    assert {name.rpartition(".")[2] for name in decayed} <= kinds


def gradient_is_right(layer: nn.Module, x: Tensor) -> bool:
    names, values = zip(*layer.named_parameters(), strict=True)
    call = lambda *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), x)  # noqa: E731
    return bool(torch.autograd.gradcheck(call, tuple(v.detach().double().requires_grad_() for v in values)))


def test_the_gradient_of_scaled_standardization() -> None:
    layer = nn.Linear(4, 3).double()
    weight_standardization(layer)
    assert gradient_is_right(layer, ROWS.double())
