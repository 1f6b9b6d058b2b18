"""A recorded step against an ordinary one. Without a GPU, with a recording that runs the step again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tests.helpers import miniatures
from tests.oracles.recording import again
from torch import Tensor, nn

from backforward.models import MLP
from backforward.rules import Backforward, Backprop, StepResult, UpdateRule
from backforward.switch import Switch
from backforward_suite.errors import BadInput
from backforward_suite.train.capture import (
    PATIENCE,
    WARM_UP,
    Captured,
    Replay,
    counts_on_host,
    numbers_outside_state,
    record_cuda,
    set_capturable,
)


def make(rule: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> Backprop | Backforward | Switch:
    if rule == "switch":
        one, other = Backforward(network, optimizer, F.cross_entropy), Backprop(network, optimizer, F.cross_entropy)
        return Switch(one, other, at_epoch=1)
    return {"sgd": Backprop, "bfp": Backforward}[rule](network, optimizer, F.cross_entropy)


def batches(count: int, device: str, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator).to(device), (torch.arange(size) % 3).to(device))
        for _ in range(count)
    ]


ON = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("rule", ["sgd", "bfp", "switch"])
def test_replayed_steps_are_the_ordinary_ones(rule: str, device: str) -> None:
    network = MLP((1, 4, 4), 3, hidden=6, seed=0).to(device)
    alone = copy.deepcopy(network)
    optimizer, other = (torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (network, alone))
    record = again(network, optimizer) if device == "cpu" else record_cuda
    captured, ordinary = Captured(make(rule, network, optimizer), optimizer, record), make(rule, alone, other)
    for epoch in range(3):
        for rule_of_each in (captured, ordinary):
            rule_of_each.set_epoch(epoch)
        if epoch == 2:  # a schedule has moved
            for each in (optimizer, other):
                each.param_groups[0]["lr"] = 0.05
        for x, y in [*batches(6, device), *batches(1, device, size=4)]:
            ours, theirs = captured.step(x, y), ordinary.step(x, y)
            torch.testing.assert_close(ours.loss, theirs.loss)
            torch.testing.assert_close(ours.output, theirs.output)
    torch.testing.assert_close(dict(network.named_parameters()), dict(alone.named_parameters()))
    assert captured.replayed == 3 * (6 - WARM_UP)  # recorded again each epoch, as the smaller batch ends one


def refuse(_: Callable[[], StepResult]) -> tuple[Replay, StepResult]:
    """As CUDA does: what went wrong, and then that the recording did not end."""
    try:
        raise RuntimeError("operation not permitted when stream is capturing\nsearch for cudaError")
    finally:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_what_cannot_be_recorded_is_said_once_and_trained_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    network = MLP((1, 4, 4), 3, hidden=6, seed=0)
    alone = copy.deepcopy(network)
    optimizer, other = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (network, alone))
    captured, ordinary = Captured(make("bfp", network, optimizer), optimizer, refuse), make("bfp", alone, other)
    for x, y in batches(8, "cpu"):
        captured.step(x, y)
        ordinary.step(x, y)
    printed = "steps are not replayed from a CUDA graph: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == printed
    assert captured.replayed == 0
    torch.testing.assert_close(dict(network.named_parameters()), dict(alone.named_parameters()))


def test_what_must_be_recorded_and_cannot_ends_in_one_line() -> None:
    network = MLP((1, 4, 4), 3, hidden=6, seed=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    captured = Captured(make("sgd", network, optimizer), optimizer, refuse, must=True)
    for x, y in batches(WARM_UP, "cpu"):
        captured.step(x, y)
    line = r"^trainer.capture=on: a step cannot be recorded as a CUDA graph \(operation .* capturing\); give [^\n]*$"
    with pytest.raises(BadInput, match=line):
        captured.step(x, y)


@pytest.mark.parametrize("must", [False, True])
def test_a_learning_rate_that_never_rests_is_said_once(must: bool, capsys: pytest.CaptureFixture[str]) -> None:
    network = MLP((1, 4, 4), 3, hidden=6, seed=0)
    alone = copy.deepcopy(network)
    optimizer, other = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (network, alone))
    captured = Captured(make("sgd", network, optimizer), optimizer, again(network, optimizer), must=must)
    ordinary = make("sgd", alone, other)

    def train() -> None:
        for x, y in batches(PATIENCE + 10, "cpu"):
            for each in (optimizer, other):
                each.param_groups[0]["lr"] *= 0.99
            captured.step(x, y)
            ordinary.step(x, y)

    if must:
        with pytest.raises(BadInput, match="the learning rate or the shape of a batch changes too often"):
            train()
    else:
        train()
        (printed,) = capsys.readouterr().err.splitlines()
        assert "changes too often" in printed
        torch.testing.assert_close(dict(network.named_parameters()), dict(alone.named_parameters()))
    assert captured.replayed == 0


def test_a_learning_rate_that_rests_for_a_while_is_recorded_every_time() -> None:
    network = MLP((1, 4, 4), 3, hidden=6, seed=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    captured = Captured(make("sgd", network, optimizer), optimizer, again(network, optimizer), must=True)
    for _ in range(PATIENCE + 5):
        optimizer.param_groups[0]["lr"] *= 0.99
        for x, y in batches(WARM_UP + 1, "cpu"):
            captured.step(x, y)
    assert captured.replayed == PATIENCE + 5


def test_a_rate_in_a_tensor_is_part_of_a_recording_too() -> None:
    network = MLP((1, 4, 4), 3, hidden=6, seed=0)
    alone = copy.deepcopy(network)
    optimizer, other = (torch.optim.SGD(each.parameters(), lr=torch.tensor(0.1)) for each in (network, alone))
    captured = Captured(make("sgd", network, optimizer), optimizer, again(network, optimizer), must=True)
    ordinary = make("sgd", alone, other)
    for rate in (0.1, 0.05):
        for each in (optimizer, other):
            each.param_groups[0]["lr"].fill_(rate)
        for x, y in batches(WARM_UP + 2, "cpu"):
            captured.step(x, y)
            ordinary.step(x, y)
    torch.testing.assert_close(dict(network.named_parameters()), dict(alone.named_parameters()))
    assert captured.replayed == 2 * 2


def test_an_optimizer_that_counted_on_a_gpu_counts_on_the_host_again() -> None:
    network = MLP((1, 4, 4), 3, hidden=6, seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    rule = Backprop(network, optimizer, F.cross_entropy)
    (batch,) = batches(1, "cpu")
    rule.step(*batch)
    (group,) = optimizer.param_groups
    set_capturable(optimizer, [group], True)
    assert not group["capturable"]  # it is on the host
    group["capturable"] = True  # as a checkpoint from a GPU has it
    with pytest.raises(AssertionError, match="capturable"):
        rule.step(*batch)
    set_capturable(optimizer, [group], False)
    rule.step(*batch)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("rule", [Backprop, Backforward])
@pytest.mark.parametrize("kind", [*miniatures.COUNTING.values(), torch.optim.SGD])
def test_counters_outside_the_state_of_parameters_are_seen(
    rule: type[UpdateRule], kind: type[torch.optim.Optimizer]
) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = kind(network.parameters(), lr=0.1)  # type: ignore[call-arg]
    step = partial(rule(network, optimizer, F.cross_entropy).step, torch.ones(2, 4), torch.tensor([0, 1]))
    step()
    before = numbers_outside_state(optimizer)
    step()
    seen = counts_on_host(optimizer, torch.device("cuda")) or numbers_outside_state(optimizer) != before
    assert seen is (kind is not torch.optim.SGD)


@pytest.mark.parametrize(
    ("kind", "counts"), [(torch.optim.SGD, False), (torch.optim.Adagrad, True), (torch.optim.Adam, True)]
)
def test_numbers_that_an_optimizer_keeps_on_the_host_are_seen(kind: type[torch.optim.Optimizer], counts: bool) -> None:
    layer = nn.Linear(2, 2)
    optimizer = kind(layer.parameters(), lr=0.1)  # type: ignore[call-arg]
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert counts_on_host(optimizer, torch.device("cuda")) is counts
    assert not counts_on_host(optimizer, torch.device("cpu"))
