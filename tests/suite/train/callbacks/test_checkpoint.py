"""A damaged checkpoint is refused in one line; it never trains on in silence."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.training import CutOff, cut_off_at, same, trained, weights

from backforward_suite import atomic
from backforward_suite.errors import BadInput
from backforward_suite.train.callbacks.checkpoint import WholeFileIO, read_checkpoint
from backforward_suite.train.callbacks.record import RunRecord

TWO_EPOCHS = ("max_epochs=2", "trainer.log_every_n_steps=10", "optimizer=sgd_momentum")


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut off in its second epoch."""
    folder = tmp_path_factory.mktemp("half_done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunRecord, "before_batch", cut_off_at(60))
        with pytest.raises(CutOff):
            trained(folder, *TWO_EPOCHS)
    return folder


@pytest.fixture
def folder(half_done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half_done, tmp_path / "run"))


def test_a_flipped_bit_never_changes_what_is_loaded(folder: Path) -> None:
    path, chance = folder / "last.ckpt", random.Random(0)
    content = path.read_bytes()
    before = weights(folder)
    refused = 0
    for _ in range(60):
        torn = bytearray(content)
        torn[chance.randrange(len(torn))] ^= 1 << chance.randrange(8)
        path.write_bytes(torn)
        try:
            found = read_checkpoint(path)
        except BadInput as error:
            refused += 1
            assert "last.ckpt is damaged" in str(error)
            assert "\n" not in str(error)
        else:  # padding between members, or a date in their headers
            assert same(found["state_dict"], before)
    assert refused > 30


@pytest.mark.parametrize("keep", [0, 1, 1000, -1, -100])
def test_a_cut_one_is_refused(folder: Path, keep: int) -> None:
    path = folder / "last.ckpt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadInput, match=r"last\.ckpt is damaged"):
        trained(folder, *TWO_EPOCHS)


def half(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = {key: value.half() for key, value in checkpoint["state_dict"].items()}


def not_finite(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["network.model.head.weight"][0, 0] = float("nan")


def momentum_not_finite(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"][0] = float("inf")


def other_shape(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["network.model.head.weight"] = torch.zeros(10, 3)


def other_momentum(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"] = torch.zeros(7, 7)


def other_optimizer(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["param_groups"] *= 2


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def remove(checkpoint: dict[str, Any]) -> None:
        *parents, last = keys
        node: Any = checkpoint
        for key in parents:
            node = node[key]
        del node[last]

    remove.__name__ = f"without {'.'.join(keys)}"
    return remove


@pytest.mark.parametrize(
    "change",
    [
        half, not_finite, momentum_not_finite, other_shape, other_momentum, other_optimizer,
        without("loops"), without("callbacks"), without("optimizer_states"), without("ranks"), without("settings"),
        without("state_dict", "network.model.head.bias"), without("callbacks", "RunRecord"),
        without("callbacks", "Checkpoints"), without("callbacks", "RunRecord", "rows"),
        without("loops", "fit_loop", "epoch_progress"), without("lr_schedulers"), without("global_step"),
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
@pytest.mark.parametrize("version", ["of this version", "older"])
def test_one_that_is_whole_and_not_of_this_run_is_refused(folder: Path, change: Any, version: str) -> None:
    path = folder / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    if version == "older":  # it had no checksum
        del checkpoint["checksum"]
    change(checkpoint)
    torch.save(checkpoint, path)
    content = path.read_bytes()
    with pytest.raises(BadInput, match=r"last\.ckpt (is damaged|does not fit this run) \(.+\); delete it") as refused:
        trained(folder, *TWO_EPOCHS)
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == content


def test_one_saved_while_the_run_diverged_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the batch that broke it and the look that finds it out."""
    diverging = ("optimizer._target_=tests.helpers.misbehaving.Diverges", "max_epochs=2")
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(RunRecord, "before_batch", cut_off_at(5))
        trained(tmp_path, *diverging, "trainer.checkpoint_minutes=0.00001")
    assert not all(bool(value.isfinite().all()) for value in weights(tmp_path).values())
    assert trained(tmp_path, *diverging)["status"] == "diverged"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last.ckpt")
    with pytest.raises(BadInput, match="no regular file"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_double_precision_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (*TWO_EPOCHS, "trainer.precision=64-true")
    trained(tmp_path / "whole", *asked)
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(RunRecord, "before_batch", cut_off_at(60))
        trained(tmp_path / "cut", *asked)
    trained(tmp_path / "cut", *asked)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_full_disk_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what torch makes of it."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="No space left") as refused:
        WholeFileIO().save_checkpoint({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "last.ckpt")
    assert refused.value.filename == str(tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []
