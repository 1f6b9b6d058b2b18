"""Cost of diagnostics, as a share of the training steps: over the default schedule, and in its first epoch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from backforward_suite.bench.common import Row, available, data_overrides, train
from backforward_suite.train.callbacks.diagnostics import due

BUNDLES = ("cheap", "full")
EPOCHS = 10  # the default schedule
IMAGES = {"mnist": 55_000, "cifar10": 45_000}  # in the training set


class DiagnosticsCase(NamedTuple):
    """A network on a data set, by default settings otherwise; the costs are extrapolated from a few batches."""

    model: list[str]
    data: str
    batch_size: int
    batches: int
    rounds: int


CASES = {
    "mlp": DiagnosticsCase(["model=mlp"], "mnist", 128, 400, 5),
    "nin, width 0.25": DiagnosticsCase(["model=nin", "model.width=0.25"], "cifar10", 50, 64, 3),
    "nin": DiagnosticsCase(["model=nin"], "cifar10", 50, 16, 1),
}


def run(root: Path, cases: Iterable[str] = tuple(CASES)) -> list[Row]:
    """Train with each bundle in turn, by plain SGD: the cheapest rule, so that the relative cost is highest.

    Args:
        root: The folder of data sets.
        cases: Names in `CASES`.

    Returns:
        One row per case and bundle: medians over rounds of what `added` returns, and the extremes of `added`.
    """
    rows = []
    for name in cases:
        case = CASES[name]
        choice = [*data_overrides(case.data, root), *case.model, "method=sgd", f"batch_size={case.batch_size}"]
        choice += ["max_epochs=1", "trainer.progress_bar=false"]
        if available(case.data, root):
            choice += [f"data.train_images={case.batches * case.batch_size}", "data.evaluation_images=2000"]
        per_epoch = IMAGES[case.data] // case.batch_size
        costs: dict[str, list[dict[str, float]]] = {bundle: [] for bundle in BUNDLES}
        for _ in range(case.rounds):
            for bundle, found in costs.items():
                result = train([*choice, f"diagnostics={bundle}"])
                found.append(added(result, per_epoch))
        for bundle, found in costs.items():
            shares = [cost["added"] for cost in found]
            medians = {key: statistics.median(cost[key] for cost in found) for key in found[0]}
            label = f"{name}, {result['data']['name']}, batch {case.batch_size}"
            extremes = {"added_least": min(shares), "added_most": max(shares)}
            rows.append({"case": label, "bundle": bundle, **medians, **extremes, "rounds": case.rounds})
    return rows


def added(result: dict[str, Any], per_epoch: int) -> dict[str, float]:
    """Extrapolate the costs in one run to the default schedule.

    Args:
        result: Of a run with diagnostics.
        per_epoch: Batches per epoch of the default schedule.

    Returns:
        `step_ms`, `batch_ms` and `epoch_ms`: a training step, one measurement within an epoch and one at its end;
        `added`: the time of all measurements as a share of that of all steps; `added_first`: the same for the first
        epoch, with the measurements before it.
    """
    seconds, times = result["timing"]["diagnostics_seconds"], result["timing"]["diagnostics_times"]
    within, end = seconds["batch"] / times["batch"], seconds["epoch"] / times["epoch"]
    step = (result["timing"]["training_seconds"] - seconds["batch"] - seconds["epoch"]) / result["final"]["step"]
    schedule = [when for key, when in result["settings"]["diagnostics"].items() if key != "samples"]

    def share(epochs: int) -> float:
        steps = range(1, epochs * per_epoch + 1)
        measured = sum(any(due(when, n, per_epoch) for when in schedule) for n in steps if n % per_epoch)
        return float((seconds["start"] + epochs * end + measured * within) / (len(steps) * step))

    return {
        "step_ms": 1000 * step,
        "batch_ms": 1000 * within,
        "epoch_ms": 1000 * end,
        "added": share(EPOCHS),
        "added_first": share(1),
    }
