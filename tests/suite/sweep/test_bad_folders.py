"""A folder that cannot be used fails only its own run; a refused command writes and deletes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout
from tests.helpers.commands import TRAIN, Command, environment
from tests.helpers.configs import requested, with_hydra
from tests.helpers.sweeps import DIGITS, start, tree, until

from backforward_suite import config
from backforward_suite.config import Request
from backforward_suite.errors import BadInput, Refused
from backforward_suite.runs import files, lifecycle, locks
from backforward_suite.sweep.jobs import Outcome
from backforward_suite.sweep.launcher import _failure

SMALL = (*DIGITS, "max_epochs=1")
NAME = "sgd-hidden8-digits-batch_size64-max_epochs1"


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below a folder, except locks."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != locks.LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_one_bad_folder_does_not_stop_the_others(spawned: Command, tmp_path: Path) -> None:
    root = tmp_path / "outputs" / "train"
    root.mkdir(parents=True)
    place = [root / f"{NAME}-seed{seed}" for seed in range(10)]
    place[0].write_text("a file")
    place[1].symlink_to(tmp_path / "nowhere")
    for path in place[2:9]:
        path.mkdir()
    (place[2] / "result.json").mkdir()
    (place[3] / "run.log").mkdir()
    (place[4] / ".lock").mkdir()
    (place[5] / "result.json").write_text("[" * 100_000)
    (place[6] / "result.json").write_text('{"status": "finished", "settings": [], "settings_hash": "0"}')
    (place[7] / "result.json").write_text('{"status": "finished", "final": {"accuracy/validation": "high"}}')
    (place[8] / "notes.txt").write_text("mine")
    ended = spawned("-m", f"seed={','.join(map(str, range(10)))}", *SMALL)
    assert ended.code == 1
    assert "10 runs: 1 finished, 9 failed" in ended.out
    assert "Traceback" not in ended.out + ended.err
    summary = ended.out.partition("10 runs:")[2]
    for seed, cause in enumerate(
        ("is a file", "is a link that leads nowhere", "cannot be read (Is a directory)", "Is a directory",
         "Is a directory", "nested too deeply", "settings is no mapping", "accuracy/validation is no number",
         "holds files that no run has left there (notes.txt)")
    ):  # fmt: skip
        (line,) = [line for line in summary.splitlines() if line.startswith(f"failed {NAME}-seed{seed}:")]
        assert cause in line
    assert (files.read_result(place[9]) or {})["status"] == "finished"


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may enter any folder")
def test_a_folder_without_rights_does_not_stop_the_others(tmp_path: Path) -> None:
    closed = tmp_path / "outputs" / "train" / f"{NAME}-seed0"
    closed.mkdir(parents=True)
    closed.chmod(0)
    no_rights = "-dac_override,-dac_read_search"
    plain = ["setpriv", f"--bounding-set={no_rights}", "--"] if os.geteuid() == 0 else []
    command = [*plain, sys.executable, str(TRAIN), "-m", "seed=0,1", *SMALL]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    closed.chmod(0o700)
    assert "2 runs: 1 finished, 1 failed" in ended.stdout, ended.stderr
    folder = f"outputs/train/{NAME}-seed0"
    assert f"failed {NAME}-seed0: {folder}/result.json cannot be read (Permission denied)" in ended.stdout
    assert ended.stderr == "error: 1 of 2 runs failed; the same command runs them again\n"


def test_runs_of_one_folder_are_refused(train: Command, tmp_path: Path) -> None:
    ended = train("-m", "seed=0,1", *SMALL, "hydra.sweep.subdir=same")
    assert ended.code == 2
    assert "two runs of this sweep have the folder outputs/train/same: seed=1 (there: 0)" in ended.err
    assert contents(tmp_path).keys() <= {"outputs/train/multirun.yaml"}


def test_a_deleted_lock_file_still_holds(tmp_path: Path) -> None:
    with locks.locked(tmp_path):
        (tmp_path / locks.LOCK).unlink()
        assert locks.is_taken(tmp_path)
        with pytest.raises(Timeout), locks.locked(tmp_path):
            pass
        (tmp_path / locks.LOCK).unlink()  # the second one's
        assert locks.is_taken(tmp_path)
    assert not locks.is_taken(tmp_path)


def test_a_sweep_is_named_before_a_folder_is_made(train: Command, tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text("mine")
    for name in ("..", "../../x", "/tmp", "a/../b"):
        ended = train("-m", "seed=0,1", *SMALL, f"name={name}")
        assert ended.code == 2
        assert f"name={name}: give letters" in ended.err
        assert len(ended.err.splitlines()) == 1
    assert contents(tmp_path) == {"multirun.yaml": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["multirun.yaml"]


def test_a_foreign_folder_is_left_as_it_is(train: Command, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "below").mkdir(parents=True)
    for name in ("metrics.csv", "best.ckpt", ".draft.tmp", "below/.other.abcdefgh.tmp", ".metrics.csv.abcdefgh.tmp"):
        (mine / name).write_text("mine")
    before = contents(tmp_path)
    ended = train(*SMALL, "hydra.run.dir=mine")
    assert ended.code == 2
    assert "mine holds files that no run has left there (below, best.ckpt, metrics.csv)" in ended.err
    assert contents(tmp_path) == before
    assert not (mine / locks.LOCK).exists()


def test_a_run_removes_what_a_killed_one_left_half_written_and_nothing_else(train: Command, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "train" / NAME
    folder.mkdir(parents=True)
    (folder / locks.LOCK).touch()
    keep = (".draft.tmp", ".metrics.csv.tmp", ".notes.txt.abcdefgh.tmp", "mine/.metrics.csv.abcdefgh.tmp")
    (folder / "mine").mkdir()
    for name in (*keep, ".last.ckpt.abcd_f12.tmp"):
        (folder / name).write_text("x")
    assert train(*SMALL).code == 0
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.tmp")} == set(keep)


def test_other_settings_leave_a_half_done_run_as_it_is(train: Command, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "train" / NAME
    assert train(*SMALL).code == 0
    (folder / "result.json").unlink()
    before = contents(folder)
    ended = train(*SMALL, "lr=0.3", f"hydra.run.dir={folder}")
    assert ended.code == 2
    assert "last.ckpt is of other settings: lr=0.3 (there: 0.1)" in ended.err
    assert contents(folder) == before


def test_a_folder_of_a_sweep_is_no_runs(tmp_path: Path) -> None:
    lifecycle.add_to_plan(tmp_path, {"one": []})
    with pytest.raises(BadInput, match="is the folder of a sweep"), lifecycle.claimed(tmp_path, requested()):
        pass


class TestOlderVersions:
    def test_a_key_that_came_later_is_no_difference_where_it_changes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = Request.of(with_hydra())
        older = {key: value for key, value in request.values.items() if key != "max_grad_norm"}
        with monkeypatch.context() as patch:
            patch.setattr(config, "ADDED_LATER", {"max_grad_norm": None})
            files.write_result(
                tmp_path, {"status": "finished", "settings": older, "settings_hash": config.fingerprint(older)}
            )
            assert lifecycle.finished_result(tmp_path, request) is not None
            with pytest.raises(Refused, match=r"max_grad_norm=1\.0 \(there: None\)"):
                lifecycle.finished_result(tmp_path, Request.of(with_hydra("max_grad_norm=1.0")))
        with pytest.raises(Refused):
            lifecycle.finished_result(tmp_path, request)

    def test_it_is_named_and_the_way_on_is_offered(self, tmp_path: Path) -> None:
        request = Request.of(with_hydra("lr=0.2"))
        result = {"status": "finished", "settings": request.values, "settings_hash": request.hash}
        files.write_result(tmp_path, {**result, "code": {"commit": "4def558d68110d49810f"}})
        with pytest.raises(Refused, match=r"\(made by commit 4def558d6\): lr=0\.1 .*give another name=") as error:
            lifecycle.finished_result(tmp_path, Request.of(with_hydra()))
        assert json.loads((tmp_path / "result.json").read_text())["settings"]["lr"] == 0.2
        refused, failed, done = (
            Outcome(cause=str(error.value), refused=True), Outcome(cause="x"), Outcome(result={})
        )  # fmt: skip
        assert _failure([failed, done]) == "1 of 2 runs failed; the same command runs them again"
        assert "the same command" not in _failure([refused, done])
        assert "1 of 3 runs: their folders hold other runs; give another name=..." in _failure([refused, failed, done])
        assert "1 failed and are run again by the same command" in _failure([refused, failed, done])


@pytest.mark.slow
def test_a_killed_fork_server_is_replaced(tmp_path: Path) -> None:
    sweep = start(tmp_path, "-m", "seed=0,1", *DIGITS, "max_epochs=60", "hydra.launcher.slots=1")
    until(lambda: list(tmp_path.rglob("last.ckpt")))
    (server,) = [
        pid
        for pid in tree(sweep.pid)
        if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes() and os.getpgid(pid) == os.getpgid(sweep.pid)
    ]
    os.kill(server, signal.SIGKILL)
    out, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, out
    assert "2 runs: 2 finished" in out
    log = next(tmp_path.rglob("*seed0/run.log")).read_text()
    assert "goes on from step" in log


def test_a_long_tmpdir_is_refused(spawned: Command, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    ended = spawned("-m", "seed=0,1", *SMALL, TMPDIR=str(long))
    assert ended.code == 2
    assert "too long for the name of a socket in it" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_brackets_in_a_path_are_no_markup(train: Command, tmp_path: Path) -> None:
    ended = train(*SMALL, "hydra.run.dir='out/[bold]x[/b]'")
    assert ended.code == 0, ended.err
    assert "out/[bold]x[/b]" in ended.out
