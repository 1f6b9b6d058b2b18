"""What diagnostics add to training, as a share of an epoch: on average over the default schedule, and of the first."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backforward_suite.runs.files import Result
from backforward_suite.train.callbacks.diagnostics import due

BUNDLES = ("cheap", "full")

Train = Callable[[list[str], Path], Result]  # overrides, folder -> result


class DiagnosticsCase(NamedTuple):
    """A network on a data set, with the defaults of `conf/train.yaml` in all else.

    Attributes:
        model: Overrides that choose it.
        data: The data set.
        stand_in: Overrides for where it is missing.
        batch: Samples in a batch.
        batches: Batches trained on. The prices found are carried over to the default schedule.
        rounds: Runs of each bundle.
    """

    model: list[str]
    data: str
    stand_in: list[str]
    batch: int
    batches: int
    rounds: int


CASES = {
    "mlp": DiagnosticsCase(["model=mlp"], "mnist", ["data=digits", "data.size=28"], 128, 400, 5),
    "nin, width 0.25": DiagnosticsCase(
        ["model=nin", "model.width=0.25"], "cifar10", ["data=digits", "data.size=32"], 50, 64, 3
    ),
    "nin": DiagnosticsCase(["model=nin"], "cifar10", ["data=digits", "data.size=32"], 50, 16, 1),
}
EPOCHS = 10  # the default schedule, on all of the training set:
IMAGES = {"mnist": 55_000, "cifar10": 45_000}
EVALUATED = 2000  # images of validation and test set: enough for each bundle


def run(
    train: Train, root: Path, cases: Iterable[str] = tuple(CASES), bundles: Sequence[str] = BUNDLES
) -> list[dict[str, Any]]:
    """Train with each bundle in turn. Plain SGD is the cheapest rule, so the relative price is highest.

    Args:
        train: Trains one run from overrides in a folder.
        root: The folder of data sets; digits stand in for what is missing there, and the row says so.
        cases: Of `CASES`.
        bundles: To be compared with `off`.

    Returns:
        For each case and bundle: seconds of a step, of measuring after a batch within an epoch and at the end of one,
        and what they add up to as shares of the time of the steps; medians over rounds, of `added` the extremes too.
    """
    rows = []
    for name in cases:
        case = CASES[name]
        have = (root / f"{case.data}.npz").is_file()
        choice = [f"data={case.data}", f"data.root={root}"] if have else list(case.stand_in)
        choice += [*case.model, "method=sgd", f"batch_size={case.batch}", "max_epochs=1", "trainer.progress_bar=false"]
        per_epoch = IMAGES[case.data] // case.batch
        if have:
            choice += [f"data.train_images={case.batches * case.batch}", f"data.evaluation_images={EVALUATED}"]
        results: dict[str, list[Result]] = {bundle: [] for bundle in ("off", *bundles)}
        for _ in range(case.rounds):
            for bundle, found in results.items():
                with tempfile.TemporaryDirectory() as folder:
                    found.append(train([*choice, f"diagnostics={bundle}"], Path(folder)))
        where = f"{name}, {case.data if have else 'digits'}, batch {case.batch}"
        bare = statistics.median(_seconds(result) for result in results["off"])
        for bundle in bundles:
            prices = [added(result, per_epoch) for result in results[bundle]]
            row = {key: statistics.median(one[key] for one in prices) for key in prices[0]}
            row["added_least"], row["added_most"] = (pick(one["added"] for one in prices) for pick in (min, max))
            whole = statistics.median(_seconds(result) for result in results[bundle]) / bare - 1
            rows.append({"case": where, "bundle": bundle, **row, "added_to_this_run": whole, "rounds": case.rounds})
    return rows


def added(result: Result, per_epoch: int) -> dict[str, float]:
    """What one run says about the price, carried over to the default schedule.

    Args:
        result: Of a run with diagnostics.
        per_epoch: Batches in an epoch of the default schedule.

    Returns:
        `step_ms`, `batch_ms` and `epoch_ms`: a step, one measurement within an epoch and one at its end;
        `added`: share that the default schedule's measurements add to its steps; `added_first`: the same for its first
        epoch, what is measured before it included.
    """
    seconds, times = result["timing"]["diagnostics_seconds"], result["timing"]["diagnostics_times"]
    within, end = seconds["batch"] / times["batch"], seconds["epoch"] / times["epoch"]
    step = (result["timing"]["training_seconds"] - seconds["batch"] - seconds["epoch"]) / result["final"]["step"]
    asked = [when for key, when in result["settings"]["diagnostics"].items() if key != "samples"]

    def price(epochs: int) -> float:
        at = [n for n in range(1, epochs * per_epoch + 1) if any(due(when, n, per_epoch) for when in asked)]
        return float(seconds["start"] + epochs * end + sum(within for n in at if n % per_epoch))

    return {
        "step_ms": 1000 * step,
        "batch_ms": 1000 * within,
        "epoch_ms": 1000 * end,
        "added": price(EPOCHS) / (EPOCHS * per_epoch * step),
        "added_first": price(1) / (per_epoch * step),
    }


def _seconds(result: Result) -> float:
    """Of training and of measuring before it."""
    return float(result["timing"]["training_seconds"] + result["timing"]["diagnostics_seconds"]["start"])
