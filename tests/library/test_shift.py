"""Every measure against one written the slow way, and what covariate shift must be for rules that are known."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from tests.oracles import shift as oracle
from tests.oracles.normprop import literal
from torch import Tensor, nn

from backforward import shift
from backforward.models import MLP, NIN, Residual
from backforward.normprop import unit_norm_projection
from backforward.rules import Backforward, Backprop
from backforward.shift import Watch


def batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.rand(samples, 1, 3, 4, generator=random), torch.arange(samples) % 5


def mlp(norm: str, dropout: float = 0.0) -> nn.Module:
    return MLP((1, 3, 4), 5, hidden=6, depth=2, norm=norm, dropout=dropout, seed=3)


# By method: the rule, and how many optimizer steps make each update of a batch.
METHODS: dict[str, tuple[Callable[..., Any], list[int]]] = {
    "sgd": (Backprop, [1]),
    "sgd_repeat": (lambda *a, **k: Backprop(*a, repeats=2, **k), [1, 1]),
    "bfp": (Backforward, [3]),
    "bfp_poster": (lambda *a, **k: Backforward(*a, joint_pass=True, **k), [3, 1]),
    "two groups": (lambda *a, **k: Backforward(*a, groups=2, **k), [2]),
    "stale": (oracle.StaleBackforward, [3]),
}
NORMS = ("none", "batch", "prop")


class Measured:
    """One batch of a rule after some that gave it momentum: its updates, as seen by Watch and by the oracle."""

    def __init__(self, method: str, norm: str, dropout: float = 0.2, clip: float | None = None) -> None:
        torch.manual_seed(5)
        self.network = network = mlp(norm, dropout)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        project = unit_norm_projection(network) if norm == "prop" else None
        recorder = oracle.Recorder(network, optimizer, project)
        self.watch = watch = Watch(network)

        def after_update(parameters: list[nn.Parameter]) -> None:
            recorder.after_update(parameters)
            watch.observe(parameters)

        build, lengths = METHODS[method]
        rule = build(
            network, optimizer, F.cross_entropy, step=recorder.step, after_update=after_update, max_grad_norm=clip
        )
        x, y = batch()
        for _ in range(3):
            rule.step(x, y)
        recorder.steps.clear()
        self.before = copy.deepcopy(network)
        start = torch.get_rng_state()
        watch.begin()
        rule.step(x, y)
        self.updates = watch.end()
        self.recorded = recorder.updates(lengths) if method != "stale" or norm != "batch" else recorder.updates([5])

        def loss(net: nn.Module) -> Tensor:
            torch.set_rng_state(start)
            return F.cross_entropy(net(x), y)

        def loss_on_replica(replica: nn.Module) -> Tensor:
            watch.as_before()
            return F.cross_entropy(replica(x), y)

        self.layers = shift.layers(watch.replica, x)
        self.shifts = [shift.covariate_shift(watch.replica, self.layers, u, loss_on_replica) for u in self.updates]
        names = {id(p): name for name, p in watch.replica.named_parameters()}
        groups = [[names[id(p)] for p in layer.parameters] for layer in self.layers]
        self.slow = [oracle.covariate_shift(*recorded, groups, loss) for recorded in self.recorded]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_covariate_shift_is_what_copies_of_the_network_give(method: str, norm: str) -> None:
    seen = Measured(method, norm)
    assert len(seen.shifts) == len(seen.slow)
    for fast, slow in zip(seen.shifts, seen.slow, strict=True):
        assert [layer for layer, _, _ in fast] == [group.name for group in seen.layers]
        for (_, induced, applied), expected in zip(fast, slow, strict=True):
            assert applied is not None
            for ours, theirs in zip((induced, applied), expected, strict=True):
                assert [value.item() for value in ours] == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_known_beforehand(method: str, norm: str) -> None:
    for fast in Measured(method, norm).shifts:
        (_, induced, applied), *above = fast
        assert applied is not None
        assert induced.distance == 0  # nothing lies below the first layer
        assert applied.distance == 0
        for _, higher, stepped in above:
            assert stepped is not None
            assert higher.relative > 1e-3
            if method == "bfp":
                assert stepped.distance == 0
                assert stepped.cosine == pytest.approx(1)
            elif method in ("sgd", "sgd_repeat", "stale"):
                assert stepped == higher  # it steps along the gradient from before


def test_groups_of_several_layers_are_stale_within() -> None:
    (first, second, third), *_ = Measured("two groups", "none").shifts
    assert [s.applied is not None and bool(s.applied.distance == 0) for s in (first, second, third)].count(False) == 1


def test_a_layer_that_an_update_leaves_out_has_no_applied_shift() -> None:
    network = mlp("none")
    watch = Watch(network)
    optimizer = torch.optim.SGD(network[1].parameters(), lr=0.1)
    rule = Backprop(network, optimizer, F.cross_entropy, after_update=watch.observe)
    x, y = batch()
    watch.begin()
    rule.step(x, y)
    (update,) = watch.end()
    found = shift.covariate_shift(
        watch.replica, shift.layers(watch.replica, x), update, lambda net: F.cross_entropy(net(x), y)
    )
    assert [layer.applied is None for layer in found] == [False, True, True]
    assert found[1].induced.distance > 0


def test_gradients_are_averaged_as_the_rule_averages_them() -> None:
    seen = Measured("sgd", "none", dropout=0)
    x, y = batch()
    doubled = shift.covariate_shift(
        seen.watch.replica, seen.layers, seen.updates[0], lambda net: F.cross_entropy(net(x), y), lambda flat: 2 * flat
    )
    for once, twice in zip(seen.shifts[0], doubled, strict=True):
        assert twice.induced.distance == pytest.approx(2 * once.induced.distance.item())


@pytest.mark.parametrize("norm", NORMS)
def test_watching_leaves_no_trace(norm: str) -> None:
    x, y = batch()

    def trained(watched: bool) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(5)
        network = mlp(norm, dropout=0.5)
        watch = Watch(network)
        optimizer = torch.optim.Adam(network.parameters())
        rule = Backforward(network, optimizer, F.cross_entropy, after_update=watch.observe)

        def loss(replica: nn.Module) -> Tensor:
            watch.as_before()
            return F.cross_entropy(replica(x), y)

        for _ in range(3):
            if watched:
                watch.begin()
            rule.step(x, y)
            if watched:
                with shift.undisturbed(network):
                    shift.covariate_shift(watch.replica, shift.layers(watch.replica, x), watch.end()[0], loss)
            assert all(p.grad is None for p in network.parameters())
        return network.state_dict(), torch.get_rng_state()

    (one, one_draws), (other, other_draws) = trained(True), trained(False)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(one_draws, other_draws)


# --- layers, blocks --------------------------------------------------------------------------------------------------


def test_layers_come_in_forward_order_with_their_norms() -> None:
    found = shift.layers(mlp("batch"), batch()[0])
    assert [layer.name for layer in found] == ["hidden1.linear", "hidden2.linear", "head"]
    assert [len(layer.parameters) for layer in found] == [3, 3, 2]


def test_a_block_is_a_layer_with_its_norm_and_activation() -> None:
    names = [layer.name for layer in shift.layers(mlp("batch"), batch()[0])]
    assert [shift.block_name(name, names) for name in names] == ["hidden1", "hidden2", "head"]
    network = Residual((1, 8, 8), 3, depth=8, width=0.25, seed=0)
    names = [layer.name for layer in shift.layers(network, torch.rand(2, 1, 8, 8))]
    blocks = [shift.block_name(name, names) for name in names]
    assert blocks[:3] == ["conv1", "block1_1.conv1", "block1_1.conv2"]
    assert len(set(blocks)) == len(names)


# --- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "nin"])
def test_input_moments_are_those_of_all_values_together(network: str) -> None:
    if network == "mlp":
        net, x = mlp("none"), batch(10)[0]
    else:
        net, x = NIN((1, 17, 17), 3, width=0.03, seed=0), torch.rand(10, 1, 17, 17)
    net.eval()
    names = [layer.name for layer in shift.layers(net, x)]
    moments, values = shift.input_moments(net, names, x.split(4))
    assert list(moments) == names
    for name in names:
        mean, std = oracle.input_moments(net, name, x)
        assert moments[name].mean.tolist() == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert moments[name].std.tolist() == pytest.approx(std, rel=1e-4, abs=1e-6)
        assert values[name].shape[-1] == len(mean)
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_moments_of_a_unit_that_never_changes_are_exact(dtype: torch.dtype) -> None:
    moments = shift.RunningMoments()
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
    ours = shift.drift(shift.UnitMoments(a, s), shift.UnitMoments(b, t))
    assert ours.item() == pytest.approx(by_quantiles.mean().sqrt().item(), rel=1e-3)
    assert shift.drift(shift.UnitMoments(a, s), shift.UnitMoments(a, s)) == 0


@pytest.mark.parametrize("norm", NORMS)
def test_pre_activations_are_what_the_activation_is_applied_to(norm: str) -> None:
    net = mlp(norm).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.rand(p.shape, generator=torch.Generator().manual_seed(0)))  # gamma is not 1, beta not 0
    x = batch(10)[0]
    found = shift.pre_activations(net, ["hidden1.linear", "head"], x.split(4), 1)
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
def test_pre_activations_of_a_convolution_are_those_of_some_positions(norm: str) -> None:
    net = NIN((1, 17, 17), 3, width=0.02, norm=norm, seed=0).eval()
    x = torch.rand(3, 1, 17, 17, generator=torch.Generator().manual_seed(0))
    (everywhere,) = shift.pre_activations(net, ["conv1.conv"], [x], 1000).values()
    assert everywhere.shape == (3 * 17 * 17, 4)
    with torch.no_grad():
        seen = net.conv1.conv.pre_activation(x) if norm == "prop" else net.conv1.conv(x)  # type: ignore[union-attr]
    assert torch.equal(everywhere.sort(dim=0).values, seen.movedim(1, -1).flatten(0, 2).sort(dim=0).values)
    (some,) = shift.pre_activations(net, ["conv1.conv"], [x], 10).values()
    assert some.shape == (30, 4)
    rows = {tuple(row) for row in everywhere.tolist()}
    assert all(tuple(row) in rows for row in some.tolist())  # the values of one position stay together
    assert torch.equal(some, shift.pre_activations(net, ["conv1.conv"], [x], 10)["conv1.conv"])


LAWS = {
    "normal": stats.norm(),
    "uniform": stats.uniform(),
    "skewed": stats.lognorm(0.7),
    "heavy tails": stats.t(5),
    "ties": stats.binom(3, 0.3),
}


@pytest.mark.parametrize("law", LAWS)
def test_gaussianity_is_what_scipy_gives(law: str) -> None:
    draws = LAWS[law].rvs(size=(300, 70), random_state=np.random.default_rng(0))  # more units than go at a time
    values = 3 + 0.2 * draws
    ours = shift.gaussianity(torch.from_numpy(values))
    np.testing.assert_allclose(ours.skewness, stats.skew(values), atol=1e-10)
    np.testing.assert_allclose(ours.kurtosis, stats.kurtosis(values), atol=1e-10)
    fitted = [stats.kstest(unit, "norm", (unit.mean(), unit.std())).statistic for unit in values.T]
    np.testing.assert_allclose(ours.distance, fitted, atol=1e-12)


def test_gaussianity_knows_a_normal_distribution() -> None:
    values = torch.randn(10_000, 100, generator=torch.Generator().manual_seed(0))
    skewness, kurtosis, distance = shift.gaussianity(5 * values - 3)
    assert skewness.abs().mean() < 0.03
    assert kurtosis.abs().mean() < 0.06
    assert distance.mean().item() == pytest.approx(0.63 / 100, rel=0.05)
    assert shift.gaussianity(values.relu()).distance.mean() > 0.25


def test_a_unit_that_never_changes_is_neither_normal_nor_not() -> None:
    values = torch.full((1000, 2), 0.1)
    values[0, 1] = 0.2
    found = shift.gaussianity(values)
    assert [bool(value.isnan()) for value in found.distance] == [True, False]
    assert found.skewness.isnan().tolist() == [True, False]
    assert found.kurtosis.isnan().tolist() == [True, False]


# --- Jacobians -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_jacobian_of_a_linear_block(norm: str) -> None:
    block = mlp(norm).hidden1.double().eval()  # type: ignore[union-attr,operator]
    x = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = shift.layer_jacobian(block, x)
    torch.testing.assert_close(ours, oracle.finite_difference_jacobian(block, x), atol=1e-7, rtol=1e-6)
    full = torch.autograd.functional.jacobian(lambda v: block(v[None])[0], x)
    torch.testing.assert_close(ours, full, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_jacobian_of_a_convolution_at_its_middle(norm: str) -> None:
    block = NIN((2, 17, 17), 3, width=0.02, norm=norm, seed=0).conv1.double().eval()  # type: ignore[union-attr,operator]
    x = torch.randn(2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = torch.autograd.functional.jacobian(lambda v: block(v[None])[0, :, 3, 3], x).flatten(1)
    ours = shift.layer_jacobian(block, x)
    assert ours.shape == (4, 2 * 5 * 5)  # the receptive field alone
    torch.testing.assert_close(ours, full[:, full.any(dim=0)], atol=1e-12, rtol=1e-10)
    spectrum = shift.spectrum(ours)
    torch.testing.assert_close(spectrum.singular, torch.linalg.svdvals(full)[:4], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(spectrum.diagonal, (full @ full.T).diagonal(), atol=1e-12, rtol=1e-10)


def test_a_spectrum_that_is_not_finite_is_nan() -> None:
    assert shift.spectrum(torch.tensor([[1.0, torch.inf], [0.0, 1.0]])).singular.isnan().all()


# --- Proposition 1 ---------------------------------------------------------------------------------------------------

W = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
ORTHONORMAL = torch.linalg.qr(W.T).Q.T
EQUIANGULAR = torch.eye(4, dtype=torch.float64) + 0.3


def test_cosines_of_pairs_are_what_loops_give() -> None:
    weight = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    rows = weight.flatten(1)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    expected = [0.0 if 3 in pair else abs(torch.cosine_similarity(*rows[list(pair)], dim=0).item()) for pair in pairs]
    assert shift.cosines_of_pairs(weight).tolist() == pytest.approx(expected, rel=1e-5)
    assert shift.cosines_of_pairs(weight).max().item() == pytest.approx(shift.incoherence(weight).coherence.item())


@pytest.mark.parametrize("weight", [W, 0.1 * W, ORTHONORMAL, 2 * ORTHONORMAL, 0.5 * ORTHONORMAL, EQUIANGULAR])
def test_incoherence_is_what_loops_give(weight: Tensor) -> None:
    ours = [value.item() for value in shift.incoherence(weight)]
    assert ours == pytest.approx(oracle.incoherence(weight.tolist()), rel=1e-9, abs=1e-7, nan_ok=True)


def test_the_distance_is_that_of_a_covariance_on_white_input() -> None:
    x = torch.randn(400_000, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.cov((x @ W.T).T)
    distance = (sigma - torch.diag(W.square().sum(dim=1))).norm()
    assert shift.incoherence(W).distance.item() == pytest.approx(distance.item(), rel=0.01)


def test_the_mended_bound_holds_and_the_printed_one_does_not() -> None:
    for seed in range(200):
        weight = torch.randn(2 + seed % 6, 8, generator=torch.Generator().manual_seed(seed)) * (0.1 + seed % 7)
        found = shift.incoherence(weight)
        assert found.distance <= found.mended * (1 + 1e-12)
    tight = shift.incoherence(EQUIANGULAR)
    assert tight.distance.item() == pytest.approx(tight.mended.item())
    assert shift.incoherence(2 * ORTHONORMAL).printed.isnan()  # the root of a negative number
    assert shift.incoherence(0.5 * ORTHONORMAL).printed > 0.9  # of a distance of 0
    exceeded = shift.incoherence(math.sqrt(2) * torch.tensor([[1.0, 0.0], [0.6, 0.8]]))  # long, a little coherent
    assert exceeded.distance > exceeded.printed
    assert exceeded.distance <= exceeded.mended * (1 + 1e-6)


def test_a_row_of_zeros_is_coherent_with_none() -> None:
    found = shift.incoherence(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert [value.item() for value in found] == [0, 0, 0, 0]


# --- sharpness -------------------------------------------------------------------------------------------------------


def curved(norm: str) -> tuple[nn.Module, Callable[[int, int], Callable[[nn.Module], Tensor]]]:
    """A small network, and its loss on some of eight images as a share of the mean over all."""
    x, y = batch()

    def part(start: int, stop: int) -> Callable[[nn.Module], Tensor]:
        return lambda net: F.cross_entropy(net(x[start:stop].double()), y[start:stop], reduction="sum") / len(y)

    return mlp(norm).double().eval(), part


@pytest.mark.parametrize("norm", NORMS)
def test_sharpness_is_the_largest_eigenvalue_of_the_whole_hessian(norm: str) -> None:
    net, part = curved(norm)
    eigenvalues = torch.linalg.eigvalsh(oracle.hessian(net, part(0, 8)))
    ours = shift.sharpness(net, [part(0, 8)], products=40)
    assert ours.item() == pytest.approx(eigenvalues[-1].item(), rel=1e-8)
    assert shift.sharpness(net, [part(0, 8)]).item() == pytest.approx(eigenvalues[-1].item(), rel=0.02)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_sharpness_of_a_loss_in_parts_is_that_of_the_whole(norm: str) -> None:
    net, part = curved(norm)
    whole = shift.sharpness(net, [part(0, 8)])
    parts = shift.sharpness(net, [part(0, 3), part(3, 6), part(6, 8)])
    assert parts.item() == pytest.approx(whole.item(), rel=1e-9)


def test_sharpness_where_the_largest_eigenvalue_in_modulus_is_negative() -> None:
    net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    curvature = torch.tensor([-5.0, 2.0, 1.0], dtype=torch.float64)
    ours = shift.sharpness(net, [lambda n: (n.weight[0] ** 2 @ curvature) / 2])
    assert ours.item() == pytest.approx(2)


def test_sharpness_of_a_loss_without_curvature_and_of_one_that_is_not_finite() -> None:
    net = nn.Linear(3, 1, bias=False)
    assert shift.sharpness(net, [lambda n: n.weight.sum() + 0 * n.weight.square().sum()]) == 0
    assert shift.sharpness(net, [lambda n: torch.inf * n.weight.square().sum()]).isnan()


@pytest.mark.parametrize("norm", NORMS)
def test_hessians_are_symmetric(norm: str) -> None:
    """Also through convolutions, whose gradients come in other strides than their weights."""
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
        shift.graph_bytes(net, lambda n, k=k: F.cross_entropy(n(x[:k]), torch.zeros(k, dtype=torch.long)))
        for k in (2, 4, 6)
    )
    assert one > 2 * 17 * 17 * 4 * sum(m.out_channels for m in (net.conv1.conv, net.conv2.conv))  # type: ignore[union-attr]
    assert three - two == pytest.approx(two - one, rel=0.02)
