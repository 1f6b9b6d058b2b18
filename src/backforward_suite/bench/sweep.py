"""What a sweep costs: the pool's time for many runs of the MLP, against the same bare loops."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backforward_suite.bench.training import (
    LR,
    MLP_CASE,
    bare_epochs,
    multiply_accumulates,
    multiply_accumulates_per_second,
)
from backforward_suite.data import load_data
from backforward_suite.hardware import cpu_count
from backforward_suite.runs.files import read_result

SLOTS = min(2, cpu_count())
EPOCHS = 10
STARTS = 5  # of a run alone


@dataclass(frozen=True)
class SweepCase:
    """A sweep over seeds.

    Attributes:
        data: The data set.
        batch: Samples in a batch.
        runs: How many.
        one_by_one: Whether the same runs are also given as a command each.
    """

    data: str
    batch: int
    runs: int
    one_by_one: bool = False


CASES = (SweepCase("mnist", 128, 60), SweepCase("digits", 32, 20, one_by_one=True))


def run(script: Path, root: Path) -> list[dict[str, Any]]:
    """Time each sweep once: the pool, with half of the bare loops before and half after.

    Args:
        script: `train.py`.
        root: The folder of data sets; a case whose data are not there is left out.

    Returns:
        A row for each case. Seconds of the whole command, starts and imports and evaluations included, those of the
        bare loops without; their ratios; `single_s`: of the same runs as a command each, `SLOTS` at a time;
        `start_s`: the median over runs of the seconds from the start of a run's process to its first batch, and of a
        run by itself; the floor: multiply-accumulates at the speed of a large matrix product on every slot.
    """
    threads = max(1, cpu_count() // SLOTS)
    torch.set_num_threads(threads)
    peak = multiply_accumulates_per_second()
    alone = _start_alone(script, root, threads)
    return [
        {**_row(case, script, root, threads, peak), "start_alone_s": alone}
        for case in CASES
        if case.data == "digits" or (root / f"{case.data}.npz").is_file()
    ]


def _row(case: SweepCase, script: Path, root: Path, threads: int, peak: float) -> dict[str, Any]:
    data = load_data(case.data, root)
    steps = case.runs * EPOCHS * (len(data.train) // case.batch)
    network = MLP_CASE.build(data.shape, data.classes)
    floor = steps * multiply_accumulates(network, "sgd", (case.batch, *data.shape)) / peak / SLOTS
    # Half before and half after, so that a machine that gets slower or faster does so for both.
    loops = math.ceil(case.runs / SLOTS / 2)
    before = _bare(case, loops, root, threads)
    seconds, starts = _sweep(case, script, root, threads)
    by_hand = (before + _bare(case, loops, root, threads)) * case.runs / (2 * loops * SLOTS)
    single = _one_by_one(case, script, root, threads) if case.one_by_one else None
    return {
        "case": f"{case.runs} mlp x {EPOCHS} epochs, {case.data}, batch {case.batch}",
        "bare_s": by_hand,
        "floor_s": floor,
        "single_s": single,
        "pool_s": seconds,
        "start_s": statistics.median(starts) if starts else None,
        "pool/bare": seconds / by_hand,
        "slots": SLOTS,
        "threads": threads,
    }


def _bare(case: SweepCase, loops: int, root: Path, threads: int) -> float:
    """Seconds of so many bare loops in each slot, the longer of the processes: without start, import and data."""
    arguments = f"{case.data!r}, {str(root)!r}, {case.batch}, {loops}"
    code = f"from backforward_suite.bench import sweep; print(sweep.bare_loops({arguments}))"
    processes = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=_environment(root, threads)
        )
        for _ in range(SLOTS)
    ]
    return max(float(process.communicate()[0]) for process in processes)


def bare_loops(data: str, root: str, batch: int, count: int) -> float:
    """Seconds of so many trainings by the bare loop, one after the other."""
    images = load_data(data, Path(root))
    return sum(bare_epochs(MLP_CASE.build, "sgd", images, batch, EPOCHS) for _ in range(count))


def _sweep(case: SweepCase, script: Path, root: Path, threads: int) -> tuple[float, list[float]]:
    """Seconds of the command, and of each run those to its first batch."""
    seeds = ",".join(str(seed) for seed in range(case.runs))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "-m", f"seed={seeds}", *_overrides(case)]
        command += [f"hydra.launcher.slots={SLOTS}"]
        started = time.perf_counter()
        _done(command, folder, root, threads)
        return time.perf_counter() - started, _starts(folder)


def _one_by_one(case: SweepCase, script: Path, root: Path, threads: int) -> float:
    """Seconds of the same runs as a command each."""

    def train(seed: int) -> None:
        _done([sys.executable, str(script), f"seed={seed}", *_overrides(case)], folder, root, threads)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(SLOTS) as slots:
        started = time.perf_counter()
        list(slots.map(train, range(case.runs)))
        return time.perf_counter() - started


def _start_alone(script: Path, root: Path, threads: int) -> float | None:
    """Seconds from the start of the process of a run by itself to its first batch: the median of some."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(STARTS):
            chosen = [f"seed={seed}", "data=digits", "max_epochs=1", "trainer.accelerator=cpu"]
            _done([sys.executable, str(script), *chosen], folder, root, threads)
        return statistics.median(starts) if (starts := _starts(folder)) else None


def _overrides(case: SweepCase) -> list[str]:
    chosen = [f"data={case.data}", f"batch_size={case.batch}", f"lr={LR}", f"max_epochs={EPOCHS}"]
    return [*chosen, "trainer.accelerator=cpu"]


def _done(command: list[str], folder: str, root: Path, threads: int) -> None:
    subprocess.run(  # noqa: S603
        command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=_environment(root, threads)
    )


def _starts(folder: str) -> list[float]:
    """Of the runs below a folder, where the system tells."""
    results = [read_result(path.parent) for path in Path(folder).rglob("result.json")]
    starts = [result["timing"]["start_seconds"] for result in results if result is not None]
    return [start for start in starts if start is not None]


def _environment(root: Path, threads: int) -> dict[str, str]:
    return {**os.environ, "BACKFORWARD_DATA": str(root.resolve()), "OMP_NUM_THREADS": str(threads)}
