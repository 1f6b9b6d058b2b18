"""Kill sweeps at random moments, and compare their results with those of an undisturbed sweep.

    PYTHONPATH=src python -m tests.helpers.torture --kills 40 --epochs 16      # make torture

Eight runs on real MNIST. A kill is `kill -9` of a run, of the sweep's own process, or of all its processes at once.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.sweeps import alive, assert_same, start, tree, until

from backforward_suite.runs import files
from backforward_suite.train.callbacks.checkpoint import read_checkpoint

JOB = ("-m", "method=bfp,sgd", "lr=0.1,0.05", "seed=0,1", "data=mnist", "trainer.accelerator=cpu")
OFTEN = "trainer.checkpoint_minutes=0.005"
KINDS = ("run", "sweep", "all")


@dataclass(frozen=True)
class Standing:
    """The progress of a run while no process works on it.

    Attributes:
        starts: Number of starts.
        step: The step of its checkpoint.
        changed: The modification time of its checkpoint, in nanoseconds.
        done: Whether it has a result.
    """

    starts: int
    step: int
    changed: int
    done: bool


def torture(cwd: Path, data: Path, kills: int, epochs: int, seed: int = 0) -> Counter[str]:
    """Sweep under kills until all runs are done.

    Args:
        cwd: An empty folder.
        data: Where MNIST lies.
        kills: Number of kills.
        epochs: Epochs of each run; there must be enough for all kills.
        seed: Seed of the moments and the victims.

    Returns:
        The number of kills of each kind.

    Raises:
        AssertionError: A run that had a checkpoint did not resume from it.
    """
    chance, done = random.Random(seed), Counter[str]()
    standings: dict[Path, Standing] = {}
    for _ in range(4 * kills + 4):
        sweep = start(cwd, *JOB, OFTEN, f"max_epochs={epochs}", BACKFORWARD_DATA=str(data))
        while sweep.poll() is None and done.total() < kills:
            if chance.random() < 0.8:  # most kills hit training, some a start
                now = time.time()
                until(lambda sweep=sweep, now=now: sweep.poll() is not None or trained_since(cwd, now), seconds=300)
            time.sleep(chance.uniform(0, 1.5))
            kind, family = chance.choice(KINDS), tree(sweep.pid)
            victims = {"run": workers(sweep)[:1], "sweep": [sweep.pid], "all": family}[kind]
            if sweep.poll() is not None or not victims:
                continue
            for victim in victims:
                kill(victim)
            done[kind] += 1
            if kind != "run":
                sweep.wait(10)
                until(lambda family=family: not any(map(alive, family)), seconds=20)
        out, _ = sweep.communicate(timeout=600)
        standings = look(cwd, standings)
        if sweep.returncode == 0:
            break
    assert sweep.returncode == 0, out
    assert done.total() == kills, f"only {done.total()} of {kills} kills: give more epochs"
    return done


def look(cwd: Path, before: dict[Path, Standing]) -> dict[Path, Standing]:
    """Look at the progress of each run with a checkpoint.

    Raises:
        AssertionError: A run has progressed since the last look without resuming from the checkpoint it had then.
    """
    now = {}
    for path in cwd.rglob("last.ckpt"):
        log, result = path.with_name("run.log"), files.read_result(path.parent)
        starts = log.read_text().split("$ python ")[1:]
        step = int(read_checkpoint(path)["global_step"])
        done = result is not None and result["status"] in files.DONE
        now[log] = Standing(len(starts), step, path.stat().st_mtime_ns, done)
        if log in before:
            check_resumed(log, before[log], now[log], starts)
    return now


def check_resumed(log: Path, before: Standing, now: Standing, starts: Sequence[str]) -> None:
    """Raise AssertionError if a run has progressed without resuming from its checkpoint.

    A start that was killed before it could print where it resumes has not changed the checkpoint.
    """
    if before.done or (now.changed, now.done) == (before.changed, before.done):
        return
    found = re.search(r"goes on from step (\d+)", "".join(starts[before.starts :]))
    assert found, f"{log}: had a checkpoint at step {before.step}, and started from scratch"
    assert int(found.group(1)) == before.step, f"{log}: had a checkpoint at step {before.step}, and {found.group()}"


def trained_since(cwd: Path, moment: float) -> bool:
    """Whether a run has written a checkpoint since a moment."""
    times = []
    for path in cwd.rglob("last.ckpt"):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times, default=0) > moment


def workers(sweep: subprocess.Popen[str]) -> list[int]:
    """The training processes of a sweep."""
    found = []
    for pid in tree(sweep.pid)[1:]:
        try:
            if os.getpgid(pid) == pid:
                found.append(pid)
        except ProcessLookupError:
            continue
    return found


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def undisturbed(cwd: Path, data: Path, epochs: int) -> None:
    """Run the same sweep undisturbed."""
    sweep = start(cwd, *JOB, f"max_epochs={epochs}", BACKFORWARD_DATA=str(data))
    out, _ = sweep.communicate(timeout=3600)
    assert sweep.returncode == 0, out


def compare(cwd: Path, alone: Path) -> None:
    """Check that weights, running sums and metrics.csv are bitwise equal, and that no temporary file is left."""
    assert len(list(cwd.rglob("result.json"))) == 8
    assert_same(cwd, alone)
    assert not list(cwd.rglob("*.tmp"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill a sweep at random moments; compare it with an undisturbed one.")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    root = Path(os.environ.get("BACKFORWARD_DATA", "data")).absolute()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("killed", "alone")]
        for folder in folders:
            folder.mkdir()
        began = time.monotonic()
        kinds = torture(folders[0], root, given.kills, given.epochs, given.seed)
        undisturbed(folders[1], root, given.epochs)
        compare(*folders)
        print(
            f"{given.kills} kills ({', '.join(f'{kinds[kind]} of {kind}' for kind in KINDS)}): 8 results, weights, "
            f"running sums and metrics.csv bitwise equal to an undisturbed sweep's; {time.monotonic() - began:.0f} s"
        )
