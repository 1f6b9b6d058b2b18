"""The fair question: with every arm at its own best rates, of hidden layers and of the head, does BFP help?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib.figure
import pandas as pd

from backforward_suite.report import style
from backforward_suite.report.experiments._experiment import Cell, Compare, Data, Drawing, Experiment, Part
from backforward_suite.report.experiments._figures import forest, panels
from backforward_suite.report.experiments._measures import LOSS, Measure, Runs, done, final
from backforward_suite.report.finding import Table
from backforward_suite.report.reading import Run

GRID_SEED = 100  # it chooses rates; all other seeds judge
VALIDATION_LOSS = Measure("validation loss after the last epoch", final("loss/validation"), ratio=True)
CHOSEN_BY = {"loss/train": "training loss", "loss/validation": "validation loss"}
Rates = tuple[float, float]
Grid = dict[Rates, float]


def rates(run: Run) -> Rates:
    """Learning rates of hidden layers and head."""
    lr = float(run.setting("lr"))
    return lr, float(run.setting("head_lr") or lr)


def grid_of(runs: Runs, method: str, depth: int, key: str) -> Grid:
    """By rates, the loss of the run that the grid's seed has there; a diverged run has the worst loss of all."""
    found = {
        rates(run): math.inf if run.status == "diverged" else run.final(key)
        for run in done(runs)
        if run.seed == GRID_SEED and run.choice("method") == method and int(run.setting("model.depth")) == depth
    }
    return {at: loss for at, loss in found.items() if loss is not None}


def best(grid: Grid) -> tuple[Rates, bool] | None:
    """The rates of the lowest loss, and whether they lie inside the grid in both directions; None of an empty one."""
    if not grid:
        return None
    at = min(grid, key=grid.__getitem__)
    return at, all(min(one) < mine < max(one) for mine, one in zip(at, zip(*grid, strict=True), strict=True))


def depths(runs: Runs) -> list[int]:
    """Numbers of hidden layers that were run."""
    return sorted({int(run.setting("model.depth")) for run in done(runs)})


def judged_by(key: str) -> Callable[[Runs], list[Cell]]:
    """A row for each depth: fresh seeds of each arm at the rates that the grid chose for it by this loss.

    An arm whose best rates lie on the border of its grid is not compared: its best may lie outside.
    """

    def cells(runs: Runs) -> list[Cell]:
        found = []
        for depth in depths(runs):
            arms, tried = {}, {}
            for method in ("sgd", "bfp"):
                grid = grid_of(runs, method, depth, key)
                chosen = best(grid)
                if chosen is None or not chosen[1]:
                    continue
                arms[method] = [
                    run
                    for run in done(runs)
                    if run.seed != GRID_SEED
                    and run.choice("method") == method
                    and int(run.setting("model.depth")) == depth
                    and rates(run) == chosen[0]
                ]
                tried[method] = len(grid)
            if any(arms.values()):
                found.append(Cell({"model.depth": depth}, f"{depth} hidden", arms, tried))
        return found

    return cells


def grids(runs: Runs) -> list[Cell]:
    """A row for each depth, with all runs of the grid's seed."""
    return [
        Cell(
            {"model.depth": depth},
            f"{depth} hidden",
            {
                method: [
                    run
                    for run in done(runs)
                    if run.seed == GRID_SEED
                    and run.choice("method") == method
                    and int(run.setting("model.depth")) == depth
                ]
                for method in ("sgd", "bfp")
            },
        )
        for depth in depths(runs)
    ]


def chosen_rates(cells: Sequence[Cell]) -> list[Table]:
    """What the grid chose, for each arm and loss, and whether the grid is wide enough."""
    rows = []
    for cell in cells:
        for method, runs in cell.arms.items():
            for key, name in CHOSEN_BY.items():
                grid = grid_of(runs, method, int(cell.row["model.depth"]), key)
                chosen = best(grid)
                if chosen is not None:
                    (lr, head), inside = chosen
                    rows.append(
                        {
                            "network": cell.label,
                            "arm": style.look(method).label,
                            "chosen by": name,
                            "hidden layers' rate": f"{lr:g}",
                            "head's rate": f"{head:g}",
                            "loss": f"{grid[lr, head]:.3g}",
                            "rates tried": str(len(grid)),
                            "inside the grid": "yes" if inside else "no: widen it",
                        }
                    )
    return [Table("Rates that the grid chose", pd.DataFrame(rows), "One seed, which judges nothing.")] if rows else []


def landscape(data: Data) -> matplotlib.figure.Figure:
    """Loss over the hidden layers' rate, a line for each rate of the head: a panel for each depth, loss and arm."""
    places = [(cell, method, key) for cell in data.cells for key in CHOSEN_BY for method in ("sgd", "bfp")]
    figure, axes = panels(len(places))
    heads = sorted({rates(run)[1] for cell in data.cells for runs in cell.arms.values() for run in runs})
    looks = style.sequence(heads, "head {:g}")
    for panel, (cell, method, key) in zip(axes, places, strict=True):
        grid = grid_of(cell.arms[method], method, int(cell.row["model.depth"]), key)
        for head, look in looks.items():
            line = sorted((lr, loss) for (lr, of_head), loss in grid.items() if of_head == head)
            if line:
                at, losses = zip(*line, strict=True)
                panel.plot(at, losses, **look.line, label=look.label)
        panel.set(xscale="log", yscale="log", xlabel="hidden layers' rate", ylabel=CHOSEN_BY[key])
        panel.set_title(f"{style.look(method).label}, {cell.label}")
        style.at_values(panel, sorted({lr for lr, _ in grid}))
    style.legend(figure)
    return figure


def fair(title: str, key: str, measure: Measure, word: str) -> Part:
    """BFP over SGD, each at its best rates by one loss, judged by the same loss."""
    name = CHOSEN_BY[key].partition(" ")[0]
    return Part(
        judged_by(key),
        (Compare(measure, "bfp", "sgd", word),),
        title=title,
        means=(measure,),
        drawings=(
            Drawing(
                name,
                f"Backforward against SGD, each at its own best rates by {CHOSEN_BY[key]}",
                "Fresh seeds; geometric mean of the pairs with its 95 % interval. Under 1: BFP has the lower loss. "
                "Shaded: what counts as no difference.",
                forest(f"{measure.name}, BFP / SGD"),
            ),
        ),
    )


EXPERIMENT = Experiment(
    "bfp_rates",
    "With every arm at its own best rates per layer, does removing the shift help?",
    Part(
        grids,
        (),
        tables=chosen_rates,
        drawings=(
            Drawing(
                "grid",
                "Loss over the rates of hidden layers and head",
                "One seed. Each arm's lowest point gives the rates at which fresh seeds compare the arms.",
                landscape,
            ),
        ),
    ),
    fair("Each at its best rates by training loss", "loss/train", LOSS, "fair_training"),
    fair("Each at its best rates by validation loss", "loss/validation", VALIDATION_LOSS, "fair_validation"),
    notes=("The grid, how it is widened, what judges and the tolerances were committed before the runs, in bc30810.",),
)
