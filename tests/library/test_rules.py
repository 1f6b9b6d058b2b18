"""The update rules against plain loops and each other, on the table of problems and on random graphs."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.problems import OPTIMIZERS, PROBLEMS, Problem
from tests.oracles.naive_rules import backforward_batch, sgd_loop
from tests.oracles.random_networks import RandomNetwork, networks
from tests.oracles.ranks import train_as_rank
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backforward.batch import tensors_in
from backforward.rules import Backforward, Backprop, StepResult, UpdateRule
from backforward.switch import Switch

BY_ID = {problem.id: problem for problem in PROBLEMS}

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


def run(
    problem: Problem,
    make_rule: Callable[[nn.Module, torch.optim.Optimizer], Any],
    optimizer: str = "sgd",
    steps: int = 5,
) -> tuple[nn.Module, list[StepResult]]:
    """Train a problem's network for a few batches, always from the same weights and generator state."""
    model = problem.model()
    torch.manual_seed(3)
    rule = make_rule(model, OPTIMIZERS[optimizer](list(model.parameters())))
    return model, [rule.step(*problem.batch(i)) for i in range(steps)]


def same(a: Tensor, b: Tensor) -> bool:
    """Compare bitwise, NaN equal to NaN, so that diverged runs can be compared too."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    """Assert that parameters and buffers are bitwise equal."""
    theirs = other.state_dict()
    assert not [name for name, value in model.state_dict().items() if not same(value, theirs[name])]


def assert_same_results(results: list[StepResult], others: list[StepResult]) -> None:
    """Assert that losses and outputs are bitwise equal."""
    ours, theirs = list(tensors_in(list(map(list, results)))), list(tensors_in(list(map(list, others))))
    assert len(ours) == len(theirs) >= 2 * len(results)
    assert all(map(same, ours, theirs))
    assert not any(t.requires_grad for t in ours)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# --- Backforward against the oracle, replay against naive ------------------------------------------------------------


@every_problem
@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
def test_naive_engine_is_the_oracle(problem: Problem, optimizer: str) -> None:
    oracle = problem.model()
    its_optimizer = OPTIMIZERS[optimizer](list(oracle.parameters()))
    torch.manual_seed(3)
    losses = [
        backforward_batch(
            oracle, its_optimizer, problem.loss, *problem.batch(i), list(problem.groups.values()), problem.statistics
        )
        for i in range(3)
    ]
    model, results = run(problem, lambda m, o: Backforward(m, o, problem.loss, engine="naive"), optimizer, steps=3)
    assert_same_state(model, oracle)
    assert torch.equal(torch.stack(losses), torch.stack([r.loss for r in results]))


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.traceable], ids=lambda p: p.id)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replay_is_naive_bitwise(problem: Problem, optimizer: str) -> None:
    naive, expected = run(problem, lambda m, o: Backforward(m, o, problem.loss, engine="naive"), optimizer)
    state = torch.get_rng_state()
    replay, results = run(problem, lambda m, o: Backforward(m, o, problem.loss, engine="replay"), optimizer)
    assert_same_state(replay, naive)
    assert_same_results(results, expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"joint_pass": True},
        {"groups": 2},
        {"max_grad_norm": 0.1},
        {"groups": 2, "joint_pass": True, "max_grad_norm": 0.1},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("name", ["residual", "branched", "dropout", "moving", "transformer"])
def test_replay_is_naive_bitwise_with(name: str, arguments: dict[str, Any], optimizer: str) -> None:
    problem = BY_ID[name]
    naive, expected = run(problem, lambda m, o: Backforward(m, o, problem.loss, engine="naive", **arguments), optimizer)
    replay, results = run(
        problem, lambda m, o: Backforward(m, o, problem.loss, engine="replay", **arguments), optimizer
    )
    assert_same_state(replay, naive)
    assert_same_results(results, expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(networks(), st.sampled_from(list(OPTIMIZERS)), st.data())
def test_replay_is_naive_bitwise_on_random_graphs(network: RandomNetwork, optimizer: str, data: st.DataObject) -> None:
    layers = [name for name, m in network.named_modules() if m._parameters]
    order = data.draw(st.permutations(layers))
    cut = data.draw(st.integers(1, len(order)))
    groups = data.draw(st.sampled_from(["layer", 1, [part for part in (order[:cut], order[cut:]) if part]]))
    joint = data.draw(st.booleans())
    ends = []
    for engine in ("naive", "replay"):
        model = copy.deepcopy(network)
        rule = Backforward(
            model, OPTIMIZERS[optimizer](list(model.parameters())), F.cross_entropy, groups, engine, joint
        )
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Backforward: the forward does not use")
            for i in range(3):
                result = rule.step(*_features(i))
        ends.append((model, result, torch.get_rng_state()))
    (naive, expected, state), (replay, result, its_state) = ends
    assert_same_state(replay, naive)
    assert_same_results([result], [expected])
    assert torch.equal(state, its_state)


def _torchvision_networks() -> dict[str, Callable[[], nn.Module]]:
    import torchvision.models as tv

    wide, narrow = tv.convnext.CNBlockConfig(8, 16, 2), tv.convnext.CNBlockConfig(16, None, 2)
    return {
        "vision-transformer": lambda: tv.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=4, dropout=0.1),
        "swin": lambda: tv.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [2, 2], num_classes=4, stochastic_depth_prob=0.3),
        "convnext": lambda: tv.ConvNeXt([wide, narrow], stochastic_depth_prob=0.3, num_classes=4),
        "densenet": lambda: tv.DenseNet(4, (2, 2, 2), 8, num_classes=4, drop_rate=0.1),
    }


@pytest.mark.parametrize("name", ["vision-transformer", "swin", "convnext", "densenet"])
def test_replay_is_naive_bitwise_on_networks_from_elsewhere(name: str) -> None:
    ends, size = [], 32 if name == "densenet" else 16
    for engine in ("naive", "replay"):
        torch.manual_seed(1)
        model = _torchvision_networks()[name]()
        rule = Backforward(model, OPTIMIZERS["adamw"](list(model.parameters())), F.cross_entropy, engine=engine)
        for _ in range(2):
            rule.step(torch.randn(4, 3, size, size), torch.randint(4, (4,)))
        ends.append(model)
    assert_same_state(*ends)


def _features(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator), torch.randint(4, (6,), generator=generator)


# --- Identities ------------------------------------------------------------------------------------------------------


@every_problem
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_backprop_is_the_textbook_loop_bitwise(problem: Problem, optimizer: str) -> None:
    loop = problem.model()
    torch.manual_seed(3)
    losses = sgd_loop(
        loop, OPTIMIZERS[optimizer](list(loop.parameters())), problem.loss, [problem.batch(i) for i in range(5)]
    )
    model, results = run(problem, lambda m, o: Backprop(m, o, problem.loss), optimizer)
    assert_same_state(model, loop)
    assert losses == [r.loss.item() for r in results]


@every_problem
@pytest.mark.parametrize("engine", ["auto", "naive"])
@pytest.mark.filterwarnings("ignore:Backforward. the naive engine takes over")
def test_one_group_is_sgd_bitwise(problem: Problem, engine: str) -> None:
    sgd, expected = run(problem, lambda m, o: Backprop(m, o, problem.loss), "nesterov")
    state = torch.get_rng_state()
    bfp, results = run(problem, lambda m, o: Backforward(m, o, problem.loss, 1, engine), "nesterov")
    assert_same_state(bfp, sgd)
    assert_same_results(results, expected)
    assert torch.equal(torch.get_rng_state(), state)


class Checkpointed(nn.Module):
    """Checkpoints (reentrantly) layers with statistics and draws, and counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Linear(4, 4), nn.Linear(4, 2)
        self.two = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.three(checkpoint(self.two, self.one(x), use_reentrant=True))


@pytest.mark.parametrize("rule", [Backprop, partial(Backforward, groups=1)])
def test_one_group_with_reentrant_checkpointing_runs_one_forward(rule: Callable[..., UpdateRule]) -> None:
    batches = [(torch.randn(6, 4), torch.randint(2, (6,))) for _ in range(3)]
    ours = Checkpointed()
    theirs = copy.deepcopy(ours)
    torch.manual_seed(5)
    step = rule(ours, torch.optim.SGD(ours.parameters(), lr=0.1), F.cross_entropy).step
    losses = [step(*batch).loss.item() for batch in batches]
    torch.manual_seed(5)
    assert losses == sgd_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), F.cross_entropy, batches)
    assert_same_state(ours, theirs)
    assert ours.calls == theirs.calls == 3


@pytest.mark.parametrize("engine", ["replay", "naive"])
@pytest.mark.parametrize("name", ["dropout", "residual", "moving"])
def test_one_group_and_a_joint_pass_is_sgd_twice_on_each_batch(name: str, engine: str) -> None:
    problem = BY_ID[name]
    sgd, expected = run(problem, lambda m, o: Backprop(m, o, problem.loss, repeats=2), "adam")
    bfp, results = run(problem, lambda m, o: Backforward(m, o, problem.loss, 1, engine, joint_pass=True), "adam")
    assert_same_state(bfp, sgd)
    assert_same_results([r._replace(joint_loss=None) for r in results], expected)


def test_joint_loss_is_computed_after_the_single_updates() -> None:
    problem = BY_ID["mlp"]
    x, y = problem.batch()
    model, _ = run(problem, lambda m, o: Backforward(m, o, problem.loss), steps=1)
    _, (result,) = run(problem, lambda m, o: Backforward(m, o, problem.loss, joint_pass=True), steps=1)
    assert result.joint_loss is not None
    assert torch.equal(result.joint_loss, problem.loss(model(x), y).detach())


@every_problem
@pytest.mark.filterwarnings("ignore:Backforward. the naive engine takes over")
def test_learning_rate_0_changes_only_running_statistics(problem: Problem) -> None:
    before = problem.model()
    models = []
    for make in (Backforward, Backprop):
        model = problem.model()
        torch.manual_seed(3)
        rule = make(model, torch.optim.SGD(model.parameters(), lr=0.0), problem.loss)
        results = [rule.step(*problem.batch(i)) for i in range(2)]
        models.append(model)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
        assert all(not p.requires_grad or p.grad is None for p in model.parameters())
        assert all(r.loss.isfinite() for r in results)
    assert_same_state(*models)  # the statistics changed once per batch, as in backpropagation


@pytest.mark.parametrize("engine", ["replay", "naive"])
@pytest.mark.parametrize("name", ["nin", "residual", "tied", "transformer"])
def test_each_group_steps_along_its_gradient_at_the_current_weights(name: str, engine: str) -> None:
    problem = BY_ID[name]
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x, y = problem.batch()
    draws = torch.get_rng_state()
    checked = []

    def step(last: bool) -> None:
        twin = copy.deepcopy(model)  # earlier groups are already updated
        with torch.random.fork_rng():
            torch.set_rng_state(draws)
            problem.loss(twin(x), y).backward()
        facing = {n: p.grad for n, p in twin.named_parameters()}
        stepped = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        checked.append(list(stepped))
        for parameter, gradient in stepped.items():
            assert torch.equal(gradient, facing[parameter])
        optimizer.step()

    rule = Backforward(model, optimizer, problem.loss, engine=engine, step=step)
    rule.step(x, y)
    assert sorted(map(sorted, checked)) == sorted(map(sorted, problem.groups.values()))


@every_problem
@pytest.mark.filterwarnings("ignore:Backforward. the naive engine takes over")
def test_loss_and_output_are_computed_before_the_updates(problem: Problem) -> None:
    model = problem.model()
    x, y = problem.batch()
    torch.manual_seed(3)
    output = copy.deepcopy(model)(*x) if isinstance(x, tuple) else copy.deepcopy(model)(x)
    expected = StepResult(problem.loss(output, y).detach(), next(tensors_in(output)).detach())
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.5), problem.loss, joint_pass=True)
    torch.manual_seed(3)
    result = rule.step(x, y)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(next(tensors_in(result.output)), expected.output)
    assert type(result.output) is type(output)


def tensors_alive() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("engine", ["replay", "naive", "shortcut"])
def test_keeps_no_memory_between_steps(engine: str) -> None:
    problem = BY_ID["mlp"]
    model = problem.model()
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.01), problem.loss, engine=engine)
    x, y = problem.batch()

    rule.step(x, y)
    before = tensors_alive()
    for _ in range(1000):
        result = rule.step(x, y)
    gc.collect()
    assert tensors_alive() <= before + 2  # the last result's loss and output
    assert result.loss.grad_fn is None
    assert not result.output.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_a_step_frees_its_memory_without_the_garbage_collector() -> None:
    problem = BY_ID["residual"]
    model = problem.model()
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.01), problem.loss)
    batch = problem.batch()
    rule.step(*batch)
    gc.collect()
    gc.disable()
    try:
        before = tensors_alive()
        for _ in range(3):
            rule.step(*batch)
        assert tensors_alive() <= before
    finally:
        gc.enable()


# --- Optimizers, hooks, precision ------------------------------------------------------------------------------------


def test_a_step_leaves_the_state_of_other_groups_unchanged() -> None:
    problem = BY_ID["mlp"]
    model = problem.model()
    optimizer = torch.optim.Adam(model.parameters())
    counts = []

    def step(last: bool) -> None:
        optimizer.step()
        counts.append([int(optimizer.state[p].get("step", 0)) for p in model.parameters()])

    Backforward(model, optimizer, problem.loss, step=step).step(*problem.batch())
    assert counts == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("make", "flags"),
    [
        (Backforward, [False, False, True]),
        (partial(Backforward, joint_pass=True), [False, False, False, False, False, True]),
        (partial(Backforward, engine="shortcut"), [True]),
        (Backprop, [True]),
        (partial(Backprop, repeats=2), [False, True]),
    ],
    ids=["bfp", "bfp-joint", "shortcut", "sgd", "sgd-repeat"],
)
def test_step_receives_true_for_the_last_step_alone(make: Callable[..., UpdateRule], flags: list[bool]) -> None:
    problem = BY_ID["mlp"]
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[bool] = []

    def step(last: bool) -> None:
        seen.append(last)
        optimizer.step()

    rule = make(model, optimizer, problem.loss, step=step)
    rule.step(*problem.batch())
    assert seen == flags


@pytest.mark.parametrize("engine", ["replay", "naive"])
def test_reduce_receives_each_groups_flat_gradient_once(engine: str) -> None:
    problem = BY_ID["residual"]
    sizes = []

    def halve(flat: Tensor) -> Tensor:
        sizes.append(flat.numel())
        return flat / 2

    model, _ = run(problem, lambda m, o: Backforward(m, o, problem.loss, engine=engine, reduce=halve), steps=1)
    named = dict(model.named_parameters())
    assert sizes == [sum(named[n].numel() for n in names) for names in problem.groups.values()]
    half, _ = run(problem, lambda m, o: Backforward(m, torch.optim.SGD(m.parameters(), lr=0.05), problem.loss), steps=1)
    torch.testing.assert_close(weights(model), weights(half))


def _to_unit_norm(parameters: Any) -> None:
    for p in parameters:
        if p.dim() > 1:
            p.div_(p.norm())


@pytest.mark.parametrize(
    "arguments", [{"after_update": _to_unit_norm}, {"max_grad_norm": 0.05}], ids=lambda a: next(iter(a))
)
@pytest.mark.parametrize("engine", ["replay", "naive"])
def test_projection_and_clipping_act_on_each_update(engine: str, arguments: dict[str, Any]) -> None:
    problem = BY_ID["nin"]
    oracle = problem.model()
    optimizer = OPTIMIZERS["nesterov"](list(oracle.parameters()))
    groups = list(problem.groups.values())
    for i in range(3):
        backforward_batch(oracle, optimizer, problem.loss, *problem.batch(i), groups, {}, **arguments)
    model, _ = run(
        problem, lambda m, o: Backforward(m, o, problem.loss, engine=engine, **arguments), "nesterov", steps=3
    )
    assert_same_state(model, oracle)


def test_after_update_sees_the_updates_gradient_only() -> None:
    problem = BY_ID["mlp"]
    model = problem.model()
    seen = []

    def after(parameters: Any) -> None:
        assert not torch.is_grad_enabled()
        seen.append([p.grad is not None and any(p is q for q in parameters) for p in model.parameters()])

    Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loss, after_update=after).step(
        *problem.batch()
    )
    assert seen == [[i // 2 == k for i in range(6)] for k in range(3)]


def test_clipped_backprop_is_the_textbook_loop() -> None:
    problem = BY_ID["mlp"]
    loop = problem.model()
    optimizer = torch.optim.SGD(loop.parameters(), lr=0.1)
    x, y = problem.batch()
    problem.loss(loop(x), y).backward()
    nn.utils.clip_grad_norm_(loop.parameters(), 0.01)
    optimizer.step()
    model, _ = run(problem, lambda m, o: Backprop(m, o, problem.loss, max_grad_norm=0.01), steps=1)
    assert_same_state(model, loop)


@pytest.mark.parametrize("name", ["mlp", "residual", "transformer"])
def test_bfloat16_autocast_sees_updated_weights(name: str) -> None:
    """Autocast caches casts of the weights, so each pass must cast again, as in an autocast context of its own."""
    problem = BY_ID[name]
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rule = Backforward(model, optimizer, problem.loss)
    x, y = problem.batch()
    draws = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = rule.step(x, y)
    assert result.output.dtype is torch.bfloat16

    oracle = problem.model()
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.5)
    named = dict(oracle.named_parameters())
    for names in problem.groups.values():
        torch.set_rng_state(draws)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = problem.loss(oracle(x), y)
            gradients = torch.autograd.grad(loss, [named[n] for n in names])
        for n, gradient in zip(names, gradients, strict=True):
            named[n].grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weights(model), weights(oracle))


def test_optimizers_that_draw_get_new_noise_for_each_group() -> None:
    """Restoring the generators for dropout must not repeat the optimizer's noise."""

    now: list[Tensor] = []

    class Noise(torch.optim.Optimizer):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    now.append(torch.randn(3))

    drawn = []
    for engine in ("naive", "replay"):
        model = BY_ID["dropout"].model()
        rule = Backforward(model, Noise(model.parameters(), {}), F.cross_entropy, engine=engine)
        torch.manual_seed(3)
        now.clear()  # of the noise drawn in trial steps
        rule.step(*BY_ID["dropout"].batch())
        drawn.append(torch.stack(now))
    assert torch.equal(*drawn)
    assert len(drawn[0].unique()) == drawn[0].numel()


def test_a_loss_that_draws_gives_every_pass_the_same_draws() -> None:
    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output + 0.5 * torch.randn_like(output), target)

    ends = []
    for engine in ("naive", "replay"):
        model = BY_ID["mlp"].model()
        torch.manual_seed(3)
        Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), noisy, engine=engine).step(
            *BY_ID["mlp"].batch()
        )
        ends.append((weights(model), torch.get_rng_state()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("rule", [Backforward, Backprop])
def test_reports_a_loss_that_is_not_finite(rule: type[UpdateRule]) -> None:
    model = BY_ID["mlp"].model()
    x, y = BY_ID["mlp"].batch()
    result = rule(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy).step(x * float("inf"), y)
    assert result.loss.isnan()


# --- Changes while training ------------------------------------------------------------------------------------------


class Scheduled(nn.Module):
    """Its forward depends on its mode, a probability and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)
        self.p = 0.2
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(torch.tanh(self.first(x)) + self.shift, self.p, self.training))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.eval(),
        lambda m: setattr(m, "p", 0.7),
        lambda m: setattr(m, "shift", torch.ones(6)),
        lambda m: m.first.requires_grad_(False),
        lambda m: m.first.register_forward_hook(lambda *a: a[2] * 2),
        lambda m: m.register_forward_hook(lambda *a: a[2] * 2),
    ],
    ids=["mode", "attribute", "buffer", "frozen", "hook", "hook-of-the-network"],
)
@pytest.mark.filterwarnings("ignore:Backforward. the naive engine takes over")
def test_replay_notices_what_changes_between_steps(change: Callable[[nn.Module], Any]) -> None:
    ends = []
    for engine in ("naive", "auto"):
        torch.manual_seed(1)
        model = Scheduled()
        rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, engine=engine)
        x, y = BY_ID["mlp"].batch()
        rule.step(x, y)
        middle = weights(model)
        change(model)
        rule.step(x, y)
        assert not torch.equal(weights(model), middle)
        ends.append(weights(model))
    assert torch.equal(*ends)
    assert (len(rule.groups) == 1) == (not model.first.weight.requires_grad)


@pytest.mark.parametrize("rule", [Backforward, Backprop])
def test_ignores_gradients_left_in_grad(rule: type[UpdateRule]) -> None:
    model = WithSpare()
    model.spare.weight.grad = torch.ones(2, 2)
    model.spare.requires_grad_(False)
    before = model.spare.weight.clone()
    rule(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy).step(*BY_ID["mlp"].batch())
    assert torch.equal(model.spare.weight, before)


def test_trains_parameters_added_to_the_optimizer() -> None:
    model = BY_ID["mlp"].model()
    optimizer = torch.optim.SGD(model[5].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="no optimizer has 1.weight"):
        rule = Backforward(model, optimizer, F.cross_entropy)
    rule.step(*BY_ID["mlp"].batch())
    assert [name for name, _ in rule.groups] == ["5"]
    before = model[1].weight.clone()
    optimizer.add_param_group({"params": list(model[1].parameters())})
    rule.step(*BY_ID["mlp"].batch())
    assert [name for name, _ in rule.groups] == ["1", "5"]
    assert not torch.equal(model[1].weight, before)


@pytest.mark.parametrize("reverse", [False, True], ids=["bfp_warmup", "bfp_finetune"])
def test_switch_changes_the_rule_at_an_epoch(reverse: bool) -> None:
    problem = BY_ID["mlp"]
    ends = []
    for switching in (True, False):
        model = problem.model()
        optimizer = OPTIMIZERS["nesterov"](list(model.parameters()))
        rules: list[Any] = [Backforward(model, optimizer, problem.loss), Backprop(model, optimizer, problem.loss)]
        first, then = reversed(rules) if reverse else rules
        rule = Switch(first, then, at_epoch=2)
        for epoch in range(4):
            rule.set_epoch(epoch)
            (rule if switching else first if epoch < 2 else then).step(*problem.batch(epoch))
        ends.append(weights(model))
        assert rule.groups == then.groups
    assert torch.equal(*ends)
    rule.set_epoch(0)  # a resumed run may go back
    assert rule.active is first


def test_prepare_finds_the_groups_and_changes_nothing() -> None:
    problem = BY_ID["moving"]
    model, twin = problem.model(), problem.model()
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loss)
    with pytest.raises(RuntimeError, match="after the first batch"):
        _ = rule.groups
    state = torch.get_rng_state()
    rule.prepare(problem.batch()[0])
    assert [name for name, _ in rule.groups] == list(problem.groups)
    assert_same_state(model, twin)
    assert torch.equal(torch.get_rng_state(), state)


# --- The shortcut ----------------------------------------------------------------------------------------------------


def chain(
    *widths: int, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True, dtype: torch.dtype
) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Flatten()]
    for inside, out in pairwise(widths):
        layers += [nn.Linear(inside, out, bias), activation()]
    return nn.Sequential(*layers[:-1]).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("widths", "batch", "options"),
    [
        ((60, 50, 10), 8, {}),
        ((60, 50, 10), 40, {}),  # so many rows that the layer itself is cheaper
        ((60, 50, 40, 30, 10), 8, {"activation": nn.Tanh}),
        ((60, 50, 40, 10), 8, {"bias": False}),
        ((60, 50, 10), 8, {"activation": partial(nn.ReLU, inplace=True)}),
        ((60, 50, 10), 8, {"activation": partial(nn.ELU, inplace=True)}),
        ((60, 50, 40, 10), 8, {"loss": F.multi_margin_loss}),
        ((60, 10), 8, {"loss": nn.CrossEntropyLoss()}),
    ],
    ids=["mlp", "many-rows", "deep-tanh", "no-bias", "relu-in-place", "elu-in-place", "margin", "one-layer"],
)
def test_shortcut_equals_replay_up_to_rounding(
    widths: tuple[int, ...], batch: int, options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    loss = options.get("loss", F.cross_entropy)
    options = {key: value for key, value in options.items() if key != "loss"}
    x, y = torch.randn(batch, 3, widths[0] // 3, dtype=dtype), torch.randint(10, (batch,))
    if loss is F.cross_entropy:
        y[0] = -100  # cross_entropy's ignore_index
    updates, results = [], []
    for engine in ("replay", "shortcut"):
        model = chain(*widths, dtype=dtype, **options)
        before = weights(model)
        rates = [{"params": [p], "lr": 0.1 + 0.1 * i} for i, p in enumerate(model.parameters())]
        rule = Backforward(model, torch.optim.SGD(rates), loss, engine=engine)
        results.append(rule.step(x, y))
        updates.append(weights(model) - before)
    assert (updates[0] - updates[1]).norm() <= tolerance * updates[0].norm()
    torch.testing.assert_close(results[0].loss, results[1].loss)
    torch.testing.assert_close(results[0].output, results[1].output)


@pytest.mark.parametrize(
    ("problem", "arguments", "optimizer", "message"),
    [
        ("mlp", {"max_grad_norm": 1.0}, "sgd", "engine='shortcut' needs no max_grad_norm"),
        ("mlp", {"joint_pass": True}, "sgd", "engine='shortcut' needs no joint_pass"),
        ("mlp", {"groups": 2}, "sgd", "engine='shortcut' needs groups='layer'"),
        ("mlp", {"reduce": Tensor.clone}, "sgd", "engine='shortcut' needs no reduce"),
        ("mlp", {"after_update": _to_unit_norm}, "sgd", "engine='shortcut' needs no after_update"),
        ("mlp", {}, "adam", "engine='shortcut' needs torch.optim.SGD, not Adam"),
        ("mlp", {}, "nesterov", "engine='shortcut' needs plain SGD: no momentum"),
        ("batchnorm", {}, "sgd", "cannot be used with this network: 2 is no linear layer used once"),
        ("dropout", {}, "sgd", "may draw random numbers"),
        ("residual", {}, "sgd", "is no linear layer"),
        ("branched", {}, "sgd", "no chain"),
    ],
    ids=lambda v: v if isinstance(v, str) and " " not in v else None,
)
def test_shortcut_refuses_unsupported_networks_and_arguments(
    problem: str, arguments: dict[str, Any], optimizer: str, message: str
) -> None:
    model = BY_ID[problem].model()
    before = weights(model)
    with pytest.raises(ValueError, match=message) as refusal:
        Backforward(
            model, OPTIMIZERS[optimizer](list(model.parameters())), F.cross_entropy, engine="shortcut", **arguments
        ).step(*BY_ID[problem].batch())
    assert "\n" not in str(refusal.value)
    assert torch.equal(weights(model), before)


def test_shortcut_refuses_settings_that_change_during_training() -> None:
    model = BY_ID["mlp"].model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = Backforward(model, optimizer, F.cross_entropy, engine="shortcut")
    rule.step(*BY_ID["mlp"].batch())
    with pytest.raises(ValueError, match="no autocast"), torch.autocast("cpu", dtype=torch.bfloat16):
        rule.step(*BY_ID["mlp"].batch())
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="no momentum"):
        rule.step(*BY_ID["mlp"].batch())


# --- Refusals --------------------------------------------------------------------------------------------------------


class Detached(nn.Module):
    """Computes something with a layer that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aside = nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return h + 0 * self.aside(h).detach()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": 0}, ValueError, "groups=0: give at least 1"),
        ({"groups": -2}, ValueError, "groups=-2"),
        ({"groups": True}, TypeError, "groups=True"),
        ({"groups": 1.5}, TypeError, "groups=1.5"),
        ({"groups": 9}, ValueError, "groups=9: the network has 3 layers"),
        ({"groups": "blocks"}, ValueError, "groups='blocks': give 'layer'"),
        ({"groups": []}, ValueError, r"groups=\[\]"),
        ({"groups": [["1"], []]}, ValueError, "one of the lists names no module"),
        ({"groups": [["1"], [3]]}, TypeError, "3 is no module name"),
        ({"groups": [["1", "fc"], ["3", "5"]]}, ValueError, "no module 'fc'"),
        ({"groups": [["1", "3"], ["3", "5"]]}, ValueError, "3.weight is named by two groups"),
        ({"groups": [["1"], ["3"]]}, ValueError, "no group names 5.weight, 5.bias"),
        ({"groups": [["1", "3", "5"], ["2"]]}, ValueError, "2 holds no parameter"),
        ({"engine": "fast"}, ValueError, "engine='fast'"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm=0"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else None,
)
def test_refuses_bad_arguments_in_one_line(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = BY_ID["mlp"].model()
    before = weights(model)
    with pytest.raises(error, match=message) as refusal:
        Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, **arguments).step(
            *BY_ID["mlp"].batch()
        )
    assert "\n" not in str(refusal.value)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True])
def test_backprop_refuses_bad_repeats(repeats: Any) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="repeats="):
        Backprop(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, repeats=repeats)


@pytest.mark.parametrize("rule", [Backforward, Backprop])
def test_every_rule_refuses_bad_arguments_in_one_line(rule: type[UpdateRule]) -> None:
    model = nn.Linear(5, 4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = BY_ID["mlp"].batch()
    with pytest.raises(ValueError, match="LBFGS needs a closure"):
        rule(model, torch.optim.LBFGS(model.parameters()), F.cross_entropy)
    with pytest.raises(ValueError, match="not DataParallel"):
        rule(nn.DataParallel(model), sgd, F.cross_entropy)
    with pytest.raises(ValueError, match="parameters that are not the network's"):
        rule(model, torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], lr=0.1), F.cross_entropy)
    with pytest.raises(TypeError, match="model is a str"):
        rule("model", sgd, F.cross_entropy)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer is a float"):
        rule(model, 0.1, F.cross_entropy)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss_fn is a str"):
        rule(model, sgd, "cross_entropy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float16 autocast"), torch.autocast("cpu", dtype=torch.float16):
        rule(model, sgd, F.cross_entropy).step(x, y)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        rule(model, sgd, F.cross_entropy)


@pytest.mark.parametrize("engine", ["replay", "naive"])
def test_skips_a_group_that_the_loss_does_not_depend_on(engine: str) -> None:
    model = Detached()
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, engine=engine)
    aside, body = model.aside.weight.clone(), model.body.weight.clone()
    rule.step(*BY_ID["mlp"].batch())
    assert torch.equal(model.aside.weight, aside)  # skipped
    assert not torch.equal(model.body.weight, body)
    model.body.requires_grad_(False)
    with pytest.raises(ValueError, match="the loss of this batch depends on no trainable parameter"):
        rule.step(*BY_ID["mlp"].batch())


class WithSpare(nn.Module):
    """Has an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(5, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_warns_once_of_unused_layers_and_skips_them() -> None:
    model = WithSpare()
    spare = model.spare.weight.clone()
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), F.cross_entropy)
    with pytest.warns(UserWarning, match="does not use spare.weight, spare.bias") as caught:
        for i in range(2):
            rule.step(*BY_ID["mlp"].batch(i))
    assert len([w for w in caught if "does not use" in str(w.message)]) == 1
    assert [name for name, _ in rule.groups] == ["used"]
    assert torch.equal(model.spare.weight, spare)


@pytest.mark.parametrize("engine", ["auto", "naive"])
@pytest.mark.filterwarnings("ignore:Backforward. the naive engine takes over")
def test_refuses_a_network_that_changes_its_input(engine: str) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
    rule = Backforward(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, engine=engine)
    before = weights(model)
    with pytest.raises(ValueError, match="changes its input in place"):
        rule.step(*BY_ID["mlp"].batch())
    assert torch.equal(weights(model), before)


def test_a_failing_batch_leaves_the_network_in_a_valid_state() -> None:
    model = BY_ID["residual"].model()
    x, y = BY_ID["residual"].batch()
    fail = [True]

    def step(last: bool) -> None:
        if fail:
            fail.clear()
            raise KeyboardInterrupt
        optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = Backforward(model, optimizer, F.cross_entropy, step=step)
    with pytest.raises(KeyboardInterrupt):
        rule.step(x, y)
    twin = copy.deepcopy(model)
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    rule.step(x, y)
    Backforward(twin, torch.optim.SGD(twin.parameters(), lr=0.1), F.cross_entropy).step(x, y)
    assert_same_state(model, twin)


def test_switch_refuses_two_networks_and_bad_epochs() -> None:
    rules = []
    for _ in range(2):
        model = nn.Linear(2, 2)
        rules.append(Backprop(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy))
    with pytest.raises(ValueError, match="share one network and one optimizer"):
        Switch(rules[0], rules[1], at_epoch=1)
    with pytest.raises(ValueError, match="at_epoch=-1"):
        Switch(rules[0], rules[0], at_epoch=-1)


# --- Two ranks -------------------------------------------------------------------------------------------------------


def test_two_ranks_agree_with_each_other_and_with_one_process(tmp_path: Path) -> None:
    """BatchNorm normalises each rank's half, so weights agree bitwise between ranks but running statistics do not."""
    names = ["nin", "batchnorm"]
    train_as_rank(0, 1, str(tmp_path), names)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=train_as_rank, args=(rank, 2, str(tmp_path), names)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]

    def ends(name: str) -> list[dict[str, Tensor]]:
        return [torch.load(tmp_path / f"{name}-{end}.pt") for end in ("0-of-1", "0-of-2", "1-of-2")]

    alone, first, second = ends("nin")
    for key, value in first.items():
        assert torch.equal(value, second[key])
        torch.testing.assert_close(value, alone[key], rtol=1e-6, atol=1e-6)
    alone, first, second = ends("batchnorm")
    assert all(torch.equal(first[key], second[key]) for key in first if "running" not in key)
    assert not torch.equal(first["2.running_mean"], second["2.running_mean"])
    assert not torch.allclose(first["1.weight"], alone["1.weight"], rtol=1e-6, atol=1e-6)
