"""NormProp 5.6: what an epoch costs under NormProp, BatchNorm and no normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.figure
import pandas as pd

from backforward_suite.report import style
from backforward_suite.report.experiments._experiment import Cell, Data, Drawing, Effects, Experiment, Part, layout
from backforward_suite.report.experiments._tables import table
from backforward_suite.report.finding import Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

RATIOS = (("prop", "batch"), ("prop", "none"), ("batch", "none"))
COLUMN = "time/step_ms"


def timed(run: Run) -> bool:
    """Whether a study timed steps, round by round: in each round every norm has its turn on the same machine."""
    return {"norm", "round", COLUMN} <= set(run.study)


def network(run: Run) -> str:
    """Width and batch size."""
    width = run.setting("model.width")
    return (f"width {width:g}, " if width else "") + f"batch {run.setting('batch_size')}"


def times(run: Run, norm: str) -> dict[int, float]:
    """Milliseconds of a step by round."""
    rows = run.study[run.study["norm"] == norm]
    return dict(zip(rows["round"].astype(int), rows[COLUMN].astype(float), strict=True))


def ratio(run: Run, ours: str, theirs: str) -> Effect:
    """Times of a step, round by round."""
    one, other = times(run, ours), times(run, theirs)
    logs = tuple(math.log(one[turn] / other[turn]) for turn in one if other.get(turn))
    whole = run.setting("model.width") == 1 and run.setting("batch_size") == 50
    return Effect(f"{style.look(ours).label} / {style.look(theirs).label}", logs, ratio=True, protocol=whole)


def _runs(cells: Sequence[Cell]) -> list[Run]:
    """The widest network first, at the batch size nearest to the paper's: what it timed."""
    runs = [run for cell in cells for members in cell.arms.values() for run in members]

    def place(run: Run) -> tuple[float, float]:
        return -float(run.setting("model.width") or 0), abs(run.setting("batch_size", 0) - 50)

    return sorted(runs, key=place)


def published_network(cells: Sequence[Cell]) -> list[Effect]:
    """The ratios on the network that is nearest to the paper's."""
    return [ratio(run, *pair) for run in _runs(cells)[:1] for pair in RATIOS]


def steps(cells: Sequence[Cell]) -> list[Table]:
    """Milliseconds of a step, and their ratios."""
    rows = []
    for run in _runs(cells):
        row: dict[str, object] = {"network": network(run), "hardware": run.hardware}
        for norm in ("none", "batch", "prop"):
            row[f"{style.look(norm).label}, ms"] = f"{pd.Series(times(run, norm)).median():.1f}"
        found = [ratio(run, *pair) for pair in RATIOS]
        rows.append(row | {effect.label: effect.estimate() for effect in found} | {"rounds": len(times(run, "prop"))})
    note = (
        "Median time of a training step; ratios are geometric means over rounds with 95 % intervals. An epoch is the "
        "same number of steps for each norm, so that its ratio is the step's."
    )
    return [table("Time of a training step", rows, note)]


def draw(data: Data) -> matplotlib.figure.Figure:
    """The ratios on every network that was timed."""
    runs, claim = _runs(data.cells), data.claim()
    rows = [(f"{effect.label}, {network(run)}", effect.estimate(), ours)
            for run in runs for ours, theirs in RATIOS for effect in [ratio(run, ours, theirs)]]  # fmt: skip
    figure, axes = style.canvas(panel=(3.4, 0.8 + 0.3 * len(rows)))
    looks = [style.look(ours) for *_, ours in rows]
    style.forest(axes[0, 0], [(label, found) for label, found, _ in rows], looks, zero=1.0, form="{:.3f}")
    if claim is not None and rows:
        style.published(axes[0, 0], style.look("prop"), list(claim.published.values()), [0.25])  # type: ignore[arg-type]
    axes[0, 0].set_xlabel("ratio of times")
    style.legend(figure)
    return figure


EXPERIMENT = Experiment(
    "np_speed",
    "What does an epoch cost under NormProp, against BatchNorm and no normalisation?",
    Part(
        layout(network, where=timed),
        (Effects("time of a training step", published_network, "epoch_time"),),
        title="On the network nearest to the paper's",
        tables=steps,
        drawings=(
            Drawing(
                "ratios",
                "Time of a training step: ratios within a round",
                "Geometric means over interleaved rounds on one machine, 95 % intervals; left of 1 the first is "
                "faster. Hollow marker: published (84 s against 96 s an epoch on a Titan X).",
                draw,
            ),
        ),
    ),
)
