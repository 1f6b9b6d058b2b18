"""Sweeps by the pool launcher as real processes: skips, kills, failures."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.commands import Command
from tests.helpers.configs import requested
from tests.helpers.own_data import MINE, write_data
from tests.helpers.sweeps import DIGITS, WITH_TESTS, alive, assert_same, start, tree, until

from backforward_suite.runs import files, lifecycle, locks
from backforward_suite.sweep import pool, remote
from backforward_suite.sweep.jobs import Job
from backforward_suite.sweep.pool import PoolLauncher
from backforward_suite.sweep.scheduler import SchedulerLauncher, call_of
from backforward_suite.sweep.sweep import Sweep

MAIN_JOB = ("-m", "method=bfp,sgd", "lr=0.1,0.05,0.01", "data=mnist", "max_epochs=2")
SIX = sorted(f"{method}-mnist-lr{lr}-max_epochs2" for method in ("bfp", "sgd") for lr in ("0.1", "0.05", "0.01"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Iterator[tuple[Path, str]]:
    """The main job on real MNIST, and its output."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    sweep = start(cwd, *MAIN_JOB, BACKFORWARD_DATA=str(mnist_root))
    out, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, out
    yield cwd, out


class TestMainJob:
    def test_six_runs_finish(self, undisturbed: tuple[Path, str]) -> None:
        cwd, out = undisturbed
        folders = sorted(path for path in (cwd / "outputs" / "train").iterdir() if path.is_dir())
        assert [folder.name for folder in folders] == SIX
        for folder in folders:
            result = files.read_result(folder)
            assert result is not None
            assert result["status"] == "finished"
            assert result["data"] == {
                **result["data"],
                "name": "mnist",
                "train": 55000,
                "validation": 5000,
                "test": 10000,
            }
            assert result["final"]["accuracy/test"] > 0.85
            rows = files.read_metrics(folder)
            assert [row["step"] for row in rows] == [0, 429, 858]
        assert "6 runs: 6 finished" in out

    def test_all_start_from_the_same_weights(self, undisturbed: tuple[Path, str]) -> None:
        cwd, _ = undisturbed
        first = {files.read_metrics(cwd / "outputs" / "train" / name)[0]["loss/validation"] for name in SIX}
        assert len(first) == 1

    def test_the_same_sweep_trains_nothing_and_a_longer_one_trains(
        self, undisturbed: tuple[Path, str], mnist_root: Path
    ) -> None:
        cwd, _ = undisturbed
        folders = [path for path in (cwd / "outputs" / "train").iterdir() if path.is_dir()]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        before = {path: path.stat().st_mtime_ns for path in files}
        again = start(cwd, *MAIN_JOB, BACKFORWARD_DATA=str(mnist_root))
        out, _ = again.communicate(timeout=120)
        assert again.returncode == 0
        assert "6 runs: 6 done before, skipped" in out
        assert {path: path.stat().st_mtime_ns for path in before} == before

        longer = start(
            cwd, "-m", "method=sgd", "lr=0.1", "data=mnist", "max_epochs=3", BACKFORWARD_DATA=str(mnist_root)
        )
        out, _ = longer.communicate(timeout=120)
        assert "1 run: 1 finished" in out
        assert (cwd / "outputs" / "train" / "sgd-mnist-lr0.1-max_epochs3" / "result.json").exists()
        assert {path: path.stat().st_mtime_ns for path in before} == before
        # The comparison below must not see it.
        for path in sorted((cwd / "outputs" / "train" / "sgd-mnist-lr0.1-max_epochs3").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    def test_killed_in_the_middle_it_ends_with_the_same(
        self, undisturbed: tuple[Path, str], tmp_path: Path, mnist_root: Path
    ) -> None:
        # Checkpoints within the epoch as well: the kill falls between two of them.
        job = (*MAIN_JOB, "trainer.checkpoint_minutes=0.003")
        sweep = start(tmp_path, *job, BACKFORWARD_DATA=str(mnist_root))
        until(lambda: list(tmp_path.rglob("result.json")) and len(list(tmp_path.rglob("last.ckpt"))) >= 3)
        family = tree(sweep.pid)
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        sweep.communicate(timeout=10)
        until(lambda: not any(map(alive, family)), seconds=10)
        done = len(list(tmp_path.rglob("result.json")))
        assert 0 < done < 6

        again = start(tmp_path, *job, BACKFORWARD_DATA=str(mnist_root))
        out, _ = again.communicate(timeout=300)
        assert again.returncode == 0, out
        assert f"6 runs: {6 - done} finished, {done} done before, skipped" in out
        assert_same(tmp_path, undisturbed[0])
        assert not list(tmp_path.rglob("*.tmp"))


def test_what_can_happen_to_a_run(spawned: Command, tmp_path: Path) -> None:
    """Each failure is reported with its cause and log, and the other runs finish."""
    causes = {
        "Raises": "RuntimeError: the first step was the last",
        "IsKilled": "killed by SIGKILL (possibly by the out-of-memory killer",
        "RunsOutOfMemory": "out of memory (",
        "Hangs": "ran longer than timeout_min=0.2",
        "IsHalted": "ran longer than timeout_min=0.2",
    }
    targets = ",".join(f"tests.helpers.misbehaving.{name}" for name in (*causes, "Diverges"))
    ended = spawned(
        *("-m", f"optimizer._target_={targets},torch.optim.SGD", *DIGITS, "max_epochs=1"),
        *("timeout_min=0.2", "hydra.launcher.slots=4"),
        PYTHONPATH=WITH_TESTS,
    )
    assert ended.code == 1
    assert "7 runs: 1 finished, 1 diverged, 5 failed" in ended.out
    assert ended.err == "error: 5 of 7 runs failed; the same command runs them again\n"
    summary = ended.out.partition("7 runs:")[2].splitlines()
    for name, cause in causes.items():
        (place,) = [n for n, line in enumerate(summary) if f"misbehaving.{name}-" in line and line.startswith("failed")]
        assert cause in summary[place]
        log = tmp_path / summary[place + 1].strip().removeprefix("log: ")
        assert log.name == "run.log"
        assert log.read_text().startswith("$ python ")
        assert files.read_result(log.parent)["cause"].startswith(cause)  # also of runs that could not write it


def test_on_sigterm_each_run_of_a_sweep_writes_a_checkpoint(tmp_path: Path) -> None:
    sweep = start(tmp_path, "-m", "seed=0,1", *DIGITS, "max_epochs=100000", "trainer.checkpoint_minutes=100")
    until(lambda: len(list(tmp_path.rglob("last.ckpt"))) == 2)
    family = tree(sweep.pid)
    sweep.terminate()
    out, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 143
    assert "error: stopped by SIGTERM; the same command resumes from the last checkpoint" in out
    until(lambda: not any(map(alive, family)), seconds=10)
    for log in tmp_path.rglob("run.log"):
        assert log.read_text().endswith(
            "error: stopped by SIGTERM; the same command resumes from the last checkpoint\n"
        )
    assert not list(tmp_path.rglob("result.json"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_sweeps_at_once_share_the_work(tmp_path: Path) -> None:
    job = ("-m", "seed=0,1,2,3", *DIGITS, "max_epochs=30")
    sweeps = [start(tmp_path, *job) for _ in range(2)]
    outs = [sweep.communicate(timeout=200)[0] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], outs
    for seed in range(4):  # each run was trained by one of them, without interruption
        assert any(f"seed={seed}: finished, validation" in out for out in outs)
        (folder,) = tmp_path.rglob(f"*seed{seed}")
        # events.out.tfevents.<time>.<host>.<process>.<number>
        assert len({path.name.split(".")[-2] for path in folder.glob("events.*")}) == 1
    assert files.read_plan(tmp_path / "outputs" / "train").keys() == {
        folder.name for folder in (tmp_path / "outputs" / "train").iterdir() if folder.is_dir()
    }


def test_a_run_is_not_trained_twice_at_once(tmp_path: Path, train: Command) -> None:
    one = ("seed=0", *DIGITS, "max_epochs=100000")
    elsewhere = start(tmp_path, *one)
    until(lambda: list(tmp_path.rglob("last.ckpt")))
    ended = train(*one)
    assert ended.code == 75
    assert "another process is training this run; wait for it, or stop it" in ended.err
    assert len(ended.err.splitlines()) == 1
    (folder,) = (path.parent for path in tmp_path.rglob("last.ckpt"))
    assert locks.is_taken(folder)
    elsewhere.kill()
    elsewhere.communicate(timeout=10)
    assert not locks.is_taken(folder)  # a lock is released when its process ends


def test_a_failed_run_does_not_stop_the_others(spawned: Command, tmp_path: Path) -> None:
    ended = spawned("-m", "lr=0.1", "model.hidden=8,-5,4", *DIGITS[:1], *DIGITS[2:], "max_epochs=1")
    assert ended.code == 1
    assert "3 runs: 2 finished, 1 failed" in ended.out
    assert "hidden must be at least 1, got -5" in ended.out
    assert ended.err == "error: 1 of 3 runs failed; the same command runs them again\n"
    log = next(tmp_path.rglob("sgd-hidden-5*/run.log"))
    assert "Traceback" not in log.read_text()
    assert files.read_result(log.parent)["status"] == "failed"


def test_a_killed_child_does_not_stop_the_others(tmp_path: Path) -> None:
    sweep = start(tmp_path, "-m", "seed=0,1", *DIGITS, "max_epochs=100", "trainer.checkpoint_minutes=1")
    until(lambda: list(tmp_path.rglob("*seed1/last.ckpt")))
    workers = [pid for pid in tree(sweep.pid) if os.getpgid(pid) == pid and pid != sweep.pid]
    os.kill(max(workers), signal.SIGKILL)
    out, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 1
    assert "2 runs: 1 finished, 1 failed" in out
    assert "killed by SIGKILL" in out


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pool spawn processes instead of forking them from a server: the scripts need no torch."""
    bare = multiprocessing.get_context("spawn")
    monkeypatch.setattr(pool, "_forkserver", lambda threads: nullcontext(bare))


@pytest.mark.usefixtures("without_torch")
def test_a_run_killed_at_its_start_does_not_report_an_earlier_failure(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    request = requested(*DIGITS)
    job = Job(script, (), tmp_path / "run", request, ())
    lifecycle.note_failure(job.folder, request, "RuntimeError: an earlier failure")
    sweep = Sweep([job])
    PoolLauncher().work(sweep, [job])
    cause = sweep.outcomes[job.folder].cause
    assert cause is not None
    assert cause.startswith("killed by SIGKILL")
    assert (files.read_result(job.folder) or {})["cause"] == cause


class LosesAll(SchedulerLauncher):
    """A scheduler whose nodes die under their jobs."""

    poll_seconds = 0

    def cluster(self) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self, jobs: list[Job], submitted: dict[Any, Job]) -> None:
        submitted.update({job.name: job for job in jobs})

    def ended(self, submitted: Mapping[Any, Job]) -> dict[Any, int | str]:
        return dict.fromkeys(submitted, "job 1: NODE_FAIL")

    def cancel(self, submitted: Sequence[Any]) -> None:
        raise AssertionError("nothing should be cancelled")


def test_the_schedulers_account_of_a_lost_run_is_its_cause(tmp_path: Path) -> None:
    request = requested(*DIGITS)
    job = Job(tmp_path / "train.py", (), tmp_path / "run", request, ())
    lifecycle.note_failure(job.folder, request, "RuntimeError: an earlier failure")
    sweep = Sweep([job])
    LosesAll().work(sweep, [job])
    assert sweep.outcomes[job.folder].cause == "job 1: NODE_FAIL"
    assert (files.read_result(job.folder) or {})["cause"] == "job 1: NODE_FAIL"


class OneByOne(LosesAll):
    """A scheduler that runs each job in a process of its own, as Slurm and Ray do, when it is submitted."""

    def submit(self, jobs: list[Job], submitted: dict[Any, Job]) -> None:
        self.codes = {job.name: remote.run(*call_of(job)) for job in jobs}
        super().submit(jobs, submitted)

    def ended(self, submitted: Mapping[Any, Job]) -> dict[Any, int | str]:
        return {name: self.codes[name] for name in submitted}


@pytest.mark.parametrize("launcher", ["pool", "scheduler"])
def test_runs_on_data_that_were_replaced_are_refused_whatever_launches_them(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    if launcher == "scheduler":
        monkeypatch.setenv("PYTHONPATH", WITH_TESTS)
        monkeypatch.setattr(PoolLauncher, "get_ready", lambda *_: None)
        monkeypatch.setattr(PoolLauncher, "work", lambda _, sweep, jobs: OneByOne().work(sweep, jobs))
    job = ("-m", *MINE, f"data.root={tmp_path / 'data'}")
    write_data(tmp_path / "data", 0)
    assert train(*job).code == 0
    (folder,) = (path.parent for path in tmp_path.rglob("result.json"))
    finished = (folder / "result.json").read_bytes()

    write_data(tmp_path / "data", 1)
    write_data(tmp_path / "other", 1)
    for given in (job, (*job[:-1], f"data.root={tmp_path / 'other'}")):
        ended = train(*given)
        assert ended.code == 1
        assert "mine.npz holds other data now; give another name=... to keep both" in ended.out
        assert (folder / "result.json").read_bytes() == finished

    (folder / "result.json").unlink()  # half done: the run's own process checks its checkpoint
    ended = train(*job)
    assert ended.code == 1
    assert "last.ckpt cannot be resumed: its data have changed since it was written" in ended.out
    assert files.last_lines(folder / "run.log", 1)[0].startswith("error: ")


SHOWS_GPUS = """\
import os, sys, time
from pathlib import Path
names = os.environ["CUDA_VISIBLE_DEVICES"]
taken = [Path(sys.argv[1], name) for name in names.split(",")]
for gpu in taken:
    gpu.mkdir()  # fails if another run uses it
time.sleep(0.5)
for gpu in taken:
    gpu.rmdir()
print(names)
"""


@pytest.mark.usefixtures("without_torch")
def test_each_run_has_its_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "gpu_names", lambda: ["3", "7"])
    script = tmp_path / "shows.py"
    script.write_text(SHOWS_GPUS)
    one, two = requested(), requested("trainer.devices=2")
    jobs = [
        Job(script, (str(tmp_path),), tmp_path / f"run{number}", request, ())
        for number, request in enumerate([one, one, two, one])
    ]
    PoolLauncher().work(Sweep(jobs), jobs)
    seen = [files.last_lines(job.log, 1)[0] for job in jobs]
    assert sorted(seen[:2]) == ["3", "7"]  # at once
    assert sorted(seen[2].split(",")) == ["3", "7"]
    assert seen[3] in ("3", "7")


def test_ctrl_c_ends_the_children(tmp_path: Path) -> None:
    sweep = start(tmp_path, "-m", "seed=0,1,2", *DIGITS, "max_epochs=100000")
    until(lambda: list(tmp_path.rglob("last.ckpt")))
    family = tree(sweep.pid)
    assert len(family) >= 4  # itself, the fork server, two runs
    os.kill(sweep.pid, signal.SIGINT)
    out, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == 130
    assert "error: interrupted; the same command resumes" in out
    assert "Traceback" not in out
    until(lambda: not any(map(alive, family)), seconds=10)


def test_children_end_with_a_killed_parent(tmp_path: Path) -> None:
    sweep = start(tmp_path, "-m", "seed=0,1", *DIGITS, "max_epochs=100000")
    until(lambda: list(tmp_path.rglob("last.ckpt")))
    family = tree(sweep.pid)
    sweep.kill()
    sweep.communicate(timeout=10)
    until(lambda: not any(map(alive, family)), seconds=10)


def test_a_run_that_takes_too_long_is_ended_and_resumes_later(tmp_path: Path) -> None:
    job = ("seed=0", *DIGITS, "max_epochs=100000", "trainer.checkpoint_minutes=0.01")
    first = start(tmp_path, *job)
    until(lambda: list(tmp_path.rglob("last.ckpt")))
    first.kill()
    first.communicate(timeout=10)
    too_long = start(tmp_path, *job, "timeout_min=0.1")
    out, _ = too_long.communicate(timeout=100)
    assert too_long.returncode == 1
    assert "error: ran longer than timeout_min=0.1" in out
    assert "Thread 0x" in out  # the stack
    (folder,) = (path.parent for path in tmp_path.rglob("last.ckpt"))
    result = files.read_result(folder)
    assert result is not None
    assert (result["status"], result["cause"]) == ("failed", "ran longer than timeout_min=0.1")
    again = start(tmp_path, *job)
    assert again.stdout is not None
    assert any("goes on from step" in line for line in again.stdout)
    assert files.read_result(folder) is None  # the run has started
    again.kill()
    again.communicate(timeout=10)


def test_slots_bound_how_many_run_at_a_time_and_two_spellings_are_one_run(spawned: Command, tmp_path: Path) -> None:
    ended = spawned("-m", "seed=0,1", "lr=0.1,1e-1", *DIGITS, "max_epochs=1", "hydra.launcher.slots=1")
    assert ended.code == 0
    assert "2 runs: 2 finished" in ended.out
    for folder in (tmp_path / "outputs" / "train").glob("sgd-*"):
        result = files.read_result(folder)
        assert result is not None
        assert result["timing"]["threads"] == len(os.sched_getaffinity(0))  # one run at a time has all cores


def test_each_sweep_of_a_process_gives_its_runs_threads_of_their_own(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "cpu_count", lambda: 4)
    for slots in (4, 2, 1):  # the fork server was started by the first
        ended = train("-m", *DIGITS, "max_epochs=1", f"name=slots{slots}", f"hydra.launcher.slots={slots}")
        assert ended.code == 0, ended.err
        (path,) = (tmp_path / "outputs" / f"slots{slots}").rglob("result.json")
        result = files.read_result(path.parent)
        assert result is not None
        assert result["timing"]["threads"] == 4 // slots


def test_the_fork_server_starts_while_runs_are_composed_and_only_if_one_is_left(
    train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(PoolLauncher, "get_ready", lambda _, job: begun.append(job.name))
    sweep = ("-m", *DIGITS, "max_epochs=1", "seed=0,1")
    assert train(*sweep).code == 0
    assert len(begun) == 1
    assert "seed0" in begun[0]
    assert train(*sweep).code == 0
    assert len(begun) == 1
    assert train(*sweep[:-1], "seed=0,1,2").code == 0
    assert len(begun) == 2
    assert "seed2" in begun[1]
