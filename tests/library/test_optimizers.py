"""One optimizer that acts as one per group, against one optimizer object per group."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.helpers import miniatures
from tests.oracles import one_per_group
from torch import Tensor, nn
from torch.optim import Optimizer

from backforward.optimizers import OnePerGroup
from backforward.rules import Backforward, Backprop
from backforward.switch import Switch

Make = Callable[[list[dict[str, Any]]], Optimizer]

GROUPS = [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["4.weight", "4.bias"]]
BATCHES = 12

TORCH: dict[str, Make] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "sgd-maximize": partial(torch.optim.SGD, lr=0.1, maximize=True),
    "adam": torch.optim.Adam,
    "adam-tensor-lr": lambda groups: torch.optim.Adam(groups, lr=torch.tensor(0.01)),
    "adam-list-betas": partial(torch.optim.Adam, betas=[0.9, 0.99]),
    "amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "adam-foreach": partial(torch.optim.Adam, foreach=True),
    "adam-fused": partial(torch.optim.Adam, fused=True),
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adadelta": torch.optim.Adadelta,
    "adagrad": torch.optim.Adagrad,
    "adagrad-fused": partial(torch.optim.Adagrad, fused=True),
    "asgd": torch.optim.ASGD,
    "rmsprop": partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "rprop": torch.optim.Rprop,
    "adafactor": torch.optim.Adafactor,
}
OTHERS: dict[str, Make] = {"needs-every-gradient": miniatures.NeedsEveryGradient, "draws": miniatures.Draws}

each = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in miniatures.COUNTING.items()])
each_of_all = pytest.mark.parametrize(
    "make", [pytest.param(make, id=name) for name, make in (TORCH | miniatures.COUNTING | OTHERS).items()]
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def batches(count: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 5, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(count)]


def split(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Return two param groups: weights with decay (if the optimizer supports it), then biases."""
    parts = [{"params": [p for p in parameters if (p.dim() > 1) == weights], "tag": str(weights)} for weights in (1, 0)]
    return [part for part in parts if part["params"]]


def one_each(make: Make, model: nn.Module, groups: Sequence[Sequence[str]] = GROUPS) -> list[list[Optimizer]]:
    named = dict(model.named_parameters())
    return [[make(split([named[name] for name in names]))] for names in groups]


def same(model: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


def halve(optimizers: Sequence[Optimizer], batch: int) -> None:
    if batch == 5:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 0.5 if not isinstance(group["lr"], Tensor) else group["lr"].mul_(0.5)


# --- One optimizer per group -----------------------------------------------------------------------------------------


@each_of_all
@pytest.mark.parametrize(
    "how", [{}, {"max_grad_norm": 0.2}, {"joint": True}, {"max_grad_norm": 0.2, "joint": True}], ids="-".join
)
def test_equals_one_optimizer_per_group(make: Make, how: dict[str, Any]) -> None:
    model, oracle = network(), network()
    optimizer = make(split(list(model.parameters())))
    rule = Backforward(
        model, optimizer, F.cross_entropy, max_grad_norm=how.get("max_grad_norm"), joint_pass="joint" in how
    )
    change = (lambda *_: None) if make is miniatures.ChangesItsLearningRate else halve
    torch.manual_seed(7)
    for batch, (x, y) in enumerate(batches()):
        change([optimizer], batch)
        rule.step(x, y)
    optimizers = one_each(make, oracle)
    torch.manual_seed(7)
    one_per_group.train(
        oracle,
        optimizers,
        GROUPS,
        F.cross_entropy,
        batches(),
        before_batch=lambda batch: change([own[0] for own in optimizers], batch),
        **how,
    )
    assert same(model, oracle)
    assert not same(model, network())
    for own, names in zip(optimizers, GROUPS, strict=True):
        for name in names:
            ours = optimizer.state.get(model.get_parameter(name), {})
            theirs = own[0].state.get(oracle.get_parameter(name), {})
            assert ours.keys() == theirs.keys()
            assert all(torch.as_tensor(ours[key]).equal(torch.as_tensor(theirs[key])) for key in ours)


@each
@pytest.mark.parametrize("loaded", ["before the rule", "after the rule", "after a batch"])
def test_resuming_from_a_checkpoint_is_bitwise(make: Make, loaded: str) -> None:
    model, other = network(), network()
    optimizer, new = (make(split(list(m.parameters()))) for m in (model, other))
    rule = Backforward(model, optimizer, F.cross_entropy)
    for x, y in batches()[:5]:
        rule.step(x, y)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for x, y in batches()[5:]:
        rule.step(x, y)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    if loaded == "before the rule":
        new.load_state_dict(saved["optimizer"])
    rule = Backforward(other, new, F.cross_entropy)
    if loaded == "after a batch":
        rule.step(*batches()[-1])
    if loaded != "before the rule":
        new.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["model"])
    for x, y in batches()[5:]:
        rule.step(x, y)
    assert same(model, other)


def test_later_batches_do_not_change_a_saved_state() -> None:
    model = network()
    optimizer = miniatures.CountsInGroups(model.parameters())
    rule = Backforward(model, optimizer, F.cross_entropy)
    rule.step(*batches()[0])
    saved = copy.deepcopy(optimizer.state_dict())
    shallow = optimizer.state_dict()
    rule.step(*batches()[1])
    assert shallow["param_groups"] == saved["param_groups"]


@pytest.mark.parametrize("make", [TORCH["adam"], miniatures.CountsInGroups, miniatures.ScheduleFree], ids=str)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_scheduler_reaches_all_groups(make: Make, before: bool) -> None:
    def schedule(optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)

    model, oracle = network(), network()
    optimizer = make(split(list(model.parameters())))
    scheduler = schedule(optimizer) if before else None
    rule = Backforward(model, optimizer, F.cross_entropy)
    scheduler = scheduler or schedule(optimizer)
    optimizers = one_each(make, oracle)
    schedulers = [schedule(own[0]) for own in optimizers]
    for each in (optimizer, *(own[0] for own in optimizers)):
        if isinstance(each, miniatures.ScheduleFree):
            each.train()
    for x, y in batches():
        rule.step(x, y)
        scheduler.step()  # would warn, and so fail, if it had not seen the optimizer step

    def step_schedulers(batch: int) -> None:
        for one in schedulers if batch else []:
            one.step()

    one_per_group.train(oracle, optimizers, GROUPS, F.cross_entropy, batches(), before_batch=step_schedulers)
    assert same(model, oracle)


def test_values_set_by_the_user_override_counters() -> None:
    model = network()
    optimizer = miniatures.ChangesItsLearningRate(model.parameters(), lr=0.1)
    rule = Backforward(model, optimizer, lambda output, target: output.sum())
    x, y = batches()[0]
    rule.step(x, y)
    rule.step(x, y)
    optimizer.param_groups[0]["lr"] = 1.0
    bias = model[4].bias.clone()  # its gradient is the number of samples
    rule.step(x, y)
    assert torch.equal(model[4].bias, bias - 4.0 * 1.0)
    rule.step(x, y)
    assert torch.allclose(model[4].bias, bias - 4.0 * 1.8)


def test_schedule_free_evaluates_at_the_average_of_each_group() -> None:
    model, oracle = network(), network()
    optimizer = miniatures.ScheduleFree(model.parameters())
    rule = Backforward(model, optimizer, F.cross_entropy)
    with pytest.raises(RuntimeError, match="call train"):
        rule.step(*batches()[0])
    optimizers = one_each(miniatures.ScheduleFree, oracle)

    def evaluate(ours: bool, batch: int) -> None:
        for each in [optimizer] if ours else [own[0] for own in optimizers]:
            if batch % 4 == 0:
                each.eval()
                each.train()

    for batch, (x, y) in enumerate(batches()):
        evaluate(True, batch)
        rule.step(x, y)
    one_per_group.train(
        oracle, optimizers, GROUPS, F.cross_entropy, batches(), before_batch=lambda batch: evaluate(False, batch)
    )
    assert same(model, oracle)
    at_training = copy.deepcopy(model)
    for each in (optimizer, *(own[0] for own in optimizers)):
        each.eval()
    assert same(model, oracle)
    assert not same(model, at_training)


# --- All parameters at once ------------------------------------------------------------------------------------------


@each_of_all
@pytest.mark.parametrize(
    "rule", [Backprop, partial(Backforward, groups=1), partial(Backprop, repeats=2)], ids=["sgd", "one-group", "repeat"]
)
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
def test_a_step_of_all_parameters_is_an_ordinary_one(make: Make, rule: Callable[..., Any], frozen: bool) -> None:
    model, plain = network(), network()
    for each in (model, plain):
        each[0].weight.requires_grad_(not frozen)
    optimizer = make(split(list(model.parameters())))
    held = [p for p in plain.parameters() if p.requires_grad or make is not miniatures.NeedsEveryGradient]
    alone = make(split(held))
    torch.manual_seed(7)
    updates = rule(model, optimizer, F.cross_entropy)
    for x, y in batches(3):
        updates.step(x, y)
    torch.manual_seed(7)
    for x, y in batches(3):
        for _ in range(getattr(updates, "repeats", 1)):
            alone.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            alone.step()
    assert same(model, plain)
    if make is not miniatures.NeedsEveryGradient:
        ours, theirs = io.BytesIO(), io.BytesIO()
        torch.save(optimizer.state_dict(), ours)
        torch.save(alone.state_dict(), theirs)
        assert ours.getvalue() == theirs.getvalue()


class Counter(miniatures.Mini):
    """Adds to each parameter the number of steps taken, counted in three places."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, k=0)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.steps += 1
        self.state["all"] = self.state.get("all", 0) + 1
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(torch.tensor([group["k"], self.steps, self.state["all"]]))


def test_counters_follow_the_parameters_when_groups_change() -> None:
    a, b, c, d = (nn.Parameter(torch.zeros(3)) for _ in range(4))
    one = OnePerGroup(Counter([a, b, c, d]))

    def step(group: tuple[nn.Parameter, ...]) -> list[float]:
        for p in group:
            p.grad = torch.ones(3)
        one.step(group, one.optimizer.step)
        for p in group:
            p.grad = None
            assert torch.equal(p, group[0])
        return group[0].tolist()

    assert step((a, b)) == [1, 1, 1]
    assert step((a, b)) == [2, 2, 2]
    assert step((c, d)) == [1, 1, 1]  # a group of its own
    assert step((b, c)) == [3, 3, 3]  # continues from the counters of b, its first parameter
    assert step((a,)) == [3, 3, 3]  # the rest of the first group
    assert step((d,)) == [2, 2, 2]
    assert "backforward" in one.optimizer.param_groups[0]
    everything = (a, b, c, d)
    assert step(everything) == [4, 4, 4]  # continues from a's
    assert "backforward" not in one.optimizer.param_groups[0]
    assert one.optimizer.param_groups[0]["k"] == one.optimizer.steps == one.optimizer.state["all"] == 4
    assert step((c,)) == step((d,)) == [5, 5, 5]
    assert step((c,)) == [6, 6, 6]


def test_counters_stay_with_their_group_when_param_groups_are_added() -> None:
    model = network()
    optimizer = miniatures.CountsInGroups(model[4].parameters())
    with pytest.warns(UserWarning, match="no optimizer has"):
        rule = Backforward(model, optimizer, F.cross_entropy)
    rule.step(*batches()[0])
    assert optimizer.param_groups[0]["k"] == 1  # one group has all its parameters
    optimizer.add_param_group({"params": list(model[0].parameters())})
    rule.step(*batches()[1])
    assert optimizer.param_groups[0]["k"] == 1
    assert {
        counters[key][0]
        for counters in optimizer.param_groups[0]["backforward"].values()
        for key in counters
        if key[1] == "k"
    } == {1, 2}


@pytest.mark.parametrize("backforward_first", [True, False], ids=["warmup", "finetune"])
def test_counters_continue_after_a_switch(backforward_first: bool) -> None:
    model = network()
    optimizer = miniatures.CountsInGroups(model.parameters())
    rules = [Backforward(model, optimizer, F.cross_entropy), Backprop(model, optimizer, F.cross_entropy)]
    rule = Switch(*(rules if backforward_first else rules[::-1]), at_epoch=1)
    for epoch in (0, 1):
        rule.set_epoch(epoch)
        for x, y in batches(4):
            rule.step(x, y)

    oracle = network()
    optimizers = [
        own[0]
        for own in one_each(
            lambda groups: miniatures.CountsInGroups([p for group in groups for p in group["params"]]), oracle
        )
    ]
    whole = miniatures.CountsInGroups(oracle.parameters())

    def plain() -> None:
        for x, y in batches(4):
            oracle.zero_grad()
            F.cross_entropy(oracle(x), y).backward()
            whole.step()

    def hand_over(source: Optimizer, target: Optimizer) -> None:
        for key in ("k", "weight_sum"):
            target.param_groups[0][key] = source.param_groups[0][key]

    if not backforward_first:
        plain()
        for own in optimizers:
            hand_over(whole, own)
    one_per_group.train(oracle, [[own] for own in optimizers], GROUPS, F.cross_entropy, batches(4))
    if backforward_first:
        hand_over(optimizers[0], whole)
        plain()
    assert same(model, oracle)


# --- What must not change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", list(miniatures.COUNTING.values()))
def test_a_step_that_fails_leaves_the_optimizer_as_it_was(make: Make) -> None:
    model = network()
    optimizer = make(split(list(model.parameters())))

    def step(last: bool) -> None:
        optimizer.step()
        if fail:
            raise KeyboardInterrupt

    fail = False
    rule = Backforward(model, optimizer, F.cross_entropy, step=step)
    rule.step(*batches()[0])
    groups = optimizer.param_groups
    held = [list(group["params"]) for group in groups]
    tags = [group["tag"] for group in groups]
    attributes = {name: value for name, value in vars(optimizer).items() if not isinstance(value, Tensor)}
    fail = True
    with pytest.raises(KeyboardInterrupt):
        rule.step(*batches()[1])
    assert optimizer.param_groups is groups
    assert [group["tag"] for group in groups] == tags
    assert all(
        p is q for group, old in zip(groups, held, strict=True) for p, q in zip(group["params"], old, strict=True)
    )
    assert all(vars(optimizer)[name] == value for name, value in attributes.items() if name != "nothing")
    assert "late" not in vars(optimizer)


def test_a_step_sees_its_group_alone_and_hooks_run_once_each() -> None:
    model = network()
    optimizer = miniatures.CountsInGroups(split(list(model.parameters())))
    names = {id(p): name for name, p in model.named_parameters()}
    seen: list[tuple[list[str], list[str], int]] = []

    def hook(optimizer: Optimizer, *_: Any) -> None:
        shown = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        moving = [name for name, p in model.named_parameters() if p.grad is not None]
        assert all("backforward" not in group for group in optimizer.param_groups)
        seen.append((shown, moving, optimizer.param_groups[0]["k"]))

    optimizer.register_step_pre_hook(hook)
    rule = Backforward(model, optimizer, F.cross_entropy, joint_pass=True)
    rule.step(*batches()[0])
    assert seen == [(group, group, 0) for group in GROUPS] + [(group, group, 1) for group in GROUPS]


def test_torchs_optimizers_need_no_counters() -> None:
    everyone = {c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, Optimizer)}
    tested = {type(make(split(list(network().parameters())))) for make in TORCH.values()}
    elsewhere = {torch.optim.Muon, torch.optim.SparseAdam, torch.optim.LBFGS}  # tested below: lists, sparse, refused
    assert everyone - {Optimizer} == tested | elsewhere
    for make in TORCH.values():
        model = network()
        optimizer = make(split(list(model.parameters())))
        rule = Backforward(model, optimizer, F.cross_entropy)
        for x, y in batches(3):
            rule.step(x, y)
        assert all("backforward" not in group for group in optimizer.param_groups)


# --- Several optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"max_grad_norm": 0.2}, {"joint": True}], ids="-".join)
def test_several_optimizers_share_the_groups(how: dict[str, Any]) -> None:
    def make(parameters: Sequence[nn.Parameter]) -> list[Optimizer]:
        matrices, rest = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]
        return [torch.optim.Muon(matrices), miniatures.CountsInGroups(rest)]

    model, oracle = network(), network()
    rule = Backforward(
        model,
        make(list(model.parameters())),
        F.cross_entropy,
        max_grad_norm=how.get("max_grad_norm"),
        joint_pass="joint" in how,
    )
    for x, y in batches():
        rule.step(x, y)
    optimizers = [make([oracle.get_parameter(name) for name in names]) for names in GROUPS]
    one_per_group.train(oracle, optimizers, GROUPS, F.cross_entropy, batches(), **how)
    assert same(model, oracle)
    assert not torch.equal(model[4].bias, network()[4].bias)


def test_an_optimizer_without_parameters_in_a_group_does_not_step() -> None:
    model = network()
    first, rest = (miniatures.CountsInGroups(list(part.parameters())) for part in (model[:1], model[1:]))
    rule = Backforward(model, [first, rest], F.cross_entropy)
    for x, y in batches(3):
        rule.step(x, y)
    assert first.param_groups[0]["k"] == 3  # one group has all its parameters, so it counts itself
    assert {counters[0, "k"][0] for counters in rest.param_groups[0]["backforward"].values()} == {3}


def test_warns_of_weights_without_an_optimizer() -> None:
    model = network()
    with pytest.warns(UserWarning, match=r"Backprop: no optimizer has 0\.weight, 0\.bias: not trained"):
        Backprop(model, torch.optim.SGD(model[1:].parameters(), lr=0.1), F.cross_entropy)
    model[0].requires_grad_(False)
    Backprop(model, torch.optim.SGD(model[1:].parameters(), lr=0.1), F.cross_entropy)


# --- Sparse gradients ------------------------------------------------------------------------------------------------


class Embedded(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 4, sparse=sparse)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).mean(1))


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_sparse_gradients(max_grad_norm: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randint(9, (4, 5), generator=generator), torch.tensor([0, 1, 2, 0])) for _ in range(BATCHES)]
    model, dense = Embedded(sparse=True), Embedded(sparse=False)
    for each in (model, dense):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        rule = Backforward(each, optimizer, F.cross_entropy, max_grad_norm=max_grad_norm)
        for x, y in data:
            rule.step(x, y)
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    model, oracle = Embedded(sparse=True), Embedded(sparse=True)

    def make(each: Embedded) -> list[Optimizer]:
        return [torch.optim.SparseAdam(each.embedding.parameters()), torch.optim.SGD(each.head.parameters(), lr=0.5)]

    rule = Backforward(model, make(model), F.cross_entropy, max_grad_norm=max_grad_norm)
    for x, y in data:
        rule.step(x, y)
    if max_grad_norm is None:
        groups = [["embedding.weight"], ["head.weight", "head.bias"]]
        one_per_group.train(oracle, [[own] for own in make(oracle)], groups, F.cross_entropy, data)
        assert same(model, oracle)


# --- Refusals --------------------------------------------------------------------------------------------------------


class Lookahead:
    """A wrapper that is no Optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


def test_refuses_what_is_no_optimizer() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for given, message in [
        (Lookahead(sgd), r"optimizer is a Lookahead; give the SGD that it wraps \(its .optimizer\)"),
        (torch.amp.GradScaler("cpu"), "optimizer is a GradScaler; its scale moves within a batch"),
        (torch.optim.SGD, "optimizer is a type; give a torch.optim.Optimizer"),
        ([sgd, None], "optimizer is a NoneType; give a torch.optim.Optimizer"),
    ]:
        with pytest.raises(TypeError, match=f"^Backforward: {message}"):
            Backforward(model, given, F.cross_entropy)


def test_refuses_bad_lists_of_optimizers() -> None:
    model = network()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(ValueError, match=r"0\.weight is in two optimizers"):
        Backforward(model, [first, second], F.cross_entropy)
    with pytest.raises(ValueError, match="the list of optimizers is empty"):
        Backforward(model, [], F.cross_entropy)
    parts = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[:2], model[2:])]
    with pytest.raises(ValueError, match="step= takes the step of one optimizer"):
        Backforward(model, parts, F.cross_entropy, step=lambda last: None)
    with pytest.raises(ValueError, match=r"engine='shortcut' needs torch\.optim\.SGD"):
        Backforward(model, parts, F.cross_entropy, engine="shortcut")


# --- docs/optimizers.md ----------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
def test_the_examples_in_the_docs_run(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(example.split()[1])
    exec(compile(example, str(PAGE), "exec"), {})
    assert capsys.readouterr().out
