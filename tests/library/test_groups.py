"""Finding a network's layers in forward order, and grouping them."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from tests.helpers.problems import PROBLEMS, Problem
from torch import Tensor, nn

from backforward.batch import Inputs
from backforward.groups import check_spec, group_layers, refuse_scripted, survey

BY_ID = {problem.id: problem for problem in PROBLEMS}
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)


def inputs_of(problem: Problem) -> Any:
    return problem.batch()[0]


def groups_of(model: nn.Module, x: Any, spec: Any = "layer") -> dict[str, list[str]]:
    """Map each group's name to the names of its parameters."""
    check_spec(model, spec)
    trainable = [p for p in model.parameters() if p.requires_grad]
    watch = survey(model, Inputs.of(x), count=isinstance(spec, int))
    found = group_layers(model, trainable, watch.order.used, spec, watch.macs)
    names = {id(p): name for name, p in model.named_parameters()}
    return {group.name: [names[id(p)] for p in group.parameters] for group in found.groups}


@every_problem
def test_layers_are_found_in_forward_order_with_their_norms(problem: Problem) -> None:
    groups = groups_of(problem.model(), inputs_of(problem))
    assert list(groups) == list(problem.groups)
    assert {name: sorted(own) for name, own in groups.items()} == {n: sorted(own) for n, own in problem.groups.items()}


def test_multiply_accumulates_are_counted_by_layer() -> None:
    model = BY_ID["mlp"].model()
    assert survey(model, Inputs.of(inputs_of(BY_ID["mlp"])), count=True).macs == {
        "1": 6 * 5 * 6,
        "3": 6 * 6 * 6,
        "5": 6 * 6 * 4,
    }
    assert not any(survey(model, Inputs.of(inputs_of(BY_ID["mlp"]))).macs.values())


def _dear(costs: list[int]) -> nn.Sequential:
    """Return layers with these costs (inputs x outputs)."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(1, cost), _Sum()) for cost in costs))


class _Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)


@pytest.mark.parametrize("costs", [[1, 1, 1, 1], [5, 1, 1, 1, 5], [1, 2, 3, 4, 5, 6], [9, 1, 1], [2, 2, 7, 1, 3, 3]])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_integer_groups_minimise_the_largest_cost(costs: list[int], count: int) -> None:
    model = _dear(costs)
    groups = groups_of(model, torch.randn(2, 1), count)
    index = {f"{i}.0.weight": cost for i, cost in enumerate(costs)}
    ours = [sum(index.get(name, 0) for name in own) for own in groups.values()]
    assert sum(ours) == sum(costs)

    def prices(cuts: tuple[int, ...]) -> list[int]:
        return [sum(costs[i:j]) for i, j in pairwise((0, *cuts, len(costs)))]

    every = [prices(cuts) for cuts in combinations(range(1, len(costs)), count - 1)]
    assert len(ours) == count
    assert max(ours) == min(map(max, every))
    assert sum(p * p for p in ours) == min(sum(p * p for p in e) for e in every if max(e) == max(ours))


def test_as_many_groups_as_layers_equals_layer() -> None:
    problem = BY_ID["residual"]
    by_layer = groups_of(problem.model(), inputs_of(problem))
    assert groups_of(problem.model(), inputs_of(problem), len(by_layer)) == by_layer


def test_named_groups_include_their_norms_and_keep_their_order() -> None:
    problem = BY_ID["residual"]
    spec = [["head"], ["wider", "stem"], "same.conv2", ["same.conv1"]]
    groups = groups_of(problem.model(), inputs_of(problem), spec)
    assert list(groups) == ["head", "wider..stem", "same.conv2", "same.conv1"]
    assert groups["same.conv2"] == ["same.conv2.weight", "same.bn2.weight", "same.bn2.bias"]
    assert groups["wider..stem"][:3] == ["stem.weight", "stem_norm.weight", "stem_norm.bias"]
    apart = groups_of(problem.model(), inputs_of(problem), [["stem", "same", "wider"], ["head.weight"], ["head.bias"]])
    assert list(apart.values())[1:] == [["head.weight"], ["head.bias"]]


def test_a_network_that_is_one_layer() -> None:
    assert groups_of(nn.Linear(3, 2), (torch.randn(4, 3),)) == {"Linear": ["weight", "bias"]}
    assert groups_of(nn.LayerNorm(3), (torch.randn(4, 3),)) == {"LayerNorm": ["weight", "bias"]}


def test_the_norm_of_a_frozen_layer_is_a_group() -> None:
    model = BY_ID["batchnorm"].model()
    model[1].requires_grad_(False)
    assert groups_of(model, inputs_of(BY_ID["batchnorm"]))["1"] == ["2.weight", "2.bias"]


@every_problem
def test_survey_leaves_no_trace(problem: Problem) -> None:
    model = problem.model()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = set(vars(model))
    for count in (False, True):
        survey(model, Inputs.of(inputs_of(problem)), count=count)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(model)) == attributes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_refuses_a_scripted_module_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"the module '1' is scripted, .* give the network before it was scripted"):
        refuse_scripted(model)
