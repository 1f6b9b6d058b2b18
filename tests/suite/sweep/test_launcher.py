"""The jobs that a sweep is composed of, without running them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.helpers.commands import Command, assert_one_line

from backforward_suite.data import sources
from backforward_suite.runs import files
from backforward_suite.sweep.jobs import Job, Outcome
from backforward_suite.sweep.pool import PoolLauncher
from backforward_suite.sweep.scheduler import SchedulerLauncher
from backforward_suite.sweep.sweep import Sweep

DIGITS = ("data=digits", "max_epochs=1", "trainer.accelerator=cpu")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs of a sweep; none is run."""
    jobs: list[Job] = []

    def run(_: PoolLauncher, sweep: Sweep, pending: Sequence[Job]) -> None:
        jobs.extend(pending)
        for job in pending:
            sweep.ended(job, Outcome(cause="not run"))

    monkeypatch.setattr(PoolLauncher, "get_ready", lambda _, job: None)
    monkeypatch.setattr(PoolLauncher, "work", run)
    return jobs


@pytest.mark.parametrize(
    ("given", "names", "notes"),
    [
        (
            ["method=bfp,sgd", "method.engine=naive"],
            ["bfp-engine_naive", "sgd"],
            ["method.engine=naive does not reach 1 of 2 runs: no such key with method=sgd"],
        ),
        (
            ["schedule=constant,halve,cosine", "schedule.step_size=2"],
            ["sgd-constant", "sgd-cosine", "sgd-halve-step_size2"],
            ["schedule.step_size=2 does not reach 2 of 3 runs: no such key with schedule=constant, schedule=cosine"],
        ),
        (
            ["model=nin,residual", "model.width=.25", "data.size=32"],
            ["sgd-nin-width0.25", "sgd-residual-width0.25"],
            [],
        ),
        (
            ["optimizer=sgd,sgd_momentum", "optimizer.momentum=0.5,0.8"],  # plain SGD is one run, not two
            ["sgd-sgd", "sgd-sgd_momentum-momentum0.5", "sgd-sgd_momentum-momentum0.8"],
            [
                "optimizer.momentum=0.5 does not reach 1 of 4 runs: no such key with optimizer=sgd",
                "optimizer.momentum=0.8 does not reach 1 of 4 runs: no such key with optimizer=sgd",
            ],
        ),
        (["method=bfp", "method.engine=naive", "lr=0.1,0.2"], ["bfp-engine_naive-lr0.1", "bfp-engine_naive-lr0.2"], []),
        (
            ["experiment=quickstart", "lr=0.1", "seed=0", "method.joint_pass=true"],  # the experiment sweeps the method
            ["bfp-joint_pass_True-lr0.1-seed0", "sgd-lr0.1-seed0"],
            ["method.joint_pass=True does not reach 1 of 2 runs: no such key with method=sgd"],
        ),
        (["method.engine=naive,replay", "method=bfp"], ["bfp-engine_naive", "bfp-engine_replay"], []),
    ],
    ids=lambda value: " ".join(value) if "=" in str(value) else "",
)
def test_a_key_of_a_swept_group_reaches_the_runs_that_have_it(
    train: Command, launched: list[Job], tmp_path: Path, given: list[str], names: list[str], notes: list[str]
) -> None:
    ended = train("-m", *given, *DIGITS)
    assert ended.code == 1, ended.err
    besides = ("-digits", "-size32", "-max_epochs1")
    found = [job.name for job in launched]
    for part in besides:
        found = [name.replace(part, "") for name in found]
    assert sorted(found) == names
    assert [line for line in ended.out.splitlines() if "does not reach" in line] == notes
    for job in launched:  # a run's process gets the overrides it was composed of
        assert ("method.engine=naive" in job.arguments) == ("engine_naive" in job.name)
    assert set(files.read_plan(tmp_path / launched[0].folder.parent)) == {job.name for job in launched}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["method=bfp,sgd", "method.engin=naive"], "method.engin: no such key with method=bfp, method=sgd"),
        (["method=sgd", "lr=0.1,0.2", "method.engine=naive"], "method.engine: no such key; there are repeats"),
        (["method=bfp,sgd", "method.engine=naive", "lr=0.1,-1"], "lr=-1"),
        (["method=bfp,sgd", "data.protocl=paper"], "data.protocl: no such key"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_key_that_reaches_no_run_is_refused(
    train: Command, launched: list[Job], tmp_path: Path, given: list[str], line: str
) -> None:
    assert_one_line(train("-m", *given, *DIGITS), line)
    assert launched == []
    assert not list(tmp_path.rglob("sweep.json"))


CLOSED = "http://127.0.0.1:9"  # a port on which nothing listens
OFFLINE = {"http_proxy": CLOSED, "https_proxy": CLOSED}


def test_missing_data_are_reported_once_before_the_first_run(
    train: Command, launched: list[Job], tmp_path: Path
) -> None:
    ended = train("-m", "data=mnist", "seed=0,1,2", BACKFORWARD_DATA=str(tmp_path / "d"), **OFFLINE)
    assert_one_line(ended, "MNIST is not under", "its download failed", "mnist.npz")
    assert launched == []
    assert not (tmp_path / "d").exists()


def test_each_data_set_is_downloaded_once(
    train: Command, launched: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[str] = []
    monkeypatch.setattr(sources, "read", lambda name, root: got.append(name))
    train("-m", "data=mnist,cifar10,digits", "seed=0,1", f"data.root={tmp_path / 'd'}")
    assert got == ["cifar10", "mnist"]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mnist.npz").touch()
    (tmp_path / "d" / "cifar-10-batches-py").mkdir()
    (tmp_path / "d" / "cifar-10-batches-py" / "test_batch").touch()
    train("-m", "data=mnist,cifar10,digits", "seed=0,1", f"data.root={tmp_path / 'd'}")
    assert len(got) == 2  # the runs themselves check existing files
    assert len(launched) == 12


def test_schedulers_do_not_need_the_data_here(tmp_path: Path) -> None:
    class Elsewhere(SchedulerLauncher):
        cluster = submit = ended = cancel = lambda *_: None  # type: ignore[assignment]

    with pytest.MonkeyPatch.context() as patch:
        for key, value in OFFLINE.items():
            patch.setenv(key, value)
        Elsewhere().get_data("mnist", tmp_path / "d")
    assert not (tmp_path / "d").exists()
