"""A run interrupted and resumed, or in the environment of another program, gives the result of an undisturbed run."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.helpers.commands import Command, on_sigint
from tests.helpers.training import CutOff, cut_off_at, trained

from backforward_suite.processes import rank, settle_rank
from backforward_suite.runs.files import read_diagnostics, read_metrics
from backforward_suite.train.callbacks.checkpoint import Checkpoints, read_checkpoint
from backforward_suite.train.callbacks.record import RunRecord

DIGITS = ("data=digits", "max_epochs=1", "model.hidden=8", "batch_size=64", "trainer.accelerator=cpu")
RUN = "outputs/train/sgd-hidden8-digits-batch_size64-max_epochs1"
TWO_EPOCHS = ("max_epochs=2", "trainer.log_every_n_steps=10")


def points(folder: Path) -> dict[str, list[int]]:
    """By curve, the steps of its points, as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [point.step for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def cut(folder: Path, step: int, *overrides: str) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(RunRecord, "before_batch", cut_off_at(step))
        trained(folder, *overrides)


@pytest.mark.parametrize("steps", [[5], [40], [60], [79], [5, 45, 79]], ids=str)
def test_curves_have_each_point_once(tmp_path: Path, steps: list[int]) -> None:
    asked = (*TWO_EPOCHS, "diagnostics=cheap")
    trained(tmp_path / "whole", *asked)
    for step in steps:
        cut(tmp_path / "cut", step, *asked)
    trained(tmp_path / "cut", *asked)
    ours, theirs = points(tmp_path / "cut"), points(tmp_path / "whole")
    assert ours == theirs
    assert all(max(Counter(curve).values()) == 1 for tag, curve in theirs.items() if tag.startswith("loss/batch"))


@pytest.mark.parametrize("lost", ["gone", "cut"])
def test_lost_tables_are_written_again(tmp_path: Path, lost: str) -> None:
    asked = (*TWO_EPOCHS, "diagnostics=cheap")
    trained(tmp_path / "whole", *asked)
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in ("metrics.csv", "diagnostics.csv")}

    def lose(_: Any, __: L.Trainer, module: Any) -> None:
        for name in whole:
            path = tmp_path / "cut" / name
            path.unlink() if lost == "gone" else path.write_bytes(path.read_bytes()[:50])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "on_test_start", lose)
        trained(tmp_path / "cut", *asked)
    for name, content in whole.items():
        assert (tmp_path / "cut" / name).read_bytes() == content
    assert len(read_metrics(tmp_path / "cut")) == 3
    assert read_diagnostics(tmp_path / "cut")


def test_times_of_all_processes_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(tmp_path, 60, *TWO_EPOCHS)
    with monkeypatch.context() as patch:
        # As if the first process had taken an hour.
        patch.setattr(RunRecord, "load_state_dict", with_an_hour_more(RunRecord.load_state_dict))
        timing = trained(tmp_path, *TWO_EPOCHS)["timing"]
    assert 3600 < timing["seconds"] < 3700
    assert read_checkpoint(tmp_path / "last.ckpt")["callbacks"]["RunRecord"]["elapsed"] > 3600


def with_an_hour_more(load: Any) -> Any:
    def loaded(record: RunRecord, state: dict[str, Any]) -> None:
        assert 0 < state["elapsed"] < 60
        load(record, state | {"elapsed": state["elapsed"] + 3600})

    return loaded


def test_ctrl_c_leaves_a_checkpoint_of_that_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: RunRecord, trainer: L.Trainer, *__: Any) -> None:
        if trainer.global_step == 17:
            os.kill(os.getpid(), signal.SIGINT)

    with (
        on_sigint(signal.default_int_handler),
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
    ):
        patch.setattr(RunRecord, "before_batch", interrupt)
        trained(tmp_path, *TWO_EPOCHS)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 18


def test_ctrl_c_is_ignored_where_it_was_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background."""

    def interrupt(_: RunRecord, trainer: L.Trainer, *__: Any) -> None:
        if trainer.global_step == 17:
            os.kill(os.getpid(), signal.SIGINT)

    with on_sigint(signal.SIG_IGN):
        monkeypatch.setattr(RunRecord, "before_batch", interrupt)
        assert trained(tmp_path, *TWO_EPOCHS)["status"] == "finished"


def test_a_run_given_again_says_that_it_was_skipped(train: Command) -> None:
    assert "skipped" not in train(*DIGITS).out
    again = train(*DIGITS).out.splitlines()[0]
    assert again.startswith("skipped, finished on 20")
    assert again.endswith(" UTC")


LEFT_BEHIND = {
    "a task of srun": {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},
    "torchrun's": {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
    "a node": {"NODE_RANK": "1"},
    "jsrun's": {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("left", LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_ranks_of_others_are_no_rank_of_a_run_on_one_device(
    spawned: Command, tmp_path: Path, left: dict[str, str]
) -> None:
    ended = spawned(*DIGITS, **left)
    assert ended.code == 0, ended.err
    assert "accuracy/validation" in points(tmp_path / RUN)


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({"NODE_RANK": "1"}, 0),
        ({"LOCAL_RANK": "1"}, 0),
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, 0),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, 1),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, 1),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, 0),
    ],
)  # fmt: skip
def test_which_ranks_count_on_two_devices(monkeypatch: pytest.MonkeyPatch, left: dict[str, str], expected: int) -> None:
    for key in list(os.environ):
        if key.startswith(("SLURM_", "JSM_")) or key.endswith("RANK"):
            monkeypatch.delenv(key)
    for key in ("LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.setenv(key, "")  # so that monkeypatch restores it
        monkeypatch.delenv(key)
    for key, value in left.items():
        monkeypatch.setenv(key, value)
    settle_rank(2)
    assert rank(2) == expected
    assert ("NODE_RANK" in os.environ) == (left.get("NODE_RANK") == "0")
