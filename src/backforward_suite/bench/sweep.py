"""Cost of a sweep: the pool's time for many runs of the MLP, against the same trainings in bare loops."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from backforward.models import MLP
from backforward_suite.bench.common import CONF, Row, available
from backforward_suite.bench.training import LR, bare_epochs
from backforward_suite.data import load_data
from backforward_suite.hardware import cpu_count
from backforward_suite.runs.files import read_result

SCRIPT = CONF.parent / "src" / "train.py"
SLOTS = min(2, cpu_count())
THREADS = max(1, cpu_count() // SLOTS)
EPOCHS = 10


class SweepCase(NamedTuple):
    """A sweep over seeds; `one_by_one`: also time the same runs as one command each."""

    data: str
    batch_size: int
    runs: int
    one_by_one: bool = False


CASES = (SweepCase("mnist", 128, 60), SweepCase("digits", 32, 20, one_by_one=True))


def run(root: Path) -> list[Row]:
    """Time each sweep once, between two halves of the bare loops.

    Args:
        root: The folder of data sets; a case whose data set is missing is left out.

    Returns:
        One row per case: seconds of the whole command (`pool_s`: with imports and evaluations), of the bare loops
        (`bare_s`: without) and of one command per run (`single_s`), `SLOTS` at a time; `start_s`, the median seconds
        from the start of a run's process to its first batch in the sweep, and `start_alone_s` of a single run.
    """
    alone = statistics.median(_commands(["data=digits", "max_epochs=1"], range(5), 1, root)[1])
    cases = [case for case in CASES if case.data == "digits" or available(case.data, root)]
    return [{**_row(case, root), "start_alone_s": alone} for case in cases]


def _row(case: SweepCase, root: Path) -> Row:
    choice = [f"data={case.data}", f"batch_size={case.batch_size}", f"lr={LR}", f"max_epochs={EPOCHS}"]
    seeds = range(case.runs)
    # Half before and half after, so that a machine that gets slower or faster does so for both.
    loops = -(-case.runs // (2 * SLOTS))
    before = _bare(case, loops, root)
    with tempfile.TemporaryDirectory() as folder:
        sweep = ["-m", f"seed={','.join(map(str, seeds))}", f"hydra.launcher.slots={SLOTS}"]
        pool, starts = _command([*sweep, *choice], folder, root), _starts(folder)
    bare = (before + _bare(case, loops, root)) * case.runs / (2 * loops * SLOTS)
    return {
        "case": f"{case.runs} mlp x {EPOCHS} epochs, {case.data}, batch {case.batch_size}",
        "bare_s": bare,
        "single_s": _commands(choice, seeds, SLOTS, root)[0] if case.one_by_one else None,
        "pool_s": pool,
        "start_s": statistics.median(starts),
        "pool/bare": pool / bare,
        "slots": SLOTS,
        "threads": THREADS,
    }


def _bare(case: SweepCase, loops: int, root: Path) -> float:
    """Return the seconds of so many bare loops per slot, in parallel, without start, imports and loading."""
    code = f"from backforward_suite.bench import sweep; print(sweep.bare_loops({tuple(case)}, {str(root)!r}, {loops}))"
    command, environment = [sys.executable, "-c", code], _environment(root)
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603
        for _ in range(SLOTS)
    ]
    return max(float(process.communicate()[0]) for process in processes)


def bare_loops(case: tuple[str, int, int, bool], root: str, count: int) -> float:
    """Return the seconds of so many trainings by the bare loop, one after the other."""
    data, batch_size, *_ = case
    images = load_data(data, Path(root))
    return sum(bare_epochs(MLP, "sgd", images, batch_size, EPOCHS) for _ in range(count))


def _commands(choice: list[str], seeds: range, at_a_time: int, root: Path) -> tuple[float, list[float]]:
    """Give one command per seed; return their seconds together, and those of each up to its first batch."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_a_time) as slots:
        started = time.perf_counter()
        list(slots.map(lambda seed: _command([f"seed={seed}", *choice], folder, root), seeds))
        return time.perf_counter() - started, _starts(folder)


def _command(arguments: list[str], folder: str, root: Path) -> float:
    """Run `train.py` in a folder; return its seconds."""
    started = time.perf_counter()
    command = [sys.executable, str(SCRIPT), *arguments, "trainer.accelerator=cpu"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=_environment(root))  # noqa: S603
    return time.perf_counter() - started


def _starts(folder: str) -> list[float]:
    """Return the seconds to the first batch of the runs below a folder; NaN where the system does not tell."""
    results = [read_result(path.parent) for path in Path(folder).rglob("result.json")]
    starts = [result["timing"]["start_seconds"] for result in results if result is not None]
    return [float("nan") if start is None else start for start in starts]


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "BACKFORWARD_DATA": str(root.resolve()), "OMP_NUM_THREADS": str(THREADS)}
