"""NormProp 4.2-5.4: what training shows, compared with BatchNorm and no norm."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

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
    setting,
)
from backforward_suite.report.experiments._figures import (
    Axes,
    by_lr,
    curves,
    forest,
    limits,
    panels,
    pointwise,
    reached,
)
from backforward_suite.report.experiments._measures import (
    GAP,
    LARGEST,
    PERCENT,
    TEST,
    VALIDATION,
    Measure,
    curve_of,
    images,
    settled,
)
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect, how_often

DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"}
FACTORS = {"none": "no factor", "paper": "J = 1.21, as printed", "exact": "exact J"}
ACTIVATIONS = {"relu": "ReLU", "prelu": "PReLU", "tanh": "Tanh", "sigmoid": "Sigmoid", "elu": "ELU"}


def _whole(run: Run) -> bool:
    """Whether a run has the images, epochs, width and validation set (the test set) of the paper's figures."""
    whole = run.result.get("data", {}).get("train") == 45_000 and run.setting("max_epochs") >= 50
    return bool(whole and run.setting("model.width") == 1 and run.setting("data.protocol") == "paper")


# --- 4.2-4.4: one change at a time from the paper's recipe -----------------------------------------------------------

RECIPE: Mapping[str, object] = {
    "batch_size": 50,
    "lr": 0.05,
    "weight_decay": 5e-4,
    "model.dropout": 0.0,
    "data.shuffle": True,
    "schedule": "halve",
}
CHANGES: Mapping[str, str] = {
    "weight_decay": "weight decay {:g}",
    "model.dropout": "dropout {}",
    "data.shuffle": "not shuffled",
    "schedule": "{} lr",
}


def _changed(run: Run) -> list[str]:
    """The keys in which a run differs from the recipe."""
    return [key for key, usual in RECIPE.items() if setting(run, key) not in (usual, None)]


def _change(run: Run) -> str | None:
    """What a run changes of the recipe, in words; None if it changes several things, or batch size or rate."""
    keys = _changed(run)
    if not keys:
        return "the recipe"
    if len(keys) > 1 or keys[0] not in CHANGES:
        return None
    value = setting(run, keys[0])
    return "no weight decay" if keys == ["weight_decay"] and not value else CHANGES[keys[0]].format(value)


def _batch_and_lr(run: Run) -> str | None:
    """Such as `batch 100, lr 0.08`, for a run that otherwise follows the recipe."""
    if set(_changed(run)) - {"batch_size", "lr"}:
        return None
    return f"batch {run.setting('batch_size')}, lr {run.setting('lr'):g}"


def _rate_by_batch(cells: Sequence[Cell]) -> list[Effect]:
    """At each larger batch, what a larger learning rate gains there less what it gains at the recipe's batch.

    A larger rate that is better at every batch size says nothing of the batch.
    """
    found = {
        (runs[0].setting("batch_size"), runs[0].setting("lr")): statistics.by_seed(runs, TEST.read)
        for cell in cells
        for runs in cell.arms.values()
    }
    small, low = RECIPE["batch_size"], RECIPE["lr"]
    gains = {
        at: _less(scores, found[at[0], low]) for at, scores in found.items() if (at[0], low) in found and at[1] != low
    }
    return [
        statistics.paired(gain, gains[small, lr], f"lr {lr:g} - {low:g}, batch {size} - {small}", unit="points")
        for (size, lr), gain in gains.items()
        if size != small and (small, lr) in gains
    ]


def _less(
    ours: Mapping[Hashable, float | None], theirs: Mapping[Hashable, float | None]
) -> dict[Hashable, float | None]:
    """Ours - theirs, by seed."""
    return {
        seed: None if one is None or (other := theirs.get(seed)) is None else one - other for seed, one in ours.items()
    }


def _normprop(run: Run) -> bool:
    return run.choice("norm") in ("prop", "")


# --- 5.1, Fig. 1: normalisation of the input; 5.4, Fig. 4: batch size ------------------------------------------------


def _best_accuracy(run: Run) -> float | None:
    """The highest validation accuracy of all epochs, percent."""
    curve = curve_of(run, "accuracy/validation")
    return 100 * float(curve.max()) if len(curve) else None


def _mark_best(panel: Axes, cell: Cell) -> None:
    """The published best, in the panel that it belongs to."""
    if cell.row["batch_size"] == 50:
        number = claims_of("np_data_norm")["best"].number("batch 50, mini-batch")
        style.mark_published(panel, number, f"published: {number:g} %")


def _neighbours(cells: Sequence[Cell]) -> list[Effect]:
    """Each batch size against the next larger one."""
    return [
        TEST.compare(cell.arms[small], cell.arms[large], f"{small} - {large}")
        for cell in cells
        for small, large in pairwise(sorted(cell.arms, key=int))
    ]


BEST = Measure("best validation accuracy, %", _best_accuracy, points="points", bounds=PERCENT)

# --- 5.2, Fig. 2: the mean input of a hidden unit of each layer ------------------------------------------------------

UNIT, ALL = "input/unit_mean", "input/mean_distance"
WITHIN = 0.05  # settled: a quarter of the published distance under NormProp


def _inputs(run: Run, measure: str = UNIT) -> pd.DataFrame:
    """A measure by epoch (index) and hidden layer (columns), from the first epoch on; the first layer sees the data."""
    frame = run.diagnostics
    rows = frame[(frame["measure"] == measure) & (frame["epoch"] > 0)].drop_duplicates(["epoch", "layer"], keep="last")
    return rows.pivot(index="epoch", columns="layer", values="value")[list(dict.fromkeys(rows["layer"]))[1:]]


def _mean(units: pd.DataFrame) -> float | None:
    mean = float(units.to_numpy().mean()) if units.size else math.nan
    return mean if math.isfinite(mean) else None  # a diverged run's inputs are no numbers


def _movement(run: Run) -> float | None:
    """How far one unit's mean input moves from epoch to epoch, mean over the lower half of the hidden layers."""
    units = _inputs(run)
    return _mean(units[list(units)[: max(1, units.shape[1] // 2)]].diff().iloc[1:].abs())


def _settling(run: Run) -> float | None:
    """Mean over hidden layers of the epoch from which a unit's mean input stays near its last value."""
    units = _inputs(run)
    epochs = [epoch for layer in units if (epoch := settled(units[layer], WITHIN)) is not None]
    return sum(epochs) / len(epochs) if epochs else None


def _draw_units(data: Data) -> matplotlib.figure.Figure:
    """Fig. 2: one unit of each layer, the first seed of each arm."""
    there = {arm: _inputs(runs[0]) for cell in data.cells for arm, runs in cell.arms.items()}
    figure, axes = panels(len(there), "mean input of one unit")
    looks = style.sequence(list(dict.fromkeys(layer for units in there.values() for layer in units)))
    for panel, (arm, units) in zip(axes, there.items(), strict=True):
        for layer in units:
            of = replace(looks[layer], label=layer.removeprefix("model.").removesuffix(".conv"))
            style.band(panel, of, pd.DataFrame(dict.fromkeys(("value", "low", "high"), units[layer])), markers=6)
        panel.axhline(0, color="0.35", linewidth=0.8)
        panel.set_title(style.look(arm).label)
        style.epochs(panel)
    return figure


def _draw_distance(data: Data) -> matplotlib.figure.Figure:
    """Distance from zero over all units, epoch by epoch."""
    figure, (panel,) = panels(1, "|mean input|")
    for cell in data.cells:
        for arm, runs in cell.arms.items():
            style.band(panel, style.look(arm), pointwise([_inputs(run, ALL).mean(axis="columns") for run in runs]))
    style.epochs(panel)
    style.log_ticks(panel)
    return figure


DISTANCE = Measure("distance of a unit's mean input from zero", lambda run: _mean(_inputs(run).abs()))
ALL_UNITS = Measure("the same over all units", lambda run: _mean(_inputs(run, ALL)))
MOVEMENT = Measure("movement of a unit's mean input from epoch to epoch, lower layers", _movement, ratio=True)
SETTLING = Measure("epochs until a unit's mean input settles", _settling, points="epochs")

# --- 5.3, Fig. 3: validation accuracy epoch by epoch -----------------------------------------------------------------

POINT = 1.0  # converged once validation accuracy stays this near to where it ends


def _accuracy(run: Run) -> tuple[pd.Series[float], int]:
    """Validation accuracy, percent, and how many epochs are the first quarter, two at least."""
    curve = 100 * curve_of(run, "accuracy/validation")
    return curve, max(2, math.ceil(len(curve) / 4))


def _early(run: Run) -> float | None:
    """Mean validation accuracy over the first quarter of the epochs."""
    curve, quarter = _accuracy(run)
    return float(curve.iloc[:quarter].mean()) if len(curve) else None


def _unrest(run: Run) -> float | None:
    """Mean distance of validation accuracy from halfway between its neighbours, after the first quarter; points.

    Steady progress, however fast, does not count.
    """
    curve, quarter = _accuracy(run)
    late = (curve - (curve.shift(1) + curve.shift(-1)) / 2).abs().iloc[quarter:].dropna()
    return float(late.mean()) if len(late) else None


def _diverging(cells: Sequence[Cell]) -> list[Effect]:
    """How many of the networks without norm diverge at NormProp's learning rate."""
    plain = [run for cell in cells for run in cell.arms.get("none", []) if math.isclose(run.setting("lr"), 0.05)]
    gone = sum(run.status == "diverged" for run in plain)
    note = f"{gone} of {len(plain)} seeds diverge"
    return [replace(how_often("lr 0.05", gone, len(plain)), note=note, images=images(plain))] if plain else []


EARLY = Measure("validation accuracy in the first quarter of the epochs, %", _early, points="points", bounds=PERCENT)
UNREST = Measure("validation accuracy off its trend, points", _unrest, ratio=True)
CONVERGED = Measure("epochs until converged", lambda run: settled(_accuracy(run)[0], POINT))

ACCURACY = partial(curves, "accuracy/validation", "validation accuracy, %", times=100)
EXPERIMENTS = (
    Experiment(
        "np_jacobian",
        "Does the Jacobian factor allow larger learning rates without diverging, and does NormProp work without it?",
        Part(
            layout("norm.jacobian_factor"),
            Compare(LARGEST, lambda arm: arm in ("paper", "exact"), "none", "larger_lr"),
            Drawing(
                "lr",
                "Up to which learning rate training works, with and without the factor",
                "Above: validation accuracy after the last epoch, median over seeds with their whole range; a diverged "
                "run counts as a guess. Below: share of seeds that train (end below the loss of a guess), with its 95 "
                "% interval.",
                by_lr(VALIDATION),
            ),
            title="The largest learning rate that trains, relative to no factor",
            names=FACTORS,
            tables=partial(limits, names=FACTORS),
        ),
        Part(
            layout("norm.jacobian_factor", chosen="lr"),
            Compare(TEST, ("none",), "exact", "works_without"),
            title="Without the factor against with it, each at its best learning rate",
            names=FACTORS,
            means=(VALIDATION, TEST),
        ),
    ),
    Experiment(
        "np_recipe",
        "Which parts of NormProp's recipe matter: weight decay, no dropout, shuffling, halving, rate by batch size?",
        Part(
            layout(_change, where=_normprop),
            Compare(TEST, lambda _: True, "the recipe", "weight_decay dropout shuffling halving"),
            Drawing(
                "changes",
                "What each change does to test accuracy",
                "Difference to the recipe (batch 50, lr .05 halved, weight decay 5e-4, no dropout, shuffled) at the "
                "same seed, with 95 % intervals. Right of zero: the change helps.",
                forest("test accuracy, change - recipe, points"),
            ),
            title="Each change against the recipe",
            note="Under 0: the change harms, so the recipe's choice helps.",
            means=(VALIDATION, TEST),
        ),
        Part(
            layout(_change, where=lambda run: run.choice("norm") == "batch"),
            Compare(TEST, lambda arm: arm.startswith("dropout"), "the recipe", "dropout_batchnorm"),
            title="Dropout under BatchNorm, against the recipe",
            means=(TEST,),
        ),
        Part(
            layout(_batch_and_lr, where=_normprop),
            Effects(
                "gain of a larger rate in points of test accuracy, larger - smaller batch", _rate_by_batch, "batch_lr"
            ),
            title="Gain of a larger learning rate: at the larger batch minus at the smaller",
            means=(VALIDATION, TEST),
        ),
    ),
    Experiment(
        "np_activations",
        "Does NormProp help with PReLU, Tanh and Sigmoid as it does with ReLU?",
        Part(
            layout("norm", {"model.activation": ACTIVATIONS}, chosen="lr"),
            Compare(TEST, "prop", "none", "trains"),
            Compare(TEST, "prop", "batch"),
            Drawing(
                "accuracy",
                "Test accuracy by activation",
                "Means over seeds with 95 % intervals; a diverged run counts as a guess.",
                reached(TEST),
            ),
            title="NormProp against no norm, by activation",
            note="ReLU and ELU, which the paper's section does not mention, are shown too.",
            means=(VALIDATION, TEST),
        ),
    ),
    Experiment(
        "np_data_norm",
        "Does it matter whether the input is normalised with the statistics of the training set or of the mini-batch?",
        Part(
            layout("data_norm", {"batch_size": "batch {}"}),
            Compare(VALIDATION, "batch", "global", "unaffected"),
            Compare(BEST, "batch", "global"),
            Compare(GAP, "batch", "global", "regularises"),
            Sample(BEST, ("batch",), "best", _whole),
            Drawing(
                "curves",
                "Validation accuracy by epoch, by normalisation of the input",
                "The paper's Fig. 1: mean over seeds, bands are 95 % intervals. Horizontal line: the paper's best.",
                ACCURACY(extra=_mark_best),
            ),
            title="Mini-batch against whole set",
            names={"batch": "mini-batch", "global": "whole training set"},
            means=(VALIDATION, BEST, GAP),
        ),
    ),
    Experiment(
        "np_shift",
        "Are the inputs of hidden units closer to zero under NormProp than under BatchNorm, and do they settle "
        "earlier?",
        Part(
            layout("norm", where=lambda run: len(run.diagnostics) > 0),
            Compare(DISTANCE, "prop", "batch", "distance"),
            Compare(MOVEMENT, "prop", "batch", "steadier_below"),
            Compare(SETTLING, "prop", "batch", "settles"),
            Compare(DISTANCE, "prop", "none", "no_norm"),
            Sample(DISTANCE, (), "distance_value no_norm_value", _whole),
            Drawing(
                "units",
                "Mean input of one unit of each hidden layer",
                "The paper's Fig. 2: the mean over the validation set of the input to one unit, drawn at random once, "
                "in each hidden layer; the first seed of each arm. The vertical scales differ.",
                _draw_units,
            ),
            Drawing(
                "distance",
                "Distance of mean inputs from zero, all units",
                "Mean over the units of all hidden layers of the absolute mean input; bands are 95 % intervals over "
                "seeds.",
                _draw_distance,
            ),
            title="NormProp against BatchNorm, and against no norm at lr 1e-4",
            note="Means over hidden layers and epochs. Settled: the first epoch from which the unit's mean input stays "
            f"within {WITHIN:g} of its last value, mean over layers.",
            means=(DISTANCE, ALL_UNITS, MOVEMENT, SETTLING),
        ),
        diagnostics=(UNIT, ALL),
    ),
    Experiment(
        "np_stability",
        "Does NormProp converge faster and more steadily than BatchNorm, each at its best learning rate?",
        Part(
            layout("norm", {"data": DATA}, chosen="lr"),
            Compare(EARLY, "prop", "batch", "higher_early"),
            Compare(UNREST, "prop", "batch", "steadier other_sets"),
            Sample(CONVERGED, ("prop",), "converges", _whole),
            Drawing(
                "curves",
                "Validation accuracy by epoch",
                "The paper's Fig. 3: mean over seeds, bands are 95 % intervals; each norm at the learning rate with "
                "its highest final validation accuracy.",
                ACCURACY(),
            ),
            title="NormProp against BatchNorm",
            note="Off its trend: mean distance of an epoch's validation accuracy from halfway between the epochs "
            "before and after, after the first quarter. Converged: the first epoch from which it stays within "
            f"{POINT:g} point of its last value.",
            means=(EARLY, VALIDATION, UNREST, CONVERGED),
        ),
        Part(layout("norm"), Effects("share of seeds that diverge", _diverging, "diverges")),
    ),
    Experiment(
        "np_batch_size",
        "Does NormProp train with batches of one, is it unaffected by the batch size, and are smaller batches better?",
        Part(
            layout("batch_size", chosen="lr"),
            Compare(TEST, "1", "50", "batch_one"),
            Effects("test accuracy, points, smaller batch - larger batch", _neighbours, "unaffected smaller_better"),
            Drawing(
                "curves",
                "Validation accuracy by epoch, by batch size",
                "The paper's Fig. 4: mean over seeds, bands are 95 % intervals; each batch size at the learning rate "
                "with the highest final validation accuracy. For batches of one the input is normalised with the "
                "statistics of the training set, otherwise with those of the mini-batch.",
                ACCURACY(),
            ),
            title="Smaller against larger batches",
            names={size: f"batch {size}" for size in ("1", "50", "100", "250")},
            means=(VALIDATION, TEST),
        ),
    ),
)
