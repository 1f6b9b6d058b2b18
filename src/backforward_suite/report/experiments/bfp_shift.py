"""Does Backforward remove the shift, what of its change matters, and does it help at fair rates?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib.figure
import pandas as pd

from backforward_suite.report import style
from backforward_suite.report.experiments._experiment import (
    Cell,
    Compare,
    Data,
    Drawing,
    Effects,
    Experiment,
    Part,
    called,
    layout,
)
from backforward_suite.report.experiments._figures import Axes, Looks, by_row, forest, panels, reached
from backforward_suite.report.experiments._measures import LOSS, TEST, Measure, Read, Runs, final
from backforward_suite.report.experiments._tables import table
from backforward_suite.report.finding import Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

# --- is the shift there, and does Backforward remove it? -------------------------------------------------------------

APPLIED, INDUCED = "shift/applied_relative", "shift/induced_relative"
NETWORKS = {"mlp": "MLP", "nin": "NIN"}
MEANING = {
    INDUCED: "Induced shift: how much updating the layers below changes a layer's gradient.",
    APPLIED: "Applied shift: the distance between the gradient that a layer steps along and the one it then faces.",
}
NOTHING = 1e-3  # of a gradient's norm; single precision leaves some millionths


def _shifts(run: Run, measure: str = APPLIED) -> pd.Series[float]:
    """For each layer, in forward order: the median over the times at which the first update of a batch was measured."""
    rows = run.diagnostics
    rows = rows[(rows["measure"] == measure) & (rows["update"] == 1)]
    found: pd.Series[float] = rows.groupby("layer", sort=False)["value"].median()
    return found


def _over_seeds(runs: Runs, measure: str = APPLIED) -> pd.Series[float]:
    found = [of_run for run in runs if len(of_run := _shifts(run, measure))]
    return pd.concat(found, axis=1).mean(axis=1) if found else pd.Series(dtype="float64")


def _of_all(label: str, runs: Runs, read: Read) -> Effect:
    """A value of each run, at any learning rate."""
    values = tuple(value for run in runs if (value := read(run)) is not None and not math.isnan(value))
    return Effect(label, values, note="" if values or not runs else "no diagnostics")


def _removed(cells: Sequence[Cell]) -> list[Effect]:
    """The largest applied shift of exact Backforward, over both networks."""
    runs = [run for cell in cells for run in cell.arms.get("bfp", [])]
    return [_of_all("BFP", runs, lambda run: float(_shifts(run).max()))] if runs else []


def _stale(cells: Sequence[Cell]) -> list[Effect]:
    """The mean applied shift of plain SGD, by network; the first layer has none, as no layer lies below it."""
    return [_of_all(cell.label, cell.arms["sgd"], lambda run: float(_shifts(run).iloc[1:].mean()))
            for cell in cells if "sgd" in cell.arms]  # fmt: skip


def _shift_tables(cells: Sequence[Cell]) -> list[Table]:
    tables = []
    for cell in cells:
        for measure, meaning in MEANING.items():
            columns = {style.look(name).label: _over_seeds(runs, measure) for name, runs in cell.arms.items()}
            frame = pd.DataFrame({name: column for name, column in columns.items() if len(column)})
            rows = [
                {"layer": layer} | {name: None if pd.isna(value) else f"{value:.2g}" for name, value in row.items()}
                for layer, row in frame.iterrows()
            ]
            note = f"{meaning} Relative to that gradient's norm; median over epochs, mean over seeds."
            tables.append(table(f"{meaning.partition(':')[0]} of each layer, {cell.label}", rows, note))
    return tables


def _draw_shift(panel: Axes, cell: Cell, looks: Looks) -> None:
    """Applied shift by layer; what counts as none is named in the legend, not drawn."""
    for name, runs in cell.arms.items():
        found, of = _over_seeds(runs), looks[name]
        if len(found):
            places = list(range(1, len(found) + 1))
            panel.set_xticks(places)
            there = found.where(found > NOTHING)
            label = of.label if there.notna().any() else f"{of.label}: 0"
            panel.plot(places, there.to_list(), marker=of.marker, label=label, **of.line)
    panel.set_ylim(0, None)


# --- what of its change makes the difference? ------------------------------------------------------------------------

PARTS = {
    "bfp_reverse": "BFP, last layer first",
    "bfp_random": "BFP, in random order",
    "fresh_direction": "BFP's direction, SGD's length",
    "fresh_length": "SGD's direction, BFP's length",
    "shift_noise": "SGD, noise as large as the shift",
    "dose -1": "dose -1: shift doubled",
    "dose 0.5": "dose 0.5: half of the shift removed",
    "dose 1.5": "dose 1.5",
    "dose 2": "dose 2: corrected twice",
    "head": "SGD, the head's rate x 3",
}


def _part(run: Run) -> str:
    """The rule; of doses how much; of SGD whether the head has a rate of its own."""
    method = run.choice("method")
    if method == "dose":
        return f"dose {run.setting('method.dose'):g}"
    return "head" if method == "sgd" and run.setting("head_lr") is not None else method


def _draw_parts(data: Data) -> matplotlib.figure.Figure:
    """Each arm's training loss over SGD's, a marker for each rate."""
    rows = {effect.label: effect.estimate() for effect in data.effects[0] if effect.values}
    names = [name for name in (called(key, PARTS) for key in ("bfp", *PARTS))
             if any(label.endswith(f", {name}") for label in rows)]  # fmt: skip
    figure, axes = style.canvas(panel=(3.6, 0.8 + 0.34 * max(1, len(names))))
    panel = axes[0, 0]
    panel.axvline(1, color="0.35", linewidth=0.9)
    for k, (label, look) in enumerate(style.sequence([cell.label for cell in data.cells]).items()):
        for place, name in enumerate(reversed(names)):
            if (found := rows.get(f"{label}, {name}")) is not None:
                at = place + 0.22 * (k - (len(data.cells) - 1) / 2)
                style.interval(panel, look, at, found, upright=False, label=look.label)
    panel.set_yticks(range(len(names)), names[::-1])
    panel.set(xscale="log", xlabel="training loss / that of SGD at the same rate")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.grid(visible=False, axis="y")
    return figure


# --- with every arm at its own best rates, does BFP help? ------------------------------------------------------------

GRID_SEED = 100  # it chooses the rates; all other seeds judge
VALIDATION_LOSS = Measure("validation loss after the last epoch", final("loss/validation"), ratio=True)
CHOSEN_BY = {"loss/train": "training loss", "loss/validation": "validation loss"}
Rates = tuple[float, float]
Grid = dict[Rates, float]


def _rates(run: Run) -> Rates:
    """Learning rates of hidden layers and head."""
    lr = float(run.setting("lr"))
    return lr, float(run.setting("head_lr") or lr)


def _grid(runs: Runs, key: str) -> Grid:
    """The loss at each pair of rates; a diverged run has the worst loss of all."""
    found = {_rates(run): math.inf if run.status == "diverged" else run.final(key) for run in runs}
    return {at: loss for at, loss in found.items() if loss is not None}


def best(grid: Grid) -> tuple[Rates, bool] | None:
    """The rates of the lowest loss, and whether they lie inside the grid in both directions; None of an empty one."""
    if not grid:
        return None
    at = min(grid, key=grid.__getitem__)
    return at, all(min(one) < mine < max(one) for mine, one in zip(at, zip(*grid, strict=True), strict=True))


def _grids(runs: Runs) -> list[Cell]:
    """A row for each depth, with all runs of the grid's seed."""
    found = layout("method", {"model.depth": "{} hidden"}, where=lambda run: run.seed == GRID_SEED)
    return found(runs)


def _judged_by(key: str) -> Callable[[Runs], list[Cell]]:
    """A row for each depth: fresh seeds of each arm at the rates that the grid chose for it by this loss.

    An arm whose best rates lie on the border of its grid is not compared: its best may lie outside.
    """

    def cells(runs: Runs) -> list[Cell]:
        fresh = layout("method", {"model.depth": "{} hidden"}, where=lambda run: run.seed != GRID_SEED)(runs)
        grids = {cell.label: {arm: _grid(members, key) for arm, members in cell.arms.items()} for cell in _grids(runs)}
        found = []
        for cell in fresh:
            tried = grids.get(cell.label, {})
            chosen = {arm: at[0] for arm, grid in tried.items() if (at := best(grid)) is not None and at[1]}
            arms = {arm: [run for run in cell.arms[arm] if _rates(run) == chosen[arm]]
                    for arm in cell.arms if arm in chosen}  # fmt: skip
            if any(arms.values()):
                found.append(Cell(cell.row, cell.label, arms, {arm: len(tried[arm]) for arm in arms}))
        return found

    return cells


def _chosen_rates(cells: Sequence[Cell]) -> list[Table]:
    """What the grid chose for each arm and loss, and whether the grid is wide enough."""
    rows = []
    for cell in cells:
        for method, runs in cell.arms.items():
            for key, name in CHOSEN_BY.items():
                grid = _grid(runs, key)
                if (chosen := best(grid)) is not None:
                    rows.append(
                        {
                            "network": cell.label,
                            "arm": style.look(method).label,
                            "chosen by": name,
                            "hidden layers' rate": f"{chosen[0][0]:g}",
                            "head's rate": f"{chosen[0][1]:g}",
                            "loss": f"{grid[chosen[0]]:.3g}",
                            "rates tried": len(grid),
                            "inside the grid": "yes" if chosen[1] else "no: widen it",
                        }
                    )
    return [table("Rates that the grid chose", rows, "One seed, which is not used to judge.")]


def _landscape(data: Data) -> matplotlib.figure.Figure:
    """Loss over the hidden layers' rate, a line for each rate of the head: a panel for each depth, loss and arm."""
    places = [(cell, method, key) for cell in data.cells for key in CHOSEN_BY for method in ("sgd", "bfp")]
    figure, axes = panels(len(places))
    heads = sorted({_rates(run)[1] for cell in data.cells for runs in cell.arms.values() for run in runs})
    looks = style.sequence(heads, "head {:g}")
    for panel, (cell, method, key) in zip(axes, places, strict=True):
        grid = _grid(cell.arms.get(method, []), key)
        for head, look in looks.items():
            line = sorted((lr, loss) for (lr, of_head), loss in grid.items() if of_head == head)
            if line:
                panel.plot(*zip(*line, strict=True), **look.line, label=look.label)
        panel.set(xscale="log", yscale="log", xlabel="hidden layers' rate", ylabel=CHOSEN_BY[key])
        panel.set_title(f"{style.look(method).label}, {cell.label}")
        style.at_values(panel, sorted({lr for lr, _ in grid}))
    return figure


def _fair(key: str, measure: Measure, word: str) -> Part:
    """BFP over SGD, each at its best rates by one loss, judged by the same loss."""
    return Part(
        _judged_by(key),
        Compare(measure, "bfp", "sgd", word),
        Drawing(
            CHOSEN_BY[key].removesuffix(" loss"),
            f"Backforward against SGD, each at its own best rates by {CHOSEN_BY[key]}",
            "Fresh seeds; geometric mean of the pairs with its 95 % interval. Under 1: BFP has the lower loss. Shaded: "
            "what counts as no difference.",
            forest(f"{measure.name}, BFP / SGD"),
        ),
        title=f"Each at its best rates by {CHOSEN_BY[key]}",
        means=(measure,),
    )


EXPERIMENTS = (
    Experiment(
        "bfp_norm",
        "Does Backforward remove covariate shift, and does normalisation still help without the shift?",
        Part(
            layout("method", {"model": NETWORKS}, where=lambda run: run.choice("norm") == "none"),
            Effects("largest applied shift of any layer / its gradient's norm", _removed, "removes_shift"),
            Effects("applied shift of layers above the first / their gradient's norm", _stale, "stale"),
            title="The shift without normalisation: Backforward, and plain SGD by network",
        ),
        Part(
            layout(
                lambda run: f"{run.choice('method')}{style.RULES_AND_NORMS}{run.choice('norm')}",
                {"model": NETWORKS},
                chosen="lr",
            ),
            Compare(TEST, "bfp + none", "sgd + batch", "replaces_norm"),
            Compare(TEST, "bfp + batch", "bfp + none", "norm_adds_nothing"),
            Compare(TEST, "bfp + none", "sgd + none"),
            Compare(TEST, "bfp + batch", "sgd + batch"),
            Compare(TEST, "bfp + prop", "sgd + prop"),
            Compare(TEST, "sgd + batch", "sgd + none"),
            Drawing(
                "accuracy",
                "Test accuracy by update rule and normalisation",
                "Each arm at the learning rate with its best validation accuracy; mean over seeds with 95 % intervals. "
                "The vertical scales differ.",
                reached(TEST, free=True),
            ),
            Drawing(
                "shift",
                "Applied shift of each layer, relative to its gradient",
                "The distance between the gradient that a layer steps along and the one that it faces once the layers "
                "below have moved. Median over epochs, mean over seeds; the first layer has none. Values under a "
                "thousandth, such as all of exact Backforward's, are not drawn; the legend shows them as 0.",
                by_row(_draw_shift, "applied shift / gradient norm", "layer"),
            ),
            title="Differences of test accuracy",
            means=(LOSS, TEST),
            tables=_shift_tables,
        ),
        diagnostics=(APPLIED, INDUCED),
    ),
    Experiment(
        "bfp_parts",
        "Which part of Backforward makes the difference to SGD: the order, the direction or the length of its steps?",
        Part(
            layout(_part, {"lr": "lr {:g}"}),
            Compare(LOSS, lambda _: True, "sgd"),
            Drawing(
                "arms",
                "One thing changed at a time",
                "Training loss after the last epoch over that of SGD at the same learning rate, geometric mean of the "
                "pairs with 95 % intervals. Left of 1: lower than SGD.",
                _draw_parts,
            ),
            title="Against SGD",
            names=PARTS,
            note="Under 1: a lower training loss. Dose a: each layer steps along g + a (g' - g), where g is its "
            "gradient before the batch and g' the one that it faces; SGD is dose 0, exact BFP dose 1.",
            means=(LOSS,),
        ),
        Part(
            layout(_part, {"lr": "lr {:g}"}),
            Compare(LOSS, "bfp_reverse", "bfp", "order"),
            Compare(LOSS, "fresh_direction", "sgd", "direction"),
            Compare(LOSS, "fresh_length", "sgd", "length"),
            Compare(LOSS, "dose 2", "bfp", "overcorrected"),
            Compare(LOSS, "shift_noise", "sgd", "noise"),
            Compare(LOSS, "head", "bfp", "head"),
            title="One arm against another",
            names=PARTS,
        ),
        notes=("Arms, settings and tolerances were committed before the runs, in bc30810.",),
    ),
    Experiment(
        "bfp_rates",
        "With every arm at its own best rates per layer, does removing the shift help?",
        Part(
            _grids,
            Drawing(
                "grid",
                "Loss over the rates of hidden layers and head",
                "One seed. Fresh seeds compare the arms at the rates of each arm's lowest point.",
                _landscape,
            ),
            tables=_chosen_rates,
        ),
        _fair("loss/train", LOSS, "fair_training"),
        _fair("loss/validation", VALIDATION_LOSS, "fair_validation"),
        notes=("The grid, its widening, the measures and the tolerances were committed before the runs, in bc30810.",),
    ),
)
