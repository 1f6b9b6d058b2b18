"""What a sweep costs: the pool's and the stack's time for many runs of the MLP, against the same bare loops."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backforward.bench.training import LR, MLP_CASE, bare_epochs, multiply_accumulates, multiply_accumulates_per_second
from backforward.data import load_data
from backforward.hardware import cpu_count
from backforward.runs import read_result

SLOTS = min(2, cpu_count())
EPOCHS = 10


@dataclass(frozen=True)
class Case:
    """A sweep over seeds.

    Attributes:
        data: The data set.
        batch: Samples in a batch.
        runs: How many.
    """

    data: str
    batch: int
    runs: int


CASES = (Case("mnist", 128, 20), Case("digits", 32, 20))


def run(script: Path, root: Path) -> list[dict[str, Any]]:
    """Time each sweep once: bare loops `SLOTS` at a time, the pool, and stacks.

    Args:
        script: `train.py`.
        root: The folder of data sets; a case whose data are not there is left out.

    Returns:
        A row for each case. Seconds of the whole command, starts and imports and evaluations included, those of the
        bare loops without; their ratios; the median over runs of the seconds from the start of a run's process to its
        first batch; the floor: multiply-accumulates at the speed of a large matrix product on every slot.
    """
    threads = max(1, cpu_count() // SLOTS)
    torch.set_num_threads(threads)
    peak = multiply_accumulates_per_second()
    return [
        _row(case, script, root, threads, peak)
        for case in CASES
        if case.data == "digits" or (root / f"{case.data}.npz").is_file()
    ]


def _row(case: Case, script: Path, root: Path, threads: int, peak: float) -> dict[str, Any]:
    data = load_data(case.data, root)
    steps = case.runs * EPOCHS * (len(data.train) // case.batch)
    network = MLP_CASE.build(data.shape, data.classes)
    floor = steps * multiply_accumulates(network, "sgd", (case.batch, *data.shape)) / peak / SLOTS
    bare = _bare(case, root, threads)
    row: dict[str, Any] = {"case": f"{case.runs} mlp x {EPOCHS} epochs, {case.data}, batch {case.batch}"}
    row |= {"bare_s": bare}
    for launcher in ("pool", "stacked"):
        seconds, starts = _sweep(case, script, root, launcher, threads)
        row |= {f"{launcher}_s": seconds, f"{launcher}/bare": seconds / bare}
        if launcher == "pool":
            row["start_s"] = starts[len(starts) // 2] if starts else None
    row["pool/stacked"] = row["pool_s"] / row["stacked_s"]
    return {**row, "floor_s": floor, "slots": SLOTS, "threads": threads}


def _bare(case: Case, root: Path, threads: int) -> float:
    """Seconds of the bare loops alone, the longer of the processes: without start, import and data."""
    code = (
        f"from backforward.bench import sweep; print(sweep.bare_loops({case.data!r}, {str(root)!r}, {case.batch}, "
        f"{case.runs // SLOTS}))"
    )
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


def _sweep(case: Case, script: Path, root: Path, launcher: str, threads: int) -> tuple[float, list[float]]:
    """Seconds of the command, and of each run those to its first batch, sorted."""
    seeds = ",".join(str(seed) for seed in range(case.runs))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "-m", f"seed={seeds}", f"data={case.data}", f"batch_size={case.batch}"]
        command += [f"lr={LR}", f"max_epochs={EPOCHS}", "trainer.accelerator=cpu"]
        command += [f"hydra/launcher={launcher}", f"hydra.launcher.slots={SLOTS}"]
        started = time.perf_counter()
        subprocess.run(  # noqa: S603
            command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=_environment(root, threads)
        )
        seconds = time.perf_counter() - started
        results = [read_result(path.parent) for path in Path(folder).rglob("result.json")]
    starts = [result["timing"]["start_seconds"] for result in results if result is not None]
    return seconds, sorted(start for start in starts if start is not None)


def _environment(root: Path, threads: int) -> dict[str, str]:
    return {**os.environ, "BACKFORWARD_DATA": str(root.resolve()), "OMP_NUM_THREADS": str(threads)}
