"""A run cut off anywhere against one that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.helpers.commands import Command, on_sigint
from tests.helpers.configs import composed
from tests.helpers.training import (
    SMALL,
    CutOff,
    cut_off_at,
    same,
    told_to_end_at,
    trained,
    weights,
)

from backforward.models import NIN
from backforward_suite import hardware
from backforward_suite.errors import Stopped
from backforward_suite.hardware import cpu_model
from backforward_suite.run import train as train_alone
from backforward_suite.runs import files
from backforward_suite.train import readings
from backforward_suite.train.bar import ProgressBar
from backforward_suite.train.callbacks.checkpoint import Checkpoints, read_checkpoint
from backforward_suite.train.callbacks.record import RunRecord


def points(folder: Path) -> list[tuple[int, float]]:
    """Of the loss within epochs, as TensorBoard has them."""
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars("loss/batch")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is CUDA here")
def test_auto_is_no_gpu_but_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.accelerators.mps.MPSAccelerator.is_available", lambda: True)
    result = trained(None, "trainer.accelerator=auto", "max_epochs=1")  # on Apple's, Lightning would fail or differ
    assert result["hardware"]["device"] == cpu_model()


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a look within an epoch gives what the look before asked for."""
    monkeypatch.setattr(readings, "_lags", lambda _: True)


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
    *_, last = files.read_metrics(tmp_path / "late")
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
    printed = [line for line in ended.err.splitlines() if "CUDA graph" in line]
    assert printed == ([] if reason is None else [f"steps are not replayed from a CUDA graph: {reason}"])


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
    with on_sigint(signal.default_int_handler), monkeypatch.context() as patch:
        patch.setattr(RunRecord, "before_batch", interrupt)
        ended = train(*settings)
        after = signal.getsignal(signal.SIGINT)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "error: interrupted; the same command resumes"
    assert after is signal.default_int_handler
    again = train(*settings)
    assert again.code == 0
    assert "goes on from step 46" in again.out  # a checkpoint after the batch in which it came


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


@pytest.mark.parametrize(
    ("flags", "printed"), [("sse2 avx512_bf16", ""), ("sse2 avx2", "emulates bfloat16"), (None, "")]
)
def test_emulated_bfloat16_is_said_once(
    flags: str | None, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_text(_: Path, **__: object) -> str:
        return "processor\t: 0\n" if flags is None else f"processor\t: 0\nflags\t\t: fpu {flags}\n"

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        emulated = hardware.emulates_bf16()
    assert emulated == bool(printed)
    monkeypatch.setattr("backforward_suite.train.fit.emulates_bf16", lambda: emulated)
    trained(tmp_path, "trainer=cpu_bf16", "max_epochs=1")
    errors = capsys.readouterr().err
    assert errors.count("emulates") == bool(printed)
    assert printed in errors
