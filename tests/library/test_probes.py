"""The measures of a network at one moment against slow oracles."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from tests.oracles import shift as oracle
from tests.oracles.normprop import literal
from torch import Tensor, nn

from backforward import probes, shift
from backforward.models import MLP, NIN

NORMS = ("none", "batch", "prop")


def batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.rand(samples, 1, 3, 4, generator=random), torch.arange(samples) % 5


def mlp(norm: str, dropout: float = 0.0) -> nn.Module:
    return MLP((1, 3, 4), 5, hidden=6, depth=2, norm=norm, dropout=dropout, seed=3)


# --- Distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "nin"])
def test_input_moments_equal_those_of_all_values_at_once(network: str) -> None:
    if network == "mlp":
        net, x = mlp("none"), batch(10)[0]
    else:
        net, x = NIN((1, 17, 17), 3, width=0.03, seed=0), torch.rand(10, 1, 17, 17)
    net.eval()
    names = [layer.name for layer in shift.layers(net, x)]
    moments, values = probes.input_moments(net, names, x.split(4))
    assert list(moments) == names
    for name in names:
        mean, std = oracle.input_moments(net, name, x)
        assert moments[name].mean.tolist() == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert moments[name].std.tolist() == pytest.approx(std, rel=1e-4, abs=1e-6)
        assert values[name].shape[-1] == len(mean)
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_moments_of_a_constant_unit_are_exact(dtype: torch.dtype) -> None:
    moments = probes.RunningMoments()
    values = torch.tensor([-0.4249, 1e4, 0.1], dtype=dtype).view(1, 3, 1).repeat(301, 1, 7)
    for part in values.split(50):
        moments.add(part, 1)
    assert moments.result().mean.tolist() == values[0, :, 0].tolist()
    assert moments.result().std.tolist() == [0, 0, 0]


def test_drift_is_the_distance_between_normals() -> None:
    """The 2-Wasserstein distance in one dimension is the L2 distance of the quantile functions."""
    a, s, b, t = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.5, 0.1])
    p = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    z = math.sqrt(2) * torch.erfinv(2 * p - 1)
    by_quantiles = torch.stack([((a[i] + s[i] * z) - (b[i] + t[i] * z)).square().mean() for i in range(2)])
    ours = probes.drift(probes.UnitMoments(a, s), probes.UnitMoments(b, t))
    assert ours.item() == pytest.approx(by_quantiles.mean().sqrt().item(), rel=1e-3)
    assert probes.drift(probes.UnitMoments(a, s), probes.UnitMoments(a, s)) == 0


@pytest.mark.parametrize("norm", NORMS)
def test_pre_activations_are_the_arguments_of_the_activation(norm: str) -> None:
    net = mlp(norm).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.rand(p.shape, generator=torch.Generator().manual_seed(0)))  # gamma != 1, beta != 0
    x = batch(10)[0]
    found = probes.pre_activations(net, ["hidden1.linear", "head"], x.split(4), 1)
    hidden = net.hidden1.linear  # type: ignore[union-attr]
    flat = x.flatten(1)
    with torch.no_grad():
        if norm == "prop":
            mean, std, _ = hidden.moments()
            expected = literal(hidden, flat, lambda u: u) * std + mean  # the formula without its activation
        else:
            expected = F.linear(flat, hidden.weight, hidden.bias)
        torch.testing.assert_close(found["hidden1.linear"], expected)
        torch.testing.assert_close(found["head"], net(x))
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("norm", NORMS)
def test_pre_activations_of_a_convolution_come_from_some_positions(norm: str) -> None:
    net = NIN((1, 17, 17), 3, width=0.02, norm=norm, seed=0).eval()
    x = torch.rand(3, 1, 17, 17, generator=torch.Generator().manual_seed(0))
    (everywhere,) = probes.pre_activations(net, ["conv1.conv"], [x], 1000).values()
    assert everywhere.shape == (3 * 17 * 17, 4)
    with torch.no_grad():
        seen = net.conv1.conv.pre_activation(x) if norm == "prop" else net.conv1.conv(x)  # type: ignore[union-attr]
    assert torch.equal(everywhere.sort(dim=0).values, seen.movedim(1, -1).flatten(0, 2).sort(dim=0).values)
    (some,) = probes.pre_activations(net, ["conv1.conv"], [x], 10).values()
    assert some.shape == (30, 4)
    rows = {tuple(row) for row in everywhere.tolist()}
    assert all(tuple(row) in rows for row in some.tolist())  # the values of one position stay together
    assert torch.equal(some, probes.pre_activations(net, ["conv1.conv"], [x], 10)["conv1.conv"])


LAWS = {
    "normal": stats.norm(),
    "uniform": stats.uniform(),
    "skewed": stats.lognorm(0.7),
    "heavy tails": stats.t(5),
    "ties": stats.binom(3, 0.3),
}


@pytest.mark.parametrize("law", LAWS)
def test_gaussianity_equals_scipys(law: str) -> None:
    draws = LAWS[law].rvs(size=(300, 70), random_state=np.random.default_rng(0))  # more than UNITS_AT_A_TIME units
    values = 3 + 0.2 * draws
    ours = probes.gaussianity(torch.from_numpy(values))
    np.testing.assert_allclose(ours.skewness, stats.skew(values), atol=1e-10)
    np.testing.assert_allclose(ours.kurtosis, stats.kurtosis(values), atol=1e-10)
    fitted = [stats.kstest(unit, "norm", (unit.mean(), unit.std())).statistic for unit in values.T]
    np.testing.assert_allclose(ours.distance, fitted, atol=1e-12)


def test_gaussianity_is_near_zero_for_normal_values() -> None:
    values = torch.randn(10_000, 100, generator=torch.Generator().manual_seed(0))
    skewness, kurtosis, distance = probes.gaussianity(5 * values - 3)
    assert skewness.abs().mean() < 0.03
    assert kurtosis.abs().mean() < 0.06
    assert distance.mean().item() == pytest.approx(0.63 / 100, rel=0.05)
    assert probes.gaussianity(values.relu()).distance.mean() > 0.25


def test_gaussianity_of_a_constant_unit_is_nan() -> None:
    values = torch.full((1000, 2), 0.1)
    values[0, 1] = 0.2
    found = probes.gaussianity(values)
    assert [bool(value.isnan()) for value in found.distance] == [True, False]
    assert found.skewness.isnan().tolist() == [True, False]
    assert found.kurtosis.isnan().tolist() == [True, False]


# --- Jacobians -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_jacobian_of_a_linear_block(norm: str) -> None:
    block = mlp(norm).hidden1.double().eval()  # type: ignore[union-attr,operator]
    x = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = probes.layer_jacobian(block, x)
    torch.testing.assert_close(ours, oracle.finite_difference_jacobian(block, x), atol=1e-7, rtol=1e-6)
    full = torch.autograd.functional.jacobian(lambda v: block(v[None])[0], x)
    torch.testing.assert_close(ours, full, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_jacobian_of_a_convolution_at_its_middle(norm: str) -> None:
    block = NIN((2, 17, 17), 3, width=0.02, norm=norm, seed=0).conv1.double().eval()  # type: ignore[union-attr,operator]
    x = torch.randn(2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = torch.autograd.functional.jacobian(lambda v: block(v[None])[0, :, 3, 3], x).flatten(1)
    ours = probes.layer_jacobian(block, x)
    assert ours.shape == (4, 2 * 5 * 5)  # the receptive field
    torch.testing.assert_close(ours, full[:, full.any(dim=0)], atol=1e-12, rtol=1e-10)
    spectrum = probes.spectrum(ours)
    torch.testing.assert_close(spectrum.singular, torch.linalg.svdvals(full)[:4], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(spectrum.diagonal, (full @ full.T).diagonal(), atol=1e-12, rtol=1e-10)


def test_a_spectrum_that_is_not_finite_is_nan() -> None:
    assert probes.spectrum(torch.tensor([[1.0, torch.inf], [0.0, 1.0]])).singular.isnan().all()


# --- Proposition 1 ---------------------------------------------------------------------------------------------------

W = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
ORTHONORMAL = torch.linalg.qr(W.T).Q.T
EQUIANGULAR = torch.eye(4, dtype=torch.float64) + 0.3


def test_cosines_of_pairs_equal_a_loop() -> None:
    weight = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    rows = weight.flatten(1)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    expected = [0.0 if 3 in pair else abs(torch.cosine_similarity(*rows[list(pair)], dim=0).item()) for pair in pairs]
    assert probes.cosines_of_pairs(weight).tolist() == pytest.approx(expected, rel=1e-5)
    assert probes.cosines_of_pairs(weight).max().item() == pytest.approx(probes.incoherence(weight).coherence.item())


@pytest.mark.parametrize("weight", [W, 0.1 * W, ORTHONORMAL, 2 * ORTHONORMAL, 0.5 * ORTHONORMAL, EQUIANGULAR])
def test_incoherence_equals_a_loop(weight: Tensor) -> None:
    ours = [value.item() for value in probes.incoherence(weight)]
    assert ours == pytest.approx(oracle.incoherence(weight.tolist()), rel=1e-9, abs=1e-7, nan_ok=True)


def test_the_distance_is_that_of_a_covariance_on_white_input() -> None:
    x = torch.randn(400_000, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.cov((x @ W.T).T)
    distance = (sigma - torch.diag(W.square().sum(dim=1))).norm()
    assert probes.incoherence(W).distance.item() == pytest.approx(distance.item(), rel=0.01)


def test_the_corrected_bound_holds_and_the_printed_one_does_not() -> None:
    for seed in range(200):
        weight = torch.randn(2 + seed % 6, 8, generator=torch.Generator().manual_seed(seed)) * (0.1 + seed % 7)
        found = probes.incoherence(weight)
        assert found.distance <= found.mended * (1 + 1e-12)
    tight = probes.incoherence(EQUIANGULAR)
    assert tight.distance.item() == pytest.approx(tight.mended.item())
    assert probes.incoherence(2 * ORTHONORMAL).printed.isnan()  # square root of a negative number
    assert probes.incoherence(0.5 * ORTHONORMAL).printed > 0.9  # although the distance is 0
    exceeded = probes.incoherence(math.sqrt(2) * torch.tensor([[1.0, 0.0], [0.6, 0.8]]))  # long, slightly coherent
    assert exceeded.distance > exceeded.printed
    assert exceeded.distance <= exceeded.mended * (1 + 1e-6)


def test_a_row_of_zeros_is_coherent_with_none() -> None:
    found = probes.incoherence(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert [value.item() for value in found] == [0, 0, 0, 0]


# --- Sharpness -------------------------------------------------------------------------------------------------------


def curved(norm: str) -> tuple[nn.Module, Callable[[int, int], Callable[[nn.Module], Tensor]]]:
    """Return a small network, and its loss on some of eight images as a share of the mean over all."""
    x, y = batch()

    def part(start: int, stop: int) -> Callable[[nn.Module], Tensor]:
        return lambda net: F.cross_entropy(net(x[start:stop].double()), y[start:stop], reduction="sum") / len(y)

    return mlp(norm).double().eval(), part


@pytest.mark.parametrize("norm", NORMS)
def test_sharpness_is_the_largest_eigenvalue_of_the_whole_hessian(norm: str) -> None:
    net, part = curved(norm)
    eigenvalues = torch.linalg.eigvalsh(oracle.hessian(net, part(0, 8)))
    ours = probes.sharpness(net, [part(0, 8)], products=40)
    assert ours.item() == pytest.approx(eigenvalues[-1].item(), rel=1e-8)
    assert probes.sharpness(net, [part(0, 8)]).item() == pytest.approx(eigenvalues[-1].item(), rel=0.02)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_sharpness_of_a_loss_in_parts_equals_that_of_the_whole(norm: str) -> None:
    net, part = curved(norm)
    whole = probes.sharpness(net, [part(0, 8)])
    parts = probes.sharpness(net, [part(0, 3), part(3, 6), part(6, 8)])
    assert parts.item() == pytest.approx(whole.item(), rel=1e-9)


def test_sharpness_where_the_largest_eigenvalue_in_modulus_is_negative() -> None:
    net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    curvature = torch.tensor([-5.0, 2.0, 1.0], dtype=torch.float64)
    ours = probes.sharpness(net, [lambda n: (n.weight[0] ** 2 @ curvature) / 2])
    assert ours.item() == pytest.approx(2)


def test_sharpness_of_a_loss_without_curvature_and_of_one_that_is_not_finite() -> None:
    net = nn.Linear(3, 1, bias=False)
    assert probes.sharpness(net, [lambda n: n.weight.sum() + 0 * n.weight.square().sum()]) == 0
    assert probes.sharpness(net, [lambda n: torch.inf * n.weight.square().sum()]).isnan()


@pytest.mark.parametrize("norm", NORMS)
def test_hessians_are_symmetric(norm: str) -> None:
    """A convolution's gradients have other strides than its weights."""
    net = NIN((1, 17, 17), 3, width=0.02, norm=norm, seed=0).double().eval()
    random = torch.Generator().manual_seed(0)
    x = torch.rand(4, 1, 17, 17, generator=random, dtype=torch.float64)
    slopes = torch.autograd.grad(
        F.cross_entropy(net(x), torch.arange(4) % 3), list(net.parameters()), create_graph=True
    )
    u, v = ([torch.randn(s.shape, generator=random, dtype=torch.float64) for s in slopes] for _ in range(2))

    def product(vector: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(slopes, list(net.parameters()), vector, retain_graph=True)

    left, right = (
        sum((a * b).sum().item() for a, b in zip(*pair, strict=True)) for pair in ((u, product(v)), (v, product(u)))
    )
    assert left == pytest.approx(right, rel=1e-8)


def test_the_graph_of_twice_the_images_holds_twice_as_much() -> None:
    net = NIN((1, 17, 17), 3, width=0.05, seed=0).eval()
    x = torch.rand(8, 1, 17, 17)
    one, two, three = (
        probes.graph_bytes(net, lambda n, k=k: F.cross_entropy(n(x[:k]), torch.zeros(k, dtype=torch.long)))
        for k in (2, 4, 6)
    )
    assert one > 2 * 17 * 17 * 4 * sum(m.out_channels for m in (net.conv1.conv, net.conv2.conv))  # type: ignore[union-attr]
    assert three - two == pytest.approx(two - one, rel=0.02)
