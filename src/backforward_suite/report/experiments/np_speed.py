"""NormProp 5.6: what an epoch costs under NormProp, BatchNorm and no normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.figure
import pandas as pd

from backforward_suite.report import style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.experiments import _normprop as family
from backforward_suite.report.finding import Estimate, Figure, Finding, Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

QUESTION = "What does an epoch cost under NormProp, against BatchNorm and no normalisation?"
RATIOS = (("prop", "batch"), ("prop", "none"), ("batch", "none"))
COLUMN = "time/step_ms"


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare the times of a step round by round: in each round every norm has its turn on the same machine."""
    timed = [run for run in common.done(runs) if {"norm", "round", COLUMN} <= set(run.study)]
    ground = verdicts.Ground.of(runs, scale, () if timed else ("timings",))
    # The paper timed one network: the widest here, at its batch of 50 where there is one.
    main = max(timed, key=lambda run: (_width(run), -abs(run.setting("batch_size", 0) - 50)), default=None)
    effects = [_ratio(main, *pair) for pair in RATIOS] if main else []
    words = common.by_word(claims)
    published = words["epoch_time"].published.get("prop / batch") if "epoch_time" in words else None
    claimed = [effect for effect in effects if effect.label == "prop / batch"]
    judged = {"epoch_time": lambda claim: verdicts.value(claim, claimed, ground, claimed)}
    return common.finding(
        "np_speed", QUESTION, runs, claims, scale,
        [judged[word](claim) for word, claim in words.items()],
        tables=[_table(timed)] if timed else [],
        figures=[
            Figure(
                "np_speed_ratios",
                "Time of a training step: ratios within a round",
                "Geometric means over interleaved rounds on one machine, 95 % intervals; hollow marker: published "
                "(84 s against 96 s an epoch on a Titan X).",
                lambda: _draw(timed, main, published),
            )
        ]
        if timed
        else [],
    )  # fmt: skip


def _width(run: Run) -> float:
    return float(run.setting("model.width") or 0)


def _label(run: Run) -> str:
    width = run.setting("model.width")
    return (f"width {width:g}, " if width else "") + f"batch {run.setting('batch_size')}"


def _times(run: Run, norm: str) -> dict[int, float]:
    """Milliseconds of a step by round."""
    rows = run.study[run.study["norm"] == norm]
    return dict(zip(rows["round"].astype(int), rows[COLUMN].astype(float), strict=True))


def _ratio(run: Run, ours: str, theirs: str) -> Effect:
    one, other = _times(run, ours), _times(run, theirs)
    logs = tuple(math.log(one[turn] / other[turn]) for turn in one if other.get(turn))
    return Effect(f"{ours} / {theirs}", logs, ratio=True)


def _table(timed: Sequence[Run]) -> Table:
    rows = []
    for run in timed:
        cells: dict[str, object] = {"network": _label(run), "hardware": run.hardware}
        for norm in family.NORMS:
            times = _times(run, norm)
            cells[f"{style.look(norm).label}, ms"] = f"{pd.Series(times).median():.1f}" if times else ""
        for pair in RATIOS:
            effect = _ratio(run, *pair)
            cells[effect.label] = effect.estimate()
        cells["rounds"] = str(len(_times(run, "prop")))
        rows.append(cells)
    note = (
        "Median time of a training step; ratios are geometric means over rounds with 95 % intervals. An epoch is the "
        "same number of steps for each norm, so that its ratio is the step's."
    )
    return common.table("Time of a training step", rows, note)


def _draw(timed: Sequence[Run], main: Run | None, published: float | None) -> matplotlib.figure.Figure:
    rows: list[tuple[str, Estimate | None]] = []
    looks, places = [], []
    for run in timed:
        for ours, theirs in RATIOS:
            effect = _ratio(run, ours, theirs)
            if effect.label == "prop / batch" and run is main:  # the network nearest to the one published
                places.append(len(rows))
            label = f"{style.look(ours).label} / {style.look(theirs).label}, {_label(run)}"
            rows.append((label, effect.estimate()))
            looks.append(style.look(ours))
    figure, panels = style.canvas(panel=(4.6, 0.8 + 0.3 * len(rows)))
    style.forest(panels[0, 0], rows, looks, zero=1.0, form="{:.3f}")
    if published is not None:
        style.published(panels[0, 0], style.look("prop"), [published] * len(places), [place + 0.25 for place in places])
    panels[0, 0].set_xlabel("ratio of times")
    style.legend(figure)
    return figure
