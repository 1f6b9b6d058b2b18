"""Finding a network's layers, grouping them, cutting its graph, and holding its chance and statistics still."""

from __future__ import annotations

import copy
import random
import re
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.problems import CLASSES, PROBLEMS, Problem
from torch import Tensor, nn

from backforward.data_norm import DataNorm
from backforward.models import MLP, NIN
from backforward.rules import Backforward
from backforward.stages import (
    Cut,
    Generators,
    Settings,
    Statistics,
    UntraceableError,
    check_spec,
    cut,
    group_layers,
    linear_chain,
    may_draw,
    survey,
    tensors_in,
)

BY_ID = {problem.id: problem for problem in PROBLEMS}
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)


def inputs_of(problem: Problem) -> tuple[Any, ...]:
    x, _ = problem.batch()
    return x if isinstance(x, tuple) else (x,)


def groups_of(model: nn.Module, inputs: tuple[Any, ...], spec: Any = "layer") -> dict[str, list[str]]:
    """Name of each group to the names of its parameters."""
    check_spec(model, spec)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups, _, _ = group_layers(model, trainable, survey(model, inputs, count=isinstance(spec, int)), spec)
    names = {id(p): name for name, p in model.named_parameters()}
    return {group.name: [names[id(p)] for p in group.parameters] for group in groups}


def cut_of(model: nn.Module, inputs: tuple[Any, ...], spec: Any = "layer") -> Cut:
    found = survey(model, inputs)
    groups, group_of, _ = group_layers(model, [p for p in model.parameters() if p.requires_grad], found, spec)
    return cut(model, inputs, groups, group_of, found.output)


# --- layers and groups -----------------------------------------------------------------------------------------------


@every_problem
def test_layers_are_found_in_forward_order_with_their_norms(problem: Problem) -> None:
    groups = groups_of(problem.model(), inputs_of(problem))
    assert list(groups) == list(problem.groups)
    assert {name: sorted(own) for name, own in groups.items()} == {n: sorted(own) for n, own in problem.groups.items()}


@every_problem
def test_statistics_move_in_the_pass_of_their_layer(problem: Problem) -> None:
    model = problem.model()
    found = survey(model, inputs_of(problem))
    _, group_of, _ = group_layers(model, [p for p in model.parameters() if p.requires_grad], found, "layer")
    assert {name: group_of.get(name, 0) for name in problem.statistics} == problem.statistics


@every_problem
def test_survey_leaves_no_trace(problem: Problem) -> None:
    model = problem.model()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = set(vars(model))
    for count in (False, True):
        survey(model, inputs_of(problem), count=count)
    if problem.traceable:
        cut_of(model, inputs_of(problem))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(model)) == attributes
    assert all(p.grad is None for p in model.parameters())


def test_survey_sees_what_moves_and_what_is_reached() -> None:
    model = BY_ID["moving"].model()
    found = survey(model, inputs_of(BY_ID["moving"]))
    assert sorted(found.moving) == [
        ("data_norm", "mean"),
        ("data_norm", "std"),
        ("instance", "running_mean"),
        ("instance", "running_var"),
        ("middle", "mean"),
        ("middle", "std"),
    ]
    assert found.reached == {id(p) for p in model.parameters()}
    model.eval()
    assert survey(model, inputs_of(BY_ID["moving"])).moving == []


def test_multiply_accumulates_are_counted_by_layer() -> None:
    model = BY_ID["mlp"].model()
    assert survey(model, inputs_of(BY_ID["mlp"]), count=True).macs == {"1": 6 * 5 * 6, "3": 6 * 6 * 6, "5": 6 * 6 * 4}
    assert set(survey(model, inputs_of(BY_ID["mlp"])).macs.values()) == {0}


def _dear(costs: list[int]) -> nn.Sequential:
    """Linear layers that cost so many units: cost = inputs x outputs, with outputs = 1 between them."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(1, cost), _Sum()) for cost in costs))


class _Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)


@pytest.mark.parametrize("costs", [[1, 1, 1, 1], [5, 1, 1, 1, 5], [1, 2, 3, 4, 5, 6], [9, 1, 1], [2, 2, 7, 1, 3, 3]])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_integer_groups_are_as_even_as_can_be(costs: list[int], count: int) -> None:
    model = _dear(costs)
    groups = groups_of(model, (torch.randn(2, 1),), count)
    index = {f"{i}.0.weight": cost for i, cost in enumerate(costs)}
    ours = [sum(index.get(name, 0) for name in own) for own in groups.values()]
    assert sum(ours) == sum(costs)

    def prices(cuts: tuple[int, ...]) -> list[int]:
        return [sum(costs[i:j]) for i, j in pairwise((0, *cuts, len(costs)))]

    every = [prices(cuts) for cuts in combinations(range(1, len(costs)), count - 1)]
    assert len(ours) == count
    assert max(ours) == min(map(max, every))
    assert sum(p * p for p in ours) == min(sum(p * p for p in e) for e in every if max(e) == max(ours))


def test_as_many_groups_as_layers_is_layer() -> None:
    problem = BY_ID["residual"]
    by_layer = groups_of(problem.model(), inputs_of(problem))
    assert groups_of(problem.model(), inputs_of(problem), len(by_layer)) == by_layer


def test_named_groups_take_norms_along_and_keep_their_order() -> None:
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


def test_frozen_layers_leave_their_norm_a_group() -> None:
    model = BY_ID["batchnorm"].model()
    model[1].requires_grad_(False)
    assert groups_of(model, inputs_of(BY_ID["batchnorm"]))["1"] == ["2.weight", "2.bias"]


class Hidden(nn.Module):
    """Uses a layer where no torch function can be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.hidden = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            h = self.hidden(torch.tanh(x))
        return self.seen(x)[:, :CLASSES] + h


def test_a_use_that_cannot_be_seen_is_refused_rather_than_frozen() -> None:
    model = Hidden()
    with pytest.raises(ValueError, match=r"uses hidden.weight, hidden.bias out of sight"):
        groups_of(model, (torch.randn(6, 5),))


# --- the cut ---------------------------------------------------------------------------------------------------------


def test_a_chain_is_cut_at_its_layers_and_each_pass_starts_one_below() -> None:
    parts = cut_of(BY_ID["mlp"].model(), inputs_of(BY_ID["mlp"]))
    assert [[step.number for step in program.steps] for program in parts.programs] == [
        [0, 1, 2, 3],  # flatten; a stage for each layer
        [1, 2, 3],  # the first layer again, with its new weights, and what follows
        [2, 3],
        [1, 2, 3],  # the joint pass
    ]
    assert [program.draws for program in parts.programs] == [False] * 4


def test_a_branch_that_nothing_concerns_is_not_run_again() -> None:
    model, inputs = BY_ID["branched"].model(), inputs_of(BY_ID["branched"])
    parts = cut_of(model, inputs)  # left, right.0, right.2, head
    runs = [{step.number for step in program.steps} for program in parts.programs]
    left = min(runs[0] & runs[1] - runs[2])  # depends on the first group alone
    assert left in runs[0]
    assert left in runs[1]
    assert left not in runs[2]
    assert left not in runs[3]


@every_problem
def test_no_value_is_read_before_it_is_written_nor_kept_without_need(problem: Problem) -> None:
    if not problem.traceable:
        with pytest.raises(UntraceableError):
            cut_of(problem.model(), inputs_of(problem))
        return
    parts = cut_of(problem.model(), inputs_of(problem))
    held = set(range(len(problem.shapes)))
    for program in parts.programs:
        written = set()
        for step in program.steps:
            assert held.issuperset(step.stage.inputs)
            held.update(step.stage.outputs)
            written.update(step.stage.outputs)
            assert held.issuperset(step.spent)
            held.difference_update(step.spent)
        assert parts.output in held
        assert set(program.kept) == (held & written) - {parts.output} | (set(program.kept) & {parts.output})
    assert held == {parts.output}


def test_tied_weights_lie_in_every_stage_that_uses_them() -> None:
    parts = cut_of(BY_ID["tied"].model(), inputs_of(BY_ID["tied"]))
    assert len({step.number for step in parts.programs[1].steps}) == len(parts.programs[0].steps)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: self.layer(x) * random.random(), "decides by chance"),
        (lambda self, x: self.layer(x) + torch.rand(4), "decides by chance"),
        (lambda self, x: self.layer(x) if x.sum() > -1e9 else x, "control flow"),
        (lambda self, x: self.layer(x.relu_()), "changes its input in place"),
        (lambda self, x: self.layer(x) * next(self.calls), "another output"),
    ],
    ids=["python-chance", "constant-chance", "by-value", "input-in-place", "counts-calls"],
)
def test_networks_that_are_no_graph_are_told_from_those_that_are(forward: Any, reason: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)
            self.calls = iter(range(1, 9))

    Net.forward = forward
    model, x = Net(), torch.randn(3, 5)
    with pytest.raises(UntraceableError, match=reason) as refusal:
        cut_of(model, (x,))
    assert "\n" not in str(refusal.value)


def test_a_network_with_hooks_of_its_own_is_not_cut_and_a_part_with_hooks_stays_whole() -> None:
    model, inputs = BY_ID["residual"].model(), inputs_of(BY_ID["residual"])
    hook = model.register_forward_hook(lambda *_: None)
    with pytest.raises(UntraceableError, match="carries forward hooks"):
        cut_of(model, inputs)
    hook.remove()
    assert model.same in cut_of(model, inputs).entered
    model.same.register_forward_hook(lambda *_: None)
    assert model.same not in cut_of(model, inputs).entered


def test_buffers_read_and_moved_in_one_forward_are_left_to_the_naive_engine() -> None:
    class Renorm(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            self.mean.lerp_(h.detach().mean(0), 0.1)
            return h - self.mean

    with pytest.raises(UntraceableError, match="reads a buffer that it changes in place"):
        cut_of(Renorm(), (torch.randn(3, 5),))


def test_a_linear_chain_is_taken_apart() -> None:
    model, inputs = BY_ID["mlp"].model(), inputs_of(BY_ID["mlp"])
    before, layers, after, _ = linear_chain(model, inputs, model(*inputs))
    value = before(*inputs)
    for layer, function in zip(layers, after, strict=True):
        value = function(layer(value))
    assert torch.equal(value, model(*inputs))
    assert layers == [model[1], model[3], model[5]]


# --- one batch, one function -----------------------------------------------------------------------------------------


def test_generators_repeat_themselves() -> None:
    generators = Generators([torch.device("cpu")])
    states = generators.save()
    first = torch.rand(3)
    generators.restore(states)
    assert torch.equal(torch.rand(3), first)


def test_statistics_move_in_their_pass_and_every_pass_starts_alike() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True), nn.BatchNorm1d(2))
    statistics = Statistics(model, [("1", "running_mean"), ("1", "running_var")], {"0": 0, "1": 1, "2": 2})
    x = torch.randn(4, 2, 3)
    seen = []
    statistics.begin()
    for k in range(3):
        statistics.enter(k)
        assert torch.equal(model[1].running_mean, torch.zeros(2))  # as at the start of the batch
        model(x * (k + 1))
        statistics.leave(k)
        seen.append([int(model[0].num_batches_tracked), int(model[2].num_batches_tracked)])
    statistics.end()
    assert seen == [[1, 0], [1, 0], [1, 1]]
    alone = copy.deepcopy(model)
    for module in alone:
        module.reset_running_stats()
    alone(x * 2)
    assert torch.equal(model[1].running_mean, alone[1].running_mean)
    assert all(module.track_running_stats for module in model)
    model(x)
    assert int(model[0].num_batches_tracked) == 2


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("called", "draws"),
    [
        (nn.Dropout(0.0), True),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout2d()), True),
        (nn.MultiheadAttention(2, 1), True),
        (nn.LSTM(2, 2), True),
        (nn.RReLU(), True),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d(2)), False),
        (nn.CrossEntropyLoss(), False),
        (NIN((3, 32, 32), 10, 0.02, "prop"), False),
        (nn.Sequential(DataNorm("batch", shape=(1, 4, 4)), MLP((1, 4, 4), 3, hidden=2)), False),
        (MLP((1, 4, 4), 3, hidden=2, dropout=0.5), True),
        (hooked(nn.Linear(2, 2)), True),
        (Hidden(), True),
        (F.dropout, True),
        (torch.rand_like, True),
        (F.scaled_dot_product_attention, True),
        (F.cross_entropy, False),
        (torch.relu, False),
        (lambda output, target: output, True),
        ("bernoulli_", True),
        ("normal_", True),
        ("uniform_", True),
        ("flatten", False),
        ("add_", False),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),  # pytest-xdist wants the same names in every process
)
def test_what_may_draw(called: Any, draws: bool) -> None:
    assert may_draw(called) is draws


def test_settings_hold_until_something_changes() -> None:
    model = BY_ID["residual"].model()
    settings = Settings(model, [model, model.same])
    assert not settings.changed()
    model.same.bn1.eval()
    assert settings.changed()
    model.train()
    assert not settings.changed()
    model.head.bias.requires_grad_(False)
    assert settings.changed()


def test_tensors_are_found_in_any_nest() -> None:
    a, b = torch.ones(1), torch.zeros(1)
    assert [id(t) for t in tensors_in({"x": [a, (b, 3)], "y": None, "z": a})] == [id(a), id(b), id(a)]


def test_constants_and_devices_of_a_network_are_left_alone() -> None:
    """The tracer hangs tensors that a forward makes from nothing on the network; they are taken off again."""
    problem = BY_ID["functional"]
    model = problem.model()
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loss, engine="replay")
    names = set(vars(model))
    rule.step(*problem.batch())
    assert set(vars(model)) == names
