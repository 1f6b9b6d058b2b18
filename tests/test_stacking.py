"""A stack of networks against the same networks one by one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.oracles.recording import again
from tests.test_settings import composed
from torch import Tensor, nn
from torch.func import functional_call

from backforward import readings, runs
from backforward.building import Parts
from backforward.capture import WARM_UP, Captured
from backforward.data import EpochLoader, Images
from backforward.data.stacked import StackedBatches
from backforward.errors import Stopped
from backforward.models import MLP, weight_decay_groups
from backforward.normprop import DataNorm, unit_norm_projection
from backforward.rules import Backforward, Backprop, Rule
from backforward.settings import Settings, plain
from backforward.stack_fitting import Member, _StackTraining, fit_stack
from backforward.stacking import StackedLayer, StackedRule, StackedSGD, StackLoss, keep_, projection, stack, unstack_
from train import train

LRS = (0.1, 0.02, 0.3)


# --- the library -----------------------------------------------------------------------------------------------------


def batches(steps: int, dtype: torch.dtype, shape: Sequence[int] = (1, 4, 4)) -> tuple[Tensor, Tensor]:
    """x [steps, R, B, ...] and y [steps, R, B]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, len(LRS), 8, *shape, generator=generator).to(dtype)
    return x, torch.randint(3, (steps, len(LRS), 8), generator=generator)


RULES: dict[str, tuple[type[Backprop | Backforward], dict[str, Any]]] = {
    "sgd": (Backprop, {}),
    "sgd_repeat": (Backprop, {"repeats": 2}),
    "bfp": (Backforward, {"engine": "replay"}),
    "bfp_naive": (Backforward, {"engine": "naive"}),
    "bfp_poster": (Backforward, {"joint_pass": True}),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
}


@pytest.mark.parametrize("bias", [True, False])
def test_a_stacked_linear_layer_has_the_derivatives_of_the_single_ones(bias: bool) -> None:
    layers = [nn.Linear(4, 3, bias=bias, dtype=torch.float64) for _ in LRS]
    stacked = StackedLayer(layers)
    x = torch.randn(len(LRS), 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    names, values = zip(*stacked.named_parameters(), strict=True)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(stacked, dict(zip(names, values, strict=True)), (x,)).tanh()

    torch.testing.assert_close(stacked(x), torch.stack([layer(one) for layer, one in zip(layers, x, strict=True)]))
    assert torch.autograd.gradcheck(output, (x, *values))
    assert torch.autograd.gradgradcheck(output, (x, *values))


def test_the_optimizer_goes_through_a_gradient_as_it_lies_in_memory() -> None:
    stacked = StackedLayer([nn.Linear(4, 3) for _ in LRS])
    for left in (len(LRS), 2):
        keep_(stacked, torch.arange(left))
        parameters = list(stacked.parameters())
        gradients = torch.autograd.grad(stacked(torch.randn(left, 5, 4)).sum(), parameters)
        assert [each.stride() for each in gradients] == [each.stride() for each in parameters]


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [(torch.float64, 100, 1e-10), (torch.float32, 20, 1e-5)])
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("norm", ["none", "prop"])
@pytest.mark.parametrize("rule", RULES)
def test_a_stack_trains_each_network_as_if_alone(
    rule: str, norm: str, options: dict[str, Any], dtype: torch.dtype, steps: int, tolerance: float
) -> None:
    make, arguments = RULES[rule]
    networks = [MLP((1, 4, 4), 3, hidden=6, depth=2, norm=norm, seed=seed).to(dtype) for seed in range(len(LRS))]
    xs, ys = batches(steps, dtype)

    def optimizer(network: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(weight_decay_groups(network), lr=lr / 10, **options)

    stacked = stack(networks)
    singles = [optimizer(network, lr) for network, lr in zip(networks, LRS, strict=True)]
    names = {p: name for name, p in networks[0].named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in singles[0].param_groups]
    loss = StackLoss()
    of_all = make(stacked, StackedSGD(stacked, groups, singles), loss, after_update=projection(stacked), **arguments)
    seen = []
    for x, y in zip(xs, ys, strict=True):
        loss.seen.clear()
        of_all.step(x, y)
        seen.append(loss.seen[0])

    for place, (network, lr) in enumerate(zip(networks, LRS, strict=True)):
        alone = copy.deepcopy(network)
        of_one = make(
            alone, optimizer(alone, lr), F.cross_entropy, after_update=unit_norm_projection(alone), **arguments
        )
        for step, (x, y) in enumerate(zip(xs[:, place], ys[:, place], strict=True)):
            out = of_one.step(x, y)
            torch.testing.assert_close(seen[step][place], out.loss, rtol=tolerance, atol=tolerance)
        unstack_(network, place, stacked)
        for (name, ours), theirs in zip(network.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("rule", RULES)
def test_a_stack_whose_steps_are_replayed_trains_as_ever(rule: str) -> None:
    make, arguments = RULES[rule]
    xs, ys = batches(12, torch.float64)
    ends, losses = [], []
    for captured in (False, True):
        networks = [MLP((1, 4, 4), 3, hidden=6, seed=seed).double() for seed in range(len(LRS))]
        stacked, loss = stack(networks), StackLoss()
        singles = [
            torch.optim.SGD(each.parameters(), lr=lr, momentum=0.9) for each, lr in zip(networks, LRS, strict=True)
        ]
        optimizer = StackedSGD(stacked, [list(dict(networks[0].named_parameters()))], singles)
        of_all: Rule = StackedRule(make(stacked, optimizer, loss, **arguments), loss)
        if captured:
            of_all = recorded = Captured(of_all, optimizer, again(stacked, optimizer), must=True)
        for number, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if number == 8:  # a schedule moves
                for single in singles:
                    single.param_groups[0]["lr"] /= 2
                optimizer.follow()
            out = of_all.step(x, y)
            assert out.loss.shape == (len(LRS),)
            losses.append(out.loss.clone())
        ends.append(dict(stacked.named_parameters()))
    torch.testing.assert_close(*ends)
    torch.testing.assert_close(losses[:12], losses[12:])
    assert recorded.replayed == 12 - 2 * WARM_UP


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda: MLP((1, 4, 4), 3, hidden=6, norm="batch"), "BatchNorm1d"),
        (lambda: MLP((1, 4, 4), 3, hidden=6, dropout=0.5), "Dropout"),
        (lambda: MLP((1, 4, 4), 3, hidden=6, activation="prelu"), "PReLU"),
        (lambda: DataNorm("batch", shape=(1, 4, 4)), "DataNorm"),
    ],
)
def test_other_layers_are_refused(network: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} cannot be stacked"):
        stack([network(), network()])


def test_some_networks_of_a_stack_go_on_without_the_others() -> None:
    networks = [MLP((1, 4, 4), 3, hidden=6, seed=seed) for seed in range(3)]
    stacked = stack(networks)
    optimizers = [
        torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9) for network, lr in zip(networks, LRS, strict=True)
    ]
    optimizer = StackedSGD(stacked, [list(dict(networks[0].named_parameters()))], optimizers)
    rule = Backforward(stacked, optimizer, StackLoss())
    xs, ys = batches(4, torch.float32)
    others = copy.deepcopy(networks)
    for x, y in zip(xs[:2], ys[:2], strict=True):
        rule.step(x, y)
    chosen = torch.tensor([0, 2])
    keep_(stacked, chosen)
    optimizer.keep_(chosen)
    for x, y in zip(xs[2:, chosen], ys[2:, chosen], strict=True):
        rule.step(x, y)
    for place, of_all in ((0, 0), (1, 2)):
        alone = others[of_all]
        of_one = Backforward(alone, torch.optim.SGD(alone.parameters(), lr=LRS[of_all], momentum=0.9), F.cross_entropy)
        for x, y in zip(xs[:, of_all], ys[:, of_all], strict=True):
            of_one.step(x, y)
        unstack_(networks[of_all], place, stacked)
        torch.testing.assert_close(dict(networks[of_all].named_parameters()), dict(alone.named_parameters()))


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_stacked_batches_are_those_of_the_loaders(augment: str) -> None:
    x = torch.arange(10 * 6, dtype=torch.uint8).view(10, 1, 2, 3)
    loaders = [EpochLoader(Images(x, torch.arange(10)), 3, seed=seed, augment=augment) for seed in (4, 5, 6)]
    stacked = StackedBatches(loaders)
    found = []
    for place, batch in enumerate(stacked.epoch(2)):
        found.append(batch)
        if place == 1:
            stacked.keep_([0, 2])
    assert [tuple(y.shape) for _, y in found] == [(3, 3), (3, 3), (2, 3)]
    for seed, places in ((0, (0, 0, 0)), (2, (2, 2, 1))):
        loaders[seed].set_epoch(2)
        for (xs, ys), (one, labels), place in zip(found, loaders[seed], places, strict=True):
            assert torch.equal(xs[place], one)
            assert torch.equal(ys[place], labels)
    (rest, _), (other, _) = next(StackedBatches(loaders).epoch(2, start=2)), found[2]
    assert torch.equal(rest[[0, 2]], other)


# --- whole runs ------------------------------------------------------------------------------------------------------

SMALL = ("data=digits", "batch_size=32", "model.hidden=16", "trainer.accelerator=cpu", "max_epochs=2")


def members(root: Path | None, results: dict[str, runs.Result], *overrides: str, lrs: Sequence[float]) -> list[Member]:
    made, data = [], None
    for place, lr in enumerate(lrs):
        cfg = composed(*SMALL, f"seed={place}", f"lr={lr}", *overrides)
        settings = Settings.check(cfg)
        parts = Parts(cfg, settings, data)
        data = parts.data
        folder = None if root is None else root / str(place)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        write = lambda result, key=str(place): results.__setitem__(key, result)  # noqa: E731
        made.append(Member(settings, plain(cfg), {}, *parts.training(), folder=folder, write=write))
    return made


def numbers(row: dict[str, float | None]) -> dict[str, float]:
    """Nothing measured (or not finite) as a number of its own."""
    return {key: -1.0 if value is None else value for key, value in row.items()}


def without_timing(result: runs.Result) -> dict[str, Any]:
    return {key: value for key, value in json.loads(json.dumps(result)).items() if key not in ("timing", "hardware")}


SETTINGS = {
    "sgd": "method=sgd",
    "bfp": "method=bfp",
    "bfp_poster, momentum, stepwise": (
        "method=bfp_poster optimizer=sgd_momentum schedule=cosine schedule.interval=step schedule.T_max=100"
    ),
    "sgd_repeat, halved": "method=sgd_repeat schedule=halve schedule.step_size=1",
    "bfp_warmup, NormProp, decay, flips": (
        "method=bfp_warmup method.at_epoch=1 norm=prop data_norm=global weight_decay=1e-3 data.augment=flip"
    ),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_stack_leaves_what_single_runs_leave(settings: str, tmp_path: Path) -> None:
    overrides = [*settings.split(), "trainer.precision=64-true"]
    results: dict[str, runs.Result] = {}
    fit_stack(members(tmp_path / "stack", results, *overrides, lrs=LRS))
    for place, lr in enumerate(LRS):
        folder = tmp_path / "single" / str(place)
        single = train(composed(*SMALL, f"seed={place}", f"lr={lr}", *overrides), folder)
        ours, theirs = (
            without_timing({**result, "final": None, "best": None, "choices": None})
            for result in (results[str(place)], single)
        )
        assert ours == theirs
        assert numbers(results[str(place)]["final"]) == pytest.approx(numbers(single["final"]), rel=1e-9, abs=1e-9)
        rows, others = runs.read_metrics(tmp_path / "stack" / str(place)), runs.read_metrics(folder)
        assert [list(row) for row in rows] == [list(row) for row in others]
        for row, other in zip(rows, others, strict=True):
            assert numbers(row) == pytest.approx(numbers(other), rel=1e-9, abs=1e-9)
        assert list((tmp_path / "stack" / str(place)).glob("events.out.*"))


def test_networks_leave_a_stack_of_which_a_graph_is_still_held() -> None:
    networks = [MLP((1, 4, 4), 3, hidden=8, seed=seed) for seed in range(3)]
    stacked, left = stack(networks), stack([networks[0], networks[2]])
    x, kept = torch.randn(3, 8, 1, 4, 4), torch.tensor([0, 2])
    held = stacked(x).sum()
    keep_(stacked, kept)
    for network in (stacked, left):
        network(x[kept]).square().sum().backward()
    for name, parameter in left.named_parameters():
        assert torch.equal(stacked.get_parameter(name).grad, parameter.grad)
    assert held.requires_grad


@pytest.mark.parametrize("lagging", [False, True])
def test_a_diverged_run_leaves_the_stack_and_its_record(
    lagging: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "_lags", lambda _: lagging)  # as on a GPU
    lrs = (0.1, 1e30, 0.02)
    overrides = ("trainer.log_every_n_steps=7", "method=bfp")
    results: dict[str, runs.Result] = {}
    fit_stack(members(tmp_path, results, *overrides, lrs=lrs))
    assert [results[str(place)]["status"] for place in range(3)] == ["finished", "diverged", "finished"]
    for place, lr in enumerate(lrs):
        single = train(composed(*SMALL, f"seed={place}", f"lr={lr}", *overrides), tmp_path / f"single{place}")
        assert single["final"]["step"] == results[str(place)]["final"]["step"]
        validation = [each["final"]["accuracy/validation"] for each in (single, results[str(place)])]
        assert validation[0] == pytest.approx(validation[1], abs=0.01)
        assert len(runs.read_metrics(tmp_path / str(place))) == len(runs.read_metrics(tmp_path / f"single{place}"))
        curves = [EventAccumulator(str(tmp_path / name)).Reload() for name in (str(place), f"single{place}")]
        points, others = ([event.step for event in curve.Scalars("loss/batch")] for curve in curves)
        assert points == others


@pytest.mark.parametrize(
    ("step", "lagging"), [(1, False), (17, False), (40, False), (63, False), (7, True), (10, True), (63, True)]
)
def test_a_stack_told_to_end_goes_on_as_if_it_had_not_been(
    step: int, lagging: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "_lags", lambda _: lagging)  # as on a GPU
    lrs: tuple[float, ...] = LRS
    overrides: tuple[str, ...] = ("method=bfp", "optimizer=sgd_momentum")
    if lagging:  # what the look at batch 7 asks for, the one at 14 is given, in another process
        lrs, overrides = (0.1, 1e30, 0.3), (*overrides, "trainer.log_every_n_steps=7")
    else:
        overrides = (*overrides, "schedule=cosine", "schedule.interval=step")
    whole: dict[str, runs.Result] = {}
    fit_stack(members(tmp_path / "whole", whole, *overrides, lrs=lrs))
    assert (whole["1"]["status"], whole["1"]["final"]["step"]) == (("diverged", 14) if lagging else ("finished", 80))

    train_on = _StackTraining._train_on

    def then_told(self: _StackTraining, x: Tensor, y: Tensor) -> None:
        train_on(self, x, y)
        if self.step == step:
            self.told_to_end.set()

    checkpoint, cut = tmp_path / "stack.ckpt", dict[str, runs.Result]()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(_StackTraining, "_train_on", then_told)
        fit_stack(members(tmp_path / "cut", cut, *overrides, lrs=lrs), checkpoint)
    assert [*cut] == (["1"] if lagging and step > 14 else [])
    fit_stack(members(tmp_path / "cut", cut, *overrides, lrs=lrs), checkpoint)
    assert not checkpoint.exists()
    for place in range(len(lrs)):
        one, other = (tmp_path / name / str(place) / "metrics.csv" for name in ("cut", "whole"))
        assert one.read_bytes() == other.read_bytes()
        assert cut[str(place)]["final"] == whole[str(place)]["final"]
        if lagging:
            curves = [EventAccumulator(str(tmp_path / name / str(place))).Reload() for name in ("cut", "whole")]
            ours, theirs = ([(e.step, repr(e.value)) for e in each.Scalars("loss/batch")] for each in curves)
            assert ours == theirs
