"""Training under Lightning against bare loops, and a run cut off anywhere against one that was not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.conftest import Command
from tests.test_settings import composed
from torch import nn

from backforward import readings, runs
from backforward.building import Parts
from backforward.callbacks.checkpoint import Checkpoints, read_checkpoint
from backforward.callbacks.record import RunRecord
from backforward.callbacks.stopping import why_stop
from backforward.data import EpochLoader, load_data
from backforward.errors import Stopped
from backforward.fitting import ProgressBar
from backforward.hardware import cpu_model
from backforward.models import MLP, NIN
from backforward.normprop import DataNorm
from backforward.runs import Result
from backforward.settings import Settings
from train import train as train_alone

SMALL = ("data=digits", "batch_size=32", "model.hidden=16", "trainer.accelerator=cpu")


def trained(folder: Path | None, *overrides: str) -> Result:
    return train_alone(composed(*SMALL, *overrides), folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def network_and_loader(seed: int = 0) -> tuple[nn.Sequential, EpochLoader]:
    data = load_data("digits", Path("nowhere"))
    network = nn.Sequential()
    network.add_module("data_norm", DataNorm.fit("channel", data.train.x))
    network.add_module("model", MLP(data.shape, data.classes, hidden=16, seed=seed))
    return network, EpochLoader(data.train, 32, seed=seed)


def as_trained(network: nn.Module) -> dict[str, torch.Tensor]:
    return {f"network.{key}": value for key, value in network.state_dict().items()}


def only_network(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if key.startswith("network.")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is CUDA here")
def test_auto_is_no_gpu_but_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.accelerators.mps.MPSAccelerator.is_available", lambda: True)
    result = trained(None, "trainer.accelerator=auto", "max_epochs=1")  # on Apple's, Lightning would fail or differ
    assert result["hardware"]["device"] == cpu_model()


def test_sgd_is_a_bare_loop(tmp_path: Path) -> None:
    trained(tmp_path, "method=sgd", "max_epochs=2", "lr=0.1")

    network, loader = network_and_loader()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()

    assert same(only_network(weights(tmp_path)), as_trained(network))


def test_bfp_is_a_ten_line_loop(tmp_path: Path) -> None:
    trained(tmp_path, "method=bfp", "max_epochs=2", "lr=0.1")

    network, loader = network_and_loader()
    groups = [list(network.model.hidden1.parameters()), list(network.model.head.parameters())]
    for epoch in range(2):
        loader.set_epoch(epoch)
        for x, y in loader:
            for group in groups:
                loss = F.cross_entropy(network(x), y)
                for weight, gradient in zip(group, torch.autograd.grad(loss, group), strict=True):
                    weight.data.add_(gradient, alpha=-0.1)

    assert same(only_network(weights(tmp_path)), as_trained(network))


def test_bfp_with_one_group_is_sgd(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    trained(one, "method=bfp", "method.groups=1", "max_epochs=2", "optimizer=sgd_momentum")
    trained(other, "method=sgd", "max_epochs=2", "optimizer=sgd_momentum")
    assert same(weights(one), weights(other))
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


def test_the_shortcut_engine_is_replay_but_for_rounding(tmp_path: Path) -> None:
    replay, shortcut = tmp_path / "replay", tmp_path / "shortcut"
    for engine, folder in (("replay", replay), ("shortcut", shortcut)):
        trained(folder, "method=bfp", f"method.engine={engine}", "max_epochs=1", "trainer.precision=64-true")
    one, other = weights(replay), weights(shortcut)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-9, atol=1e-9)
    assert runs.read_metrics(shortcut)[-1]["step"] == 40


METHODS = ["sgd", "bfp", "bfp_naive", "bfp_poster", "sgd_repeat", "bfp_warmup", "bfp_finetune"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_alike_and_counts_batches(method: str, tmp_path: Path) -> None:
    result = trained(tmp_path, f"method={method}", "max_epochs=1")
    before, after = runs.read_metrics(tmp_path)

    network, _ = network_and_loader()
    data = load_data("digits", Path("nowhere"))
    with torch.no_grad():
        loss = F.cross_entropy(network(data.validation.x.float() / 255), data.validation.y)
    assert before["loss/validation"] == pytest.approx(loss.item(), rel=1e-6)
    assert after["step"] == 1297 // 32  # one global step a batch, however many updates
    assert after["loss/validation"] < before["loss/validation"]
    assert ("loss/train_joint" in after) == (method == "bfp_poster")
    assert result["status"] == "finished"


def test_training_metrics_are_from_before_the_update(tmp_path: Path) -> None:
    result = trained(tmp_path, "method=bfp", "max_epochs=1", "lr=0")
    network, loader = network_and_loader()
    with torch.no_grad():
        losses = [F.cross_entropy(network(x), y).item() for x, y in loader]
    assert result["final"]["loss/train"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert same(only_network(weights(tmp_path)), as_trained(network))


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(tmp_path: Path) -> None:
    result = trained(tmp_path, "lr=1e30", "max_epochs=3", "trainer.log_every_n_steps=5")
    assert result["status"] == "diverged"
    assert result["final"]["loss/train"] is None
    assert result["final"]["step"] < 40  # it did not wait for the end of the epoch
    assert len(runs.read_metrics(tmp_path)) == 2


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a look within an epoch gives what the look before asked for."""
    monkeypatch.setattr(readings, "_lags", lambda _: True)


def points(folder: Path) -> list[tuple[int, float]]:
    """Of the loss within epochs, as TensorBoard has them."""
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars("loss/batch")]


def test_looks_that_lag_write_the_same_curves(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("max_epochs=2", "trainer.log_every_n_steps=7", "trainer.progress_bar=true")
    shown: list[dict[str, Any]] = []
    get_metrics = ProgressBar.get_metrics
    monkeypatch.setattr(ProgressBar, "get_metrics", lambda *given: shown.append(get_metrics(*given)) or shown[-1])
    trained(tmp_path / "at once", *settings)
    request.getfixturevalue("lagging")
    trained(tmp_path / "late", *settings)
    assert points(tmp_path / "late") == points(tmp_path / "at once")
    assert [step for step, _ in points(tmp_path / "late")] == list(range(7, 81, 7))
    *_, last = runs.read_metrics(tmp_path / "late")
    bar = [each for each in shown if each]
    assert bar[-1] == {"loss": f"{last['loss/train']:.3f}", "accuracy": f"{last['accuracy/train']:.3f}"}
    assert (tmp_path / "late" / "metrics.csv").read_bytes() == (tmp_path / "at once" / "metrics.csv").read_bytes()


def test_a_checkpoint_leaves_no_point_of_a_curve_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def look(_: RunRecord, trainer: L.Trainer, *__: Any) -> None:
        if trainer.global_step == 23:  # a checkpoint after every batch; a process killed now would write no more
            found.append(points(tmp_path))

    monkeypatch.setattr(RunRecord, "before_batch", look)
    trained(tmp_path, "max_epochs=1", "trainer.log_every_n_steps=5", "trainer.checkpoint_minutes=1e-9")
    assert [[step for step, _ in each] for each in found] == [[5, 10, 15, 20]]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("trainer.capture=auto",), "this run is on a CPU"),
        (("trainer.capture=auto", "diagnostics=cheap", "diagnostics.samples=32"), "diagnostics look into them"),
        ((), None),
    ],
)
def test_why_steps_are_not_replayed_is_said_in_a_line(
    overrides: tuple[str, ...], reason: str | None, train: Command
) -> None:
    ended = train(*SMALL, *overrides, "max_epochs=1")  # by the command, as Hydra has a say in what is logged
    assert ended.code == 0
    said = [line for line in ended.err.splitlines() if "CUDA graph" in line]
    assert said == ([] if reason is None else [f"steps are not replayed from a CUDA graph: {reason}"])


class CutOff(Exception):
    """Stands for kill -9: nothing after it is written."""


def cut_off_at(step: int) -> Callable[..., None]:
    def before_batch(_: RunRecord, trainer: L.Trainer, *__: Any) -> None:
        if trainer.global_step == step:
            raise CutOff

    return before_batch


def told_to_end_at(step: int) -> Callable[..., None]:
    def before_batch(_: RunRecord, trainer: L.Trainer, *__: Any) -> None:
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return before_batch


SETTINGS = {
    "sgd": "method=sgd",
    "bfp, dropout, Adam, halved": (
        "method=bfp model.dropout=0.2 optimizer=adam lr=0.001 schedule=halve schedule.step_size=1"
    ),
    "bfp, BatchNorm, flips, momentum, stepwise": (
        "method=bfp norm=batch data.augment=flip optimizer=sgd_momentum "
        "schedule=cosine schedule.interval=step schedule.T_max=120"
    ),
    "bfp_warmup": "method=bfp_warmup method.at_epoch=1",
    "bfp in random order": "method=bfp_random model.depth=3",
    "noise drawn for each batch": "method=shift_noise",
    "ended by patience": "lr=0.5 patience=1 min_delta=0.7",
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_cut_off_anywhere_goes_on_as_if_it_had_not_been(
    settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*settings.split(), "max_epochs=3", "trainer.checkpoint_minutes=1e-9"]  # a checkpoint after every batch
    trained(tmp_path / "whole", *overrides)
    for step in (1, 17, 39, 40, 41, 79, 80, 119):  # 40 batches an epoch
        with monkeypatch.context() as patch, pytest.raises(CutOff):
            patch.setattr(RunRecord, "before_batch", cut_off_at(step))
            trained(tmp_path / "cut", *overrides)
    trained(tmp_path / "cut", *overrides)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert (tmp_path / "cut" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_a_run_told_to_end_leaves_a_checkpoint_and_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("method=bfp", "model.dropout=0.2", "norm=batch", "optimizer=adam", "lr=0.001", "max_epochs=3")
    trained(tmp_path / "whole", *overrides)
    before = signal.getsignal(signal.SIGTERM)
    for step in (7, 39, 63, 119):  # the last but one ends an epoch, the last one the training
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(RunRecord, "before_batch", told_to_end_at(step))
            trained(tmp_path / "cut", *overrides)
        assert read_checkpoint(tmp_path / "cut" / "last.ckpt")["global_step"] == step + 1  # after the batch at hand
    assert signal.getsignal(signal.SIGTERM) is before
    trained(tmp_path / "cut", *overrides)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert (tmp_path / "cut" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


@pytest.mark.usefixtures("lagging")
def test_a_diverged_run_whose_looks_lag_ends_a_look_later_cut_off_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("lr=1e30", "max_epochs=3", "trainer.log_every_n_steps=5", "trainer.checkpoint_minutes=1e-9")
    result = trained(tmp_path / "whole", *overrides)
    assert result["status"] == "diverged"
    assert result["final"]["step"] == 10
    for step in (4, 5, 6, 9):
        with monkeypatch.context() as patch, pytest.raises(CutOff):
            patch.setattr(RunRecord, "before_batch", cut_off_at(step))
            trained(tmp_path / "cut", *overrides)
    assert trained(tmp_path / "cut", *overrides)["status"] == "diverged"
    assert (tmp_path / "cut" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    steps = [step for step, _ in points(tmp_path / "cut")]
    assert steps == [5, 10]


def test_ctrl_c_while_training_is_said_in_a_line_and_goes_on(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: RunRecord, trainer: L.Trainer, *__: Any) -> None:
        if trainer.global_step == 45:
            os.kill(os.getpid(), signal.SIGINT)

    settings = (*SMALL, "max_epochs=2")
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "before_batch", interrupt)
        ended = train(*settings)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "error: interrupted; the same command goes on from here"
    assert signal.getsignal(signal.SIGINT) is before
    again = train(*settings)
    assert again.code == 0
    assert "goes on from step 40" in again.out


def test_double_precision_reaches_the_images(tmp_path: Path) -> None:
    trained(tmp_path, "trainer.precision=64-true", "data_norm=none", "max_epochs=1")
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float64}


@pytest.mark.parametrize("log_every", [50, 7])
def test_however_many_batches_lightning_hands_over_at_a_time_it_counts_batches(tmp_path: Path, log_every: int) -> None:
    settings = ("method=bfp", "max_epochs=2", f"trainer.log_every_n_steps={log_every}")
    trained(tmp_path / "many", *settings)
    trained(tmp_path / "one", *settings, "trainer.checkpoint_minutes=1e-9")  # due after every batch
    assert same(weights(tmp_path / "many"), weights(tmp_path / "one"))
    many, one = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("many", "one"))
    assert many["global_step"] == one["global_step"] == 80
    progress = many["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress == one["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["total"] == {"ready": 80, "completed": 80, "started": 80, "processed": 80}
    assert runs.read_metrics(tmp_path / "many") == runs.read_metrics(tmp_path / "one")


def test_a_diverged_run_killed_before_its_result_trains_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise CutOff

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Checkpoints, "on_train_end", killed)
        trained(tmp_path, "lr=1e30", "max_epochs=3")
    rows = (tmp_path / "metrics.csv").read_bytes()
    assert trained(tmp_path, "lr=1e30", "max_epochs=3")["status"] == "diverged"
    assert (tmp_path / "metrics.csv").read_bytes() == rows


@pytest.mark.parametrize(
    ("losses", "stop_loss", "patience", "min_delta", "ends"),
    [
        ([], 0.1, 1, 0.0, None),
        ([0.5, 0.2], 0.1, None, 0.0, None),
        ([0.5, 0.1], 0.1, None, 0.0, (2, "stop_loss")),
        ([0.5, 0.4, 0.4, 0.41], None, 2, 0.0, (4, "patience")),
        ([0.5, 0.4, 0.4, 0.39], None, 2, 0.0, None),
        ([0.5, 0.4, 0.395, 0.392], None, 2, 0.01, (4, "patience")),
        # Slow progress is measured from the lowest loss that counted as progress, not from the last.
        ([0.5, 0.496, 0.492, 0.488], None, 3, 0.01, None),
        ([0.5, 0.6, 0.09], 0.1, 2, 0.0, (3, "stop_loss")),
        ([0.5, float("nan"), float("nan")], 0.1, 2, 0.0, (3, "patience")),
    ],
)
def test_when_training_ends_early(
    losses: list[float], stop_loss: float | None, patience: int | None, min_delta: float, ends: tuple[int, str] | None
) -> None:
    first = next(
        ((n, why) for n in range(len(losses) + 1) if (why := why_stop(losses[:n], stop_loss, patience, min_delta))),
        None,
    )
    assert first == ends


def test_a_run_ends_after_the_epoch_that_reaches_the_loss(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", "max_epochs=5")
    losses = [row["loss/train"] for row in runs.read_metrics(tmp_path / "whole")[1:]]
    assert losses == sorted(losses, reverse=True), "this test needs a loss that falls"
    ended = trained(tmp_path / "ended", "max_epochs=5", f"stop_loss={losses[2]}")
    assert "stopped_at" not in whole
    assert (ended["status"], ended["stopped_by"], ended["stopped_at"]) == ("finished", "stop_loss", 3)
    assert ended["final"]["epoch"] == 3
    assert ended["final"]["accuracy/test"] is not None
    curve = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    assert (tmp_path / "ended" / "metrics.csv").read_text().splitlines() == curve[:5]
    on = trained(tmp_path / "on", "max_epochs=2", f"stop_loss={losses[2]}")
    assert (on["stopped_by"], on["stopped_at"]) == (None, None)


def test_a_run_ended_early_and_killed_before_its_result_trains_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise CutOff

    overrides = ("lr=0.5", "patience=1", "min_delta=10", "max_epochs=9")
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Checkpoints, "on_train_end", killed)
        trained(tmp_path, *overrides)
    rows = (tmp_path / "metrics.csv").read_bytes()
    result = trained(tmp_path, *overrides)
    assert (result["stopped_by"], result["stopped_at"]) == ("patience", 2)
    assert (tmp_path / "metrics.csv").read_bytes() == rows


@pytest.mark.parametrize("method", ["sgd", "bfp"])
@pytest.mark.parametrize("decay", ["weight_decay=0", "weight_decay=0.01"])
def test_the_head_has_its_own_learning_rate(method: str, decay: str) -> None:
    """Two optimizers, one for the hidden layers and one for the head, in a bare loop."""
    cfg = composed(*SMALL, f"method={method}", "model.depth=2", "lr=0.2", "head_lr=0.7", decay, "schedule=halve")
    parts = Parts(cfg, Settings.check(cfg))
    network = parts.network(0)
    groups = parts.optimizer(network).param_groups
    head = set(network.model.head.parameters())
    for group in groups:
        assert group["lr"] == (0.7 if head & set(group["params"]) else 0.2)
        assert not head & set(group["params"]) or set(group["params"]) <= head
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    if decay == "weight_decay=0.01":
        assert all((group["weight_decay"] == 0.01) == all(p.ndim > 1 for p in group["params"]) for group in groups)


def test_equal_rates_of_head_and_hidden_layers_are_one_rate(tmp_path: Path) -> None:
    trained(tmp_path / "one", "max_epochs=2", "method=bfp")
    trained(tmp_path / "two", "max_epochs=2", "method=bfp", "head_lr=0.1")
    trained(tmp_path / "other", "max_epochs=2", "method=bfp", "head_lr=0.3")
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "other"))


def test_a_head_that_does_not_learn_stays_as_it_was(tmp_path: Path) -> None:
    """With head_lr=0 the last layer in forward order keeps its weights, in any model."""
    overrides = ("model=nin", "data.size=17", "model.width=0.05", "norm=batch", "data.train_images=64", "max_epochs=1")
    trained_state = train_alone(
        composed("data=digits", "batch_size=32", "trainer.accelerator=cpu", *overrides, "head_lr=0"), tmp_path
    )
    assert trained_state["status"] == "finished"
    start = NIN((1, 17, 17), 10, width=0.05, norm="batch", seed=0).state_dict()
    end = {key.removeprefix("network.model."): value for key, value in weights(tmp_path).items()}
    moved = {
        key for key in start if "running" not in key and "num" not in key and not torch.equal(start[key], end[key])
    }
    assert {"head.weight", "head.bias"} == {key for key in start if key.startswith("head")}
    assert not {key for key in moved if key.startswith("head")}
    assert {"conv1.conv.weight", "conv8.conv.weight"} <= moved


def test_arithmetic_is_what_the_formula_of_a_chain_gives() -> None:
    """For layers of c_j multiply-accumulates: SGD 3 sum(c) - c_1, replay sum((2j + 1) c_j) - c_L."""
    costs = [64 * 16, 16 * 10]
    sgd, bfp = 3 * sum(costs) - costs[0], 3 * costs[0] + 5 * costs[1] - costs[1]
    expected = {"sgd": (sgd, 1), "sgd_repeat": (2 * sgd, 2), "bfp": (bfp, 1), "bfp_poster": (bfp + sgd, 2)}
    for method, (update, updates) in expected.items():
        (phase,) = trained(None, f"method={method}", "max_epochs=1")["arithmetic"]
        assert phase == {
            "from_epoch": 0,
            "samples": 2,
            "forward": 2 * sum(costs),
            "update": 2 * update,
            "updates": updates,
        }
    warmup = trained(None, "method=bfp_warmup", "method.at_epoch=1", "max_epochs=1")
    assert [(phase["from_epoch"], phase["update"]) for phase in warmup["arithmetic"]] == [(0, 2 * bfp), (1, 2 * sgd)]
