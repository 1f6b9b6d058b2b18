"""The shift measures against slow oracles, and against the values known for some rules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracles import shift as oracle
from torch import Tensor, nn

from backforward import shift
from backforward.models import MLP, Residual
from backforward.normprop import unit_norm_projection
from backforward.rules import Backforward, Backprop
from backforward.shift import Watch


def batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.rand(samples, 1, 3, 4, generator=random), torch.arange(samples) % 5


def mlp(norm: str, dropout: float = 0.0) -> nn.Module:
    return MLP((1, 3, 4), 5, hidden=6, depth=2, norm=norm, dropout=dropout, seed=3)


# By method: the rule, and the number of optimizer steps in each update of a batch.
METHODS: dict[str, tuple[Callable[..., Any], list[int]]] = {
    "sgd": (Backprop, [1]),
    "sgd_repeat": (lambda *a, **k: Backprop(*a, repeats=2, **k), [1, 1]),
    "bfp": (Backforward, [3]),
    "bfp_poster": (lambda *a, **k: Backforward(*a, joint_pass=True, **k), [3, 3]),
    "two groups": (lambda *a, **k: Backforward(*a, groups=2, **k), [2]),
    "stale": (oracle.StaleBackforward, [3]),
}
NORMS = ("none", "batch", "prop")


class Measured:
    """The updates of one batch, from Watch and from the oracle, after some batches that built up momentum."""

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
def test_covariate_shift_equals_the_oracle(method: str, norm: str) -> None:
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
def test_covariate_shift_has_its_known_values(method: str, norm: str) -> None:
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
                assert stepped == higher  # it steps along the gradient before the update


def test_layers_within_a_group_have_applied_shift() -> None:
    (first, second, third), *_ = Measured("two groups", "none").shifts
    assert [s.applied is not None and bool(s.applied.distance == 0) for s in (first, second, third)].count(False) == 1


@pytest.mark.filterwarnings("ignore:Backprop. no optimizer has")
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


def test_averages_gradients_as_the_rule_does() -> None:
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


def test_layers_are_in_forward_order_with_their_norms() -> None:
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
