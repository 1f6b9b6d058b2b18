from __future__ import annotations

import pytest
import torch
from tests.helpers.configs import requested
from torch import nn

from backforward import Backforward, Switch
from backforward_suite.build import REHEARSED, Parts

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
