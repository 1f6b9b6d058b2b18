"""NormProp 5.5 and 5.6: the test errors of Table 1, and the time of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import matplotlib.figure
import pandas as pd

from backforward_suite.report import statistics, style
from backforward_suite.report.claims import claims_of
from backforward_suite.report.experiments._experiment import (
    Cell,
    Compare,
    Data,
    Drawing,
    Effects,
    Experiment,
    Part,
    Sample,
    layout,
)
from backforward_suite.report.experiments._figures import forest, reached, rows_of
from backforward_suite.report.experiments._measures import PERCENT, Measure
from backforward_suite.report.experiments._tables import table
from backforward_suite.report.finding import Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "mnist": "MNIST"}

# --- 5.5, Table 1: test errors ---------------------------------------------------------------------------------------

TABLE = claims_of("np_table")
PUBLISHED = {name: claim.number(name) for word, claim in TABLE.items() if word.startswith("errors")
             for name in claim.published}  # fmt: skip
TABLE_EPOCHS = {"cifar10": 200, "cifar100": 200, "svhn": 25}


def _data_set(run: Run) -> str:
    """The row of Table 1."""
    return DATA.get(run.data, run.data) + (" flipped" if run.setting("data.augment") == "flip" else "")


def _test_error(run: Run) -> float | None:
    """Percent of the test set that a run gets wrong; a diverged one guesses."""
    accuracy = run.final("accuracy/test")
    return None if accuracy is None else 100 * (1 - accuracy)


def _whole_table(run: Run) -> bool:
    """Whether a run has the table's images, epochs and width."""
    train, epochs = run.result.get("data", {}).get("train") or 0, run.setting("max_epochs")
    return bool(train >= 45_000 and epochs >= TABLE_EPOCHS.get(run.data, 200) and run.setting("model.width") == 1)


def _below_listed(cells: Sequence[Cell]) -> list[Effect]:
    """NormProp's test error less the least that Table 1 lists of other methods on that data set."""
    rows, claim = [], TABLE["beats_listed"]
    for cell in cells:
        listed = [claim.number(name) for name in claim.published if name.startswith(f"{cell.label}, ")]
        runs = cell.arms.get("prop", [])
        found = ERROR.sample(runs, cell.label)
        if listed and found.values:
            values = tuple(value - min(listed) for value in found.values)
            rows.append(replace(found, values=values, lost=0, unit="points", protocol=all(map(_whole_table, runs))))
    return rows


ERROR = Measure("test error, %", _test_error, points="points", bounds=PERCENT)

# --- 5.6: time -------------------------------------------------------------------------------------------------------

RATIOS = (("prop", "batch"), ("prop", "none"), ("batch", "none"))
STEP = "time/step_ms"


def _network(run: Run) -> str:
    width = run.setting("model.width")
    return (f"width {width:g}, " if width else "") + f"batch {run.setting('batch_size')}"


def _times(run: Run, norm: str) -> pd.Series[float]:
    """Milliseconds of a step by round: in each round every norm has its turn on the same machine."""
    rows = run.study[run.study["norm"] == norm]
    return rows.set_index("round")[STEP].astype("float64")


def _ratios(run: Run) -> list[Effect]:
    """Times of a step, round by round."""
    whole = run.setting("model.width") == 1 and run.setting("batch_size") == 50
    return [
        replace(
            statistics.paired(
                dict(_times(run, ours)), dict(_times(run, theirs)),
                f"{style.look(ours).label} / {style.look(theirs).label}", ratio=True,
            ),
            protocol=whole,
        )
        for ours, theirs in RATIOS
    ]  # fmt: skip


def _timed(cells: Sequence[Cell]) -> list[Run]:
    """What was timed, the network nearest to the paper's first."""
    runs = [run for cell in cells for members in cell.arms.values() for run in members]
    return sorted(
        runs, key=lambda run: (-float(run.setting("model.width") or 0), abs(run.setting("batch_size", 0) - 50))
    )


def _steps(cells: Sequence[Cell]) -> list[Table]:
    rows = [
        {"network": _network(run), "hardware": run.hardware}
        | {f"{style.look(norm).label}, ms": f"{_times(run, norm).median():.1f}" for norm in ("none", "batch", "prop")}
        | {effect.label: effect.estimate() for effect in _ratios(run)}
        | {"rounds": len(_times(run, "prop"))}
        for run in _timed(cells)
    ]
    note = (
        "Median time of a training step; ratios are geometric means over rounds with 95 % intervals. An epoch has the "
        "same number of steps under each norm, so the ratios hold for epochs too."
    )
    return [table("Time of a training step", rows, note)]


def _draw_times(data: Data) -> matplotlib.figure.Figure:
    effects = [replace(effect, label=f"{effect.label}, {_network(run)}")
               for run in _timed(data.cells) for effect in _ratios(run)]  # fmt: skip
    figure, axes = style.canvas(panel=(3.4, 0.8 + 0.3 * len(effects)))
    looks = [style.look(ours) for ours, _ in RATIOS] * (len(effects) // len(RATIOS))
    style.forest(axes[0, 0], rows_of(effects), looks, zero=1.0, form="{:.3f}")
    if (claim := data.claims[0]) is not None:
        style.published(axes[0, 0], style.look("prop"), [claim.number(name) for name in claim.published], [0.25])
    axes[0, 0].set_xlabel("ratio of times")
    return figure


EXPERIMENTS = (
    Experiment(
        "np_table",
        "Is NormProp's test error below BatchNorm's on the data sets of Table 1, and on MNIST?",
        Part(
            layout("norm", {"data": _data_set}, chosen="lr"),
            Compare(ERROR, "prop", "batch", "below_batchnorm competitive"),
            Effects(
                "test error, points, NormProp - the best of the other methods listed", _below_listed, "beats_listed"
            ),
            Sample(ERROR, ("prop", "batch"), "errors_cifar10 errors_cifar100 errors_svhn", _whole_table),
            Drawing(
                "errors",
                "Test errors and those of Table 1",
                "Filled: ours with 95 % intervals over seeds; hollow: published, on all images, at full width.",
                reached(ERROR, published=PUBLISHED),
            ),
            Drawing(
                "differences",
                "NormProp's test error minus BatchNorm's",
                "95 % intervals. Left of zero NormProp is better; hollow markers: published.",
                forest("test error, NormProp - BatchNorm, points"),
            ),
            title="NormProp against BatchNorm",
            note="Under 0: NormProp is better.",
            means=(ERROR,),
        ),
    ),
    Experiment(
        "np_speed",
        "What does an epoch cost under NormProp, compared with BatchNorm and no normalisation?",
        Part(
            layout(_network, where=lambda run: {"norm", "round", STEP} <= set(run.study)),
            Effects(
                "time of a training step",
                lambda cells: [effect for run in _timed(cells)[:1] for effect in _ratios(run)],
                "epoch_time",
            ),
            Drawing(
                "ratios",
                "Time of a training step: ratios within a round",
                "Geometric means over interleaved rounds on one machine, 95 % intervals; left of 1 the first is "
                "faster. Hollow marker: published (84 s against 96 s an epoch on a Titan X).",
                _draw_times,
            ),
            title="On the network closest to the paper's",
            tables=_steps,
        ),
    ),
)
