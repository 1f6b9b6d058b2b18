from __future__ import annotations

import pytest
import torch
from tests.helpers.configs import requested
from torch import nn
from torch.nn.utils import parametrize

from backforward import Backforward, Switch
from backforward.models.norms import NoisyBatchNorm, ScaledStandardization
from backforward_suite.build import REHEARSED, Parts
from backforward_suite.errors import BadInput

DIGITS = ("data=digits", "model.hidden=8")


def parts(*overrides: str) -> Parts:
    return Parts(requested(*DIGITS, *overrides))


def test_a_network_is_its_data_norm_and_its_model() -> None:
    built = parts("data_norm=global")
    one, same, other = built.network(3), built.network(3), built.network(4)
    assert [name for name, _ in one.named_children()] == ["data_norm", "model"]
    assert torch.equal(one.model.head.weight, same.model.head.weight)  # type: ignore[union-attr]
    assert not torch.equal(one.model.head.weight, other.model.head.weight)  # type: ignore[union-attr]
    assert one.data_norm is not same.data_norm  # each network moves its own running values
    images, labels = built.few()
    assert images.shape == (REHEARSED, 1, 8, 8)
    assert 0 <= images.min() <= images.max() <= 1
    assert one(images).shape == (REHEARSED, 10)
    assert len(labels) == REHEARSED


def test_an_argument_of_the_model_can_be_changed() -> None:
    assert parts().network(0, hidden=5).model.head.in_features == 5  # type: ignore[union-attr]


@pytest.mark.parametrize(("overrides", "decays"), [((), [0.0]), (("weight_decay=0.01",), [0.01, 0.0])])
def test_only_weights_decay(overrides: tuple[str, ...], decays: list[float]) -> None:
    built = parts(*overrides)
    optimizer = built.optimizer(built.network(0))
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays


def test_a_rule_gets_its_settings() -> None:
    built = parts("method=bfp", "method.groups=2", "max_grad_norm=3.5")
    network = built.network(0)
    rule = built.rule(network, built.optimizer(network), nn.functional.cross_entropy)
    assert isinstance(rule, Backforward)
    assert rule.max_grad_norm == 3.5
    rule.prepare(built.few()[0])
    assert len(rule.groups) == 2


def test_a_switch_is_made_of_two_rules() -> None:
    built = parts("method=bfp_warmup")
    network = built.network(0)
    assert isinstance(built.rule(network, built.optimizer(network), nn.functional.cross_entropy), Switch)


@pytest.mark.parametrize(("norm", "projects"), [("none", False), ("batch", False), ("prop", True)])
def test_only_normprop_is_projected(norm: str, projects: bool) -> None:
    built = parts(f"norm={norm}")
    network = built.network(0)
    projection = built.projection(network)
    assert (projection is not None) == projects
    if projects:
        weight = next(p for p in network.model.parameters() if p.ndim == 2)
        with torch.no_grad():
            weight.mul_(3)
            projection([weight])
        assert torch.allclose(weight.norm(dim=1), torch.ones(len(weight)))


@pytest.mark.parametrize("method", ["sgd", "bfp"])
@pytest.mark.parametrize("decay", ["weight_decay=0", "weight_decay=0.01"])
def test_the_head_has_its_own_learning_rate(method: str, decay: str) -> None:
    """And weight decay is as without it."""
    built = parts(f"method={method}", "model.depth=2", "lr=0.2", "head_lr=0.7", decay, "schedule=halve")
    network = built.network(0)
    groups = built.optimizer(network).param_groups
    head = set(network.model.head.parameters())  # type: ignore[union-attr, operator]
    for group in groups:
        assert group["lr"] == (0.7 if head & set(group["params"]) else 0.2)
        assert not head & set(group["params"]) or set(group["params"]) <= head
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    if decay == "weight_decay=0.01":
        assert all((group["weight_decay"] == 0.01) == all(p.ndim > 1 for p in group["params"]) for group in groups)


NORMS = {
    "layer": nn.LayerNorm,
    "group": nn.GroupNorm,
    "noisy_batch": NoisyBatchNorm,
    "batch": nn.BatchNorm1d,
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_of_the_config_reaches_the_network(norm: str) -> None:
    model = parts(f"norm={norm}", "model.depth=2").network(0).model
    found = [type(module) for module in model.modules() if isinstance(module, NORMS[norm])]  # type: ignore[union-attr]
    assert len(found) == 2


def test_norms_that_change_the_weight_or_the_activation_reach_the_network() -> None:
    model = parts("norm=weight_standardization", "model.activation=tanh").network(0).get_submodule("model")
    (made,) = (module for module in model.modules() if isinstance(module, ScaledStandardization))
    assert made.gamma == pytest.approx(1 / 0.6279, rel=1e-3)
    assert any(isinstance(m, parametrize.ParametrizationList) for m in parts("norm=weight").network(0).modules())
    selu = parts("norm=selu").network(0)
    assert any(isinstance(module, nn.SELU) for module in selu.modules())
    assert not selu.get_submodule("model.hidden1.linear").bias.any()  # type: ignore[union-attr, operator]


def test_a_norm_of_ones_own_is_a_config() -> None:
    """With no line of ours changed: a target, and a name to tell its runs by."""
    built = parts("norm.kind=mine", "+norm._target_=torch.nn.Identity")
    assert any(isinstance(module, nn.Identity) for module in built.network(0).modules())
    batch = ("norm.kind=mine", "+norm._target_=backforward.models.norms.of_features")
    built = parts(*batch, "+norm.make={_target_: torch.nn.BatchNorm1d, _partial_: true, momentum: 0.5}")
    (norm,) = (module for module in built.network(0).modules() if isinstance(module, nn.BatchNorm1d))
    assert norm.momentum == 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("norm=batch", "~model.norm"), "norm=batch does not reach the model: backforward.models.MLP is not given"),
        (("norm=layer", "model.norm=batch"), "norm=layer does not reach the model"),
        (("norm.kind=mine",), "norm.kind=mine: input should be 'none', 'batch' or 'prop', or norm._target_ a function"),
        (("norm=noisy_batch", "batch_size=1"), "norm=noisy_batch needs at least two samples per batch"),
    ],
)
def test_a_norm_that_reaches_no_layer_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        requested(*DIGITS, *overrides)
    assert str(caught.value).startswith(message)
