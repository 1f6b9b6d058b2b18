from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.settings import MakeSetting
from tests.oracles.naive_rules import backforward_batch, sgd_loop
from torch import nn

from backforward.models import MLP, NIN
from backforward.rules import Backforward, Backprop
from backforward_suite.errors import BadInput
from backforward_suite.studies import OneStep, one_step
from backforward_suite.studies.one_step import draw_seed

RULES: dict[str, Any] = {
    "sgd": Backprop,
    "sgd_repeat": partial(Backprop, repeats=2),
    "bfp": Backforward,
    "bfp_poster": partial(Backforward, joint_pass=True),
}


def by_hand(method: str, network: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> float:
    """One batch of each method, written out; returns the loss before."""
    if method.startswith("sgd"):
        return sgd_loop(network, optimizer, F.cross_entropy, [(x, y)] * (1 + method.endswith("repeat")))[0]
    layers = [["model.hidden1.linear.weight", "model.hidden1.linear.bias"], ["model.head.weight", "model.head.bias"]]
    before = backforward_batch(network, optimizer, F.cross_entropy, x, y, layers, {"data_norm": 0})
    if method == "bfp_poster":
        sgd_loop(network, optimizer, F.cross_entropy, [(x, y)])
    return before.item()


@pytest.mark.parametrize("method", RULES)
def test_each_draw_is_a_fresh_network_and_one_step(method: str, make_setting: MakeSetting) -> None:
    """Also with an optimizer that remembers: no draw knows of the one before."""
    setting = make_setting(RULES[method], partial(torch.optim.SGD, lr=0.5, momentum=0.9))
    _, rows = OneStep(draws=4, images=3, widths=[5, 9])(setting)
    assert [(row["width"], row["draw"]) for row in rows] == [(w, d) for w in (5, 9) for d in range(4)]
    seen = []
    for row in rows:
        width, draw = int(row["width"] or 0), int(row["draw"] or 0)
        chosen = one_step.chosen_images(setting, draw, 3)
        assert len(set(chosen.tolist())) == 3
        seen.append(tuple(chosen.tolist()))
        x, y = setting.batch(setting.data.train.take(chosen))
        network = setting.make_network(draw_seed(0, draw), hidden=width)
        before = by_hand(method, network, setting.make_optimizer(network), x, y)
        logits = network(x)
        assert row["loss_before"] == before
        assert row["loss_after"] == F.cross_entropy(logits, y).item()
        assert row["accuracy_after"] == pytest.approx((logits.argmax(1) == y).double().mean().item())
    assert seen[:4] == seen[4:]  # every width sees the same images
    assert len(set(seen)) == 4


def test_methods_start_from_the_same_draws_and_seeds_from_others(make_setting: MakeSetting) -> None:
    study = OneStep(draws=3, widths=[6])
    before = {
        (method, seed): [row["loss_before"] for row in study(make_setting(RULES[method], seed=seed)).rows]
        for method in RULES
        for seed in (0, 1)
    }
    for seed in (0, 1):
        assert all(before[method, seed] == before["sgd", seed] for method in RULES)
    assert not set(before["sgd", 0]) & set(before["sgd", 1])


def test_a_step_of_length_zero_learns_nothing(make_setting: MakeSetting) -> None:
    final, rows = OneStep(draws=3, widths=[6])(make_setting(optimizer=partial(torch.optim.SGD, lr=0.0)))
    assert all(row["loss_after"] == row["loss_before"] for row in rows)
    assert final["loss_after/q50/6"] == final["loss_before/q50/6"]


def test_headlines_rank_what_is_not_finite_last(make_setting: MakeSetting) -> None:
    after = [0.0, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, math.inf, math.nan, math.inf]
    rows = [{"loss_before": 2.5, "loss_after": loss, "accuracy_after": 0.5} for loss in after]
    final = one_step.summary(rows, 7)
    assert final == {
        "loss_before/q50/7": 2.5,
        "loss_after/q10/7": 0.2,
        "loss_after/q25/7": 0.4,
        "loss_after/q50/7": 7.0,
        "loss_after/q75/7": 10.0,
        "loss_after/q90/7": math.inf,
        "accuracy_after/7": 0.5,
    }


def test_double_precision_agrees_with_single(make_setting: MakeSetting) -> None:
    study = OneStep(draws=2, widths=[6])
    single, double = (study(make_setting(dtype=dtype)).rows for dtype in (torch.float32, torch.float64))
    for one, two in zip(single, double, strict=True):
        assert one["loss_after"] == pytest.approx(two["loss_after"], rel=1e-4)
        assert one["loss_after"] != two["loss_after"]


def test_bad_settings_are_refused(make_setting: MakeSetting) -> None:
    with pytest.raises(BadInput, match=r"study.images=2000: there are 1297 training images"):
        OneStep(images=2000)(make_setting())
    with pytest.raises(BadInput, match=r"this network has none; give model=mlp"):
        OneStep()(make_setting(model=NIN))
    for arguments in ({"draws": 0}, {"images": 1.5}, {"widths": [4, -1]}, {"widths": []}):
        with pytest.raises(ValueError, match=f"study.{next(iter(arguments))}"):
            OneStep(**arguments)  # type: ignore[arg-type]


def test_it_leaves_the_global_generator_alone(make_setting: MakeSetting) -> None:
    state = torch.get_rng_state()
    OneStep(draws=1, widths=[4])(make_setting(model=MLP))
    assert torch.equal(torch.get_rng_state(), state)
