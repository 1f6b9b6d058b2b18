"""NormProp, Fig. 2: the mean input of a hidden unit of each layer over the validation set, epoch by epoch."""

from __future__ import annotations

import math
from dataclasses import replace

import matplotlib.figure
import pandas as pd

from backforward_suite.report import style
from backforward_suite.report.experiments._experiment import Compare, Data, Drawing, Experiment, Part, Sample, layout
from backforward_suite.report.experiments._figures import mean_curve, panels
from backforward_suite.report.experiments._measures import Measure, settled
from backforward_suite.report.experiments.np_data_norm import paper
from backforward_suite.report.reading import Run

DIAGNOSTICS = ("input/unit_mean", "input/mean_distance")
WITHIN = 0.05  # settled: a quarter of the published distance under NormProp


def layers(run: Run, measure: str) -> pd.DataFrame:
    """A measure by epoch (index) and hidden layer (columns), from the first epoch on; the first layer sees the data."""
    frame = run.diagnostics
    rows = frame[(frame["measure"] == measure) & (frame["epoch"] > 0)]
    order = list(dict.fromkeys(rows["layer"]))[1:]
    return rows.drop_duplicates(["epoch", "layer"], keep="last").pivot(index="epoch", columns="layer", values="value")[
        order
    ]


def distance(run: Run) -> float | None:
    """Mean over hidden layers and epochs of the distance of one unit's mean input from zero."""
    return _mean(layers(run, "input/unit_mean").abs())


def distance_of_all(run: Run) -> float | None:
    """The same over all units."""
    return _mean(layers(run, "input/mean_distance"))


def movement(run: Run) -> float | None:
    """How far one unit's mean input moves from epoch to epoch, mean over the lower half of the hidden layers."""
    units = layers(run, "input/unit_mean")
    return _mean(units[list(units)[: max(1, units.shape[1] // 2)]].diff().iloc[1:].abs())


def _mean(units: pd.DataFrame) -> float | None:
    mean = float(units.to_numpy().mean()) if units.size else math.nan
    return mean if math.isfinite(mean) else None  # a diverged run's inputs are no numbers


def settling(run: Run) -> float | None:
    """Mean over hidden layers of the epoch from which a unit's mean input stays near to its last value."""
    units = layers(run, "input/unit_mean")
    epochs = [epoch for layer in units if (epoch := settled(units[layer], WITHIN)) is not None]
    return sum(epochs) / len(epochs) if epochs else None


def draw_units(data: Data) -> matplotlib.figure.Figure:
    """Fig. 2: one unit of each layer, the first seed of each arm."""
    there = {arm: layers(runs[0], "input/unit_mean") for cell in data.cells for arm, runs in cell.arms.items()}
    figure, axes = panels(len(there))
    names = list(dict.fromkeys(layer for units in there.values() for layer in units))
    looks = style.sequence(names)
    for panel, (arm, units) in zip(axes, there.items(), strict=True):
        for layer in units:
            of = replace(looks[layer], label=layer.removeprefix("model.").removesuffix(".conv"))
            style.band(panel, of, pd.DataFrame(dict.fromkeys(("value", "low", "high"), units[layer])), markers=6)
        panel.axhline(0, color="0.35", linewidth=0.8)
        panel.set_title(style.look(arm).label)
        style.epochs(panel)
    for panel in axes[::2]:
        panel.set_ylabel("mean input of one unit")
    style.legend(figure)
    return figure


def draw_distance(data: Data) -> matplotlib.figure.Figure:
    """Distance from zero over all units, epoch by epoch."""
    figure, axes = style.canvas()
    for cell in data.cells:
        for arm, runs in cell.arms.items():
            frames = [layers(run, "input/mean_distance").mean(axis="columns") for run in runs]
            style.band(axes[0, 0], style.look(arm), mean_curve(frames))
    style.epochs(axes[0, 0])
    axes[0, 0].set_ylabel("|mean input|")
    style.log_ticks(axes[0, 0])
    style.legend(figure)
    return figure


DISTANCE = Measure("distance of a unit's mean input from zero", distance)
ALL_UNITS = Measure("the same over all units", distance_of_all)
MOVEMENT = Measure("movement of a unit's mean input from epoch to epoch, lower layers", movement, ratio=True)
SETTLING = Measure("epochs until a unit's mean input settles", settling, points="epochs")
EXPERIMENT = Experiment(
    "np_shift",
    "Do the inputs of hidden units stay nearer to zero, and settle earlier, under NormProp than under BatchNorm?",
    Part(
        layout("norm", where=lambda run: len(run.diagnostics) > 0),
        (
            Compare(DISTANCE, "prop", "batch", "distance"),
            Compare(MOVEMENT, "prop", "batch", "steadier_below"),
            Compare(SETTLING, "prop", "batch", "settles"),
            Compare(DISTANCE, "prop", "none", "no_norm"),
            Sample(DISTANCE, (), "distance_value no_norm_value", paper),
        ),
        title="NormProp against BatchNorm, and against no norm at lr 1e-4",
        note="Means over hidden layers and epochs. Settled: from when on the unit's mean input stays within "
        f"{WITHIN:g} of its last value, mean over layers.",
        means=(DISTANCE, ALL_UNITS, MOVEMENT, SETTLING),
        drawings=(
            Drawing(
                "units",
                "Mean input of one unit of each hidden layer",
                "The paper's Fig. 2: the mean over the validation set of the input to one unit, drawn at random once, "
                "in each hidden layer; the first seed of each arm. The vertical scales differ.",
                draw_units,
            ),
            Drawing(
                "distance",
                "Distance of mean inputs from zero, all units",
                "Mean over the units of all hidden layers of the absolute mean input; bands are 95 % intervals over "
                "seeds.",
                draw_distance,
            ),
        ),
    ),
    diagnostics=DIAGNOSTICS,
)
