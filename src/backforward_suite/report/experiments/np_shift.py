"""NormProp, Fig. 2: the mean input of a hidden unit of each layer over the validation set, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.figure
import pandas as pd

from backforward_suite.report import style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.experiments import _normprop as family
from backforward_suite.report.finding import Figure, Finding, Table
from backforward_suite.report.reading import Run

QUESTION = "Do the inputs of hidden units stay nearer to zero, and settle earlier, under NormProp than under BatchNorm?"
DIAGNOSTICS = ("input/unit_mean", "input/mean_distance")
WITHIN = 0.05  # settled: a quarter of the published distance under NormProp


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare the distances from zero, and when they settle; no norm at its own learning rate, as the paper has it."""
    arms = {norm: [run for run in common.done(runs, norm=norm) if len(run.diagnostics)] for norm in family.NORMS}
    ground = verdicts.Ground.of(runs, scale, [norm for norm in family.NORMS if not arms[norm]])
    nearer = common.effect(arms["prop"], arms["batch"], distance, "NormProp - BatchNorm")
    numbers = [family.sample(arms[norm], distance, norm) for norm in ("prop", "batch")]
    earlier = common.effect(arms["prop"], arms["batch"], settling, "NormProp - BatchNorm", unit="epochs")
    far = common.effect(arms["prop"], arms["none"], distance, "NormProp - no norm")
    without = family.sample(arms["none"], distance, "middle of the range")
    judged = {
        "distance": lambda claim: verdicts.direction(claim, [nearer], ground),
        "distance_value": lambda claim: verdicts.value(claim, numbers, ground),
        "settles": lambda claim: verdicts.direction(claim, [earlier], ground),
        "no_norm": lambda claim: verdicts.direction(claim, [far], ground),
        "no_norm_value": lambda claim: verdicts.value(claim, [without], ground),
    }
    return common.finding(
        "np_shift", QUESTION, runs, claims, scale,
        [judged[word](claim) for word, claim in common.by_word(claims).items()],
        tables=[_table(arms)],
        figures=[
            Figure(
                "np_shift_units",
                "Mean input of one unit of each hidden layer",
                "The paper's Fig. 2: the mean over the validation set of the input to one unit, drawn at random once, "
                "in each hidden layer; the first seed of each arm. The vertical scales differ.",
                lambda: _draw_units(arms),
            ),
            Figure(
                "np_shift_distance",
                "Distance of mean inputs from zero, all units",
                "Mean over the units of all hidden layers of the absolute mean input; bands are 95 % intervals over "
                "seeds.",
                lambda: _draw_distance(arms),
            ),
        ],
    )  # fmt: skip


def _layers(run: Run, measure: str) -> pd.DataFrame:
    """A measure by epoch (index) and hidden layer (columns), from the first epoch on; the first layer sees the data."""
    frame = run.diagnostics
    rows = frame[(frame["measure"] == measure) & (frame["epoch"] > 0)]
    order = list(dict.fromkeys(rows["layer"]))[1:]
    return rows.drop_duplicates(["epoch", "layer"], keep="last").pivot(index="epoch", columns="layer", values="value")[
        order
    ]


def distance(run: Run) -> float | None:
    """Mean over hidden layers and epochs of the distance of one unit's mean input from zero."""
    return _mean(_layers(run, "input/unit_mean").abs())


def distance_of_all(run: Run) -> float | None:
    """The same over all units."""
    return _mean(_layers(run, "input/mean_distance"))


def _mean(units: pd.DataFrame) -> float | None:
    mean = float(units.to_numpy().mean()) if units.size else math.nan
    return mean if math.isfinite(mean) else None  # a diverged run's inputs are no numbers


def settling(run: Run) -> float | None:
    """Mean over hidden layers of the epoch from which a unit's mean input stays near to its last value."""
    units = _layers(run, "input/unit_mean")
    epochs = [family.settled(units[layer], WITHIN) for layer in units]
    known = [epoch for epoch in epochs if epoch is not None]
    return sum(known) / len(known) if known else None


def _table(arms: Mapping[str, Sequence[Run]]) -> Table:
    rows = [
        {
            "norm": style.look(norm).label,
            "lr": ", ".join(map(str, family.values(runs, "lr"))),
            "seeds": len(runs),
            "distance, one unit a layer": common.estimate_of(runs, distance),
            "distance, all units": common.estimate_of(runs, distance_of_all),
            "settled after epochs": common.estimate_of(runs, settling),
        }
        for norm, runs in arms.items()
        if runs
    ]
    note = (
        "Means over hidden layers and epochs, 95 % intervals over seeds. Settled: the epoch from which the unit's mean "
        f"input stays within {WITHIN:g} of its last value, mean over layers."
    )
    return common.table("Mean inputs", rows, note)


def _draw_units(arms: Mapping[str, Sequence[Run]]) -> matplotlib.figure.Figure:
    there = {norm: _layers(runs[0], "input/unit_mean") for norm, runs in arms.items() if runs}
    figure, panels = style.canvas(1, max(1, len(there)), panel=(2.9, 2.8))
    for axes, (norm, units) in zip(panels[0], there.items(), strict=False):
        for layer, look in style.sequence(list(units), "{}").items():
            look_of = style.Look(family.short(layer), look.colour, look.dash, look.marker)
            frame = pd.DataFrame({"value": units[layer], "low": units[layer], "high": units[layer]})
            style.band(axes, look_of, frame, markers=6)
        axes.axhline(0, color="0.35", linewidth=0.8)
        axes.set_title(style.look(norm).label)
        style.epochs(axes)
    panels[0, 0].set_ylabel("mean input of one unit")
    style.legend(figure)
    return figure


def _draw_distance(arms: Mapping[str, Sequence[Run]]) -> matplotlib.figure.Figure:
    figure, panels = style.canvas()
    axes = panels[0, 0]
    for norm, runs in arms.items():
        curves = [_layers(run, "input/mean_distance").mean(axis="columns") for run in runs]
        style.band(axes, style.look(norm), family.band(curves))
    style.epochs(axes)
    axes.set(ylabel="|mean input|", yscale="log")
    style.legend(figure)
    return figure
