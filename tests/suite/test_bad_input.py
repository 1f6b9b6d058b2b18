"""Bad input gives one line and an exit code, no traceback, and overwrites nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.helpers.commands import TRAIN, Command, Ended, assert_one_line, environment

DIGITS = ("data=digits", "max_epochs=1", "model.hidden=8", "batch_size=64", "trainer.accelerator=cpu")
FINISHED = "outputs/train/sgd-hidden8-digits-batch_size64-max_epochs1"


CONFIG = [
    (["methd=bfp"], ["methd: no such key", "did you mean method?"]),
    (["+foo=1"], ["foo is no key here"]),
    (["model.dept=3"], ["model.dept: no such key", "did you mean depth?"]),
    (["method=bpf"], ["method=bpf: no such method; there are bfp,", "did you mean bfp?"]),
    (["data=cifr10"], ["data=cifr10: no such data", "did you mean cifar10?"]),
    (["hydra/launcher=pol"], ["hydra/launcher=pol"]),
    (["lr=-1"], ["lr=-1", "greater than or equal to 0"]),
    (["lr=abc"], ["lr=abc", "a valid number"]),
    (["lr=[1"], ["lr"]),
    (["batch_size=0"], ["batch_size=0", "greater than or equal to 1"]),
    (["max_epochs=-3"], ["max_epochs=-3", "greater than or equal to 1"]),
    (["trainer.devices=99"], ["trainer.devices=99", "give at most"]),
    (["schedule=halve", "schedule.interval=foo"], ["schedule.interval=foo", "'epoch' or 'step'"]),
    (["norm=batch", "batch_size=1"], ["norm=batch needs at least two samples", "batch_size=2"]),
    (["max_epochs=-3", "batch_size=0", "lr=-1"], ["lr=-1"]),
    (["-m", "method=sgd,bfp", "lr=0.1,-1"], ["lr=-1"]),
    (["-m", "method=sgd,bpf"], ["method=bpf: no such method"]),
    (["-m", "lr=0.1,0.2", "hydra.launcher.slots=0"], ["hydra.launcher.slots=0"]),
    (["lr=inf"], ["lr=inf", "finite"]),
    (["lr=null"], ["lr=None", "a valid number"]),
    (["seed=-1"], ["seed=-1", "greater than or equal to 0"]),
    (["seed=4294967296"], ["seed=4294967296", "less than 4294967296"]),
    (["batch_size=32.5"], ["batch_size=32.5", "a valid integer"]),
    (["weight_decay=-0.1"], ["weight_decay=-0.1", "greater than or equal to 0"]),
    (["max_grad_norm=0"], ["max_grad_norm=0", "greater than 0"]),
    (["timeout_min=0"], ["timeout_min=0", "greater than 0"]),
    (["data_norm=layer"], ["data_norm=layer", "'channel'"]),
    (["data.protocol=test"], ["data.protocol=test", "'holdout', 'paper' or 'poster'"]),
    (["data.augment=crop"], ["data.augment=crop", "'none' or 'flip'"]),
    (["data.size=0"], ["data.size=0", "greater than or equal to 1"]),
    (["trainer.precision=16-mixed"], ["trainer.precision=16-mixed", "'32-true'"]),
    (["trainer.devices=0"], ["trainer.devices=0", "greater than or equal to 1"]),
    (["trainer.accelerator=tpu"], ["trainer.accelerator=tpu", "'auto', 'cpu' or 'gpu'"]),
    (["trainer.checkpoint_minutes=0"], ["trainer.checkpoint_minutes=0", "greater than 0"]),
    (["trainer.log_every_n_steps=0"], ["trainer.log_every_n_steps=0", "greater than or equal to 1"]),
    (["trainer.progress_bar=maybe"], ["trainer.progress_bar"]),
    (["trainer=ddp", "trainer.accelerator=cpu", "batch_size=33"], ["batch_size=33 cannot be shared by 2 devices"]),
    (["trainer=ddp", "trainer.accelerator=cpu", "batch_size=2", "norm=batch"], ["on each device", "batch_size=4"]),
    (["batch_size=1", "data_norm=batch"], ["data_norm=batch needs at least two samples", "data_norm=global"]),
    (["name=../elsewhere"], ["name=../elsewhere", "match pattern"]),
    (["norm=lyer"], ["norm=lyer: no such norm; there are batch,"]),
    (["optimizer=sdg"], ["optimizer=sdg: no such optimizer", "did you mean sgd?"]),
    (["schedule=cosin"], ["schedule=cosin: no such schedule", "did you mean cosine?"]),
    (["trainer=dpp"], ["trainer=dpp: no such trainer", "did you mean ddp?"]),
    (["experiment=quickstar"], ["experiment=quickstar: no such experiment", "did you mean quickstart?"]),
    (["lr"], ["lr"]),
    (["lr=${foo}"], ["lr", "foo"]),
    (["lr=???"], ["lr has no value"]),
    (["data=npz"], ["data.name has no value", "data.name=..."]),
    (["lr=0.1,0.2"], ["lr"]),
    (["-m", "seed=range(0)"], ["this sweep has no runs"]),
    (["-m", "lr=0.1,0.2", "--cfg", "job"], ["Only one of --run, --multirun, --cfg"]),
    (["-m", "lr=interval(0,1)"], ["lr=interval(0,1): interval has no list of values", "optuna"]),
    (["-m", "hydra/launcher=slurm", "lr=-1"], ["lr=-1"]),
]


@pytest.mark.parametrize(("overrides", "parts"), CONFIG, ids=[" ".join(overrides) for overrides, _ in CONFIG])
def test_an_invalid_setting(train: Command, tmp_path: Path, overrides: list[str], parts: list[str]) -> None:
    assert_one_line(train(*overrides), *parts)
    made = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "multirun.yaml"]
    assert made == []  # refused before anything is written


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.hidden=-5"], ["hidden"]),
        (["model.activation=foo"], ["foo", "relu"]),
        (["method=bfp", "method.groups=0"], ["groups=0"]),
        (["method=bfp", "method.engine=fast"], ["fast", "replay"]),
        (["batch_size=5000"], ["batch_size=5000", "1297"]),
        (["method=bfp", "method.groups=[[modl.hidden1]]"], ["no module 'modl.hidden1'"]),
        (["+method.foo=1"], ["foo"]),
        (["optimizer=sgd_momentum", "optimizer.momentum=-1"], ["momentum"]),
        (["schedule=halve", "schedule.step_size=0"], ["zero"]),
    ],
    ids=str,
)
def test_an_argument_that_a_constructor_refuses(train: Command, overrides: list[str], parts: list[str]) -> None:
    assert_one_line(train(*DIGITS[:2], *overrides), *parts)


class TestData:
    def test_damaged_file(self, train: Command, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "mnist.npz").write_bytes(b"PK\x03\x04 this is no archive")
        assert_one_line(train(BACKFORWARD_DATA=str(tmp_path / "d")), "mnist.npz")

    def test_labels_out_of_range(self, train: Command, tmp_path: Path) -> None:
        x, y = np.zeros((20, 28, 28), np.uint8), np.arange(20, dtype=np.uint8) % 7 * 30
        np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        assert_one_line(train(BACKFORWARD_DATA=str(tmp_path)), "label")

    def test_root_that_cannot_be_written(self, train: Command) -> None:
        assert_one_line(train(BACKFORWARD_DATA="/proc/nowhere"), "/proc/nowhere")

    def test_no_data_and_no_network(self, train: Command, tmp_path: Path) -> None:
        closed = "http://127.0.0.1:9"  # a port on which nothing listens
        ended = train(BACKFORWARD_DATA=str(tmp_path / "d"), http_proxy=closed, https_proxy=closed)
        assert_one_line(ended, "mnist", "npz")
        assert not list((tmp_path / "d").rglob("*.gz"))


@pytest.mark.parametrize("launcher", ["slurm", "ray"])
def test_a_launcher_that_is_not_installed(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    missing = {"slurm": "submitit", "ray": "ray"}[launcher]
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    ended = train("-m", f"hydra/launcher={launcher}", *DIGITS)
    assert_one_line(ended, f"hydra/launcher={launcher}: {missing} is not installed", f"pip install -e '.[{launcher}]'")
    assert not list(tmp_path.rglob("run.log"))


def test_a_folder_that_is_a_file(train: Command, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("mine")
    assert_one_line(train(*DIGITS), "outputs")
    assert (tmp_path / "outputs").read_text() == "mine"


def test_a_run_of_other_settings(train: Command, tmp_path: Path) -> None:
    assert train(*DIGITS).code == 0
    folder = tmp_path / FINISHED
    other = (*DIGITS, "model.activation=tanh", f"hydra.run.dir={FINISHED}")
    for given, line in (
        ("result.json", "finished run of other settings"),
        ("last.ckpt", "last.ckpt is of other settings"),
    ):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert_one_line(train(*other), line, "model.activation=tanh (there: relu)")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        (folder / given).unlink()


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"PK\x03\x04", b"\x80\x02cos\nsystem\n."],
    ids=["empty", "garbage", "cut", "a pickle that runs code"],
)
def test_a_file_that_is_no_checkpoint(train: Command, tmp_path: Path, content: bytes) -> None:
    checkpoint = tmp_path / FINISHED / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    (checkpoint.parent / ".lock").touch()  # a run was here
    checkpoint.write_bytes(content)
    assert_one_line(train(*DIGITS), "last.ckpt is damaged", "delete it")
    assert checkpoint.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"status": 3}', '{"status": "fini', "\x00"],
    ids=["empty", "a list", "no status", "cut", "zero"],
)
def test_a_file_that_is_no_result(train: Command, tmp_path: Path, content: str) -> None:
    result = tmp_path / FINISHED / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text(content)
    assert_one_line(train(*DIGITS), "result.json is damaged", "delete it")
    assert result.read_text() == content


def test_damaged_plan(train: Command, tmp_path: Path) -> None:
    plan = tmp_path / "outputs" / "train" / "sweep.json"
    plan.parent.mkdir(parents=True)
    plan.write_text("{")
    assert_one_line(train("-m", *DIGITS), "sweep.json is damaged", "delete it")
    assert plan.read_text() == "{"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a small disk")
def test_full_disk(train: Command, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path / "outputs")], check=False)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        assert train(*DIGITS).code == 0
        finished = (tmp_path / FINISHED / "result.json").read_bytes()
        filler = tmp_path / "outputs" / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"0" * 4096)
        assert_one_line(train(*DIGITS, "lr=0.2"), "disk is full")
        assert (tmp_path / FINISHED / "result.json").read_bytes() == finished
        filler.unlink()
        assert train(*DIGITS, "lr=0.2").code == 0
    finally:
        subprocess.run(["umount", str(tmp_path / "outputs")], check=True)


@pytest.mark.parametrize("sweep", [(), ("-m",)], ids=["one run", "a sweep"])
def test_a_limit_of_file_sizes(tmp_path: Path, sweep: tuple[str, ...]) -> None:
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", sys.executable, str(TRAIN), *sweep]
    limited += [*DIGITS, "model.hidden=99"]
    ended = subprocess.run(limited, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    if sweep:
        assert "best.ckpt: the file would exceed the limit on file sizes; raise it (ulimit -f)" in ended.stdout
        assert "1 run: 1 failed" in ended.stdout
        assert ended.stderr == "error: 1 of 1 runs failed; the same command runs them again\n"
    else:
        line = "best.ckpt: the file would exceed the limit on file sizes; raise it (ulimit -f)"
        assert_one_line(Ended(ended.returncode, ended.stdout, ended.stderr), line)
    assert not list(tmp_path.rglob("*.tmp"))


CUTS_ITS_DATA = """\
import os, sys, zlib
from backforward_suite.commands import train
check = zlib.crc32
def cut(data, *start):
    os.truncate("mine.npz", 1000)
    return check(data, *start)
zlib.crc32 = cut
sys.exit(train.command())
"""


def test_data_that_become_shorter_while_they_are_read(tmp_path: Path) -> None:
    x, y = np.zeros((4000, 8, 8), np.uint8), np.arange(4000, dtype=np.uint8) % 4
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    command = [sys.executable, "-c", CUTS_ITS_DATA, "data=npz", "data.name=mine", "data.root=."]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGBUS
    assert ended.stderr.startswith("Fatal Python error: Bus error")
    assert "_read_member" in ended.stderr


def test_a_single_run_of_an_experiment_mentions_its_sweep(train: Command, tmp_path: Path) -> None:
    quick, hint = ("max_epochs=1", "model.hidden=8"), "This was one run; with -m, the experiment's sweep"
    assert hint in train("experiment=quickstart", *quick).out.splitlines()
    assert hint not in train("data=digits", *quick).out
    swept = train("-m", "experiment=quickstart", *quick, "method=sgd", "lr=0.1", "seed=0", "name=swept")
    (log,) = (tmp_path / "outputs" / "swept").rglob("run.log")
    assert hint not in swept.out + swept.err + log.read_text()
