"""Fig. 1 of Backforward Propagation: does it converge faster, at what cost, and is it the rule or the joint pass?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import matplotlib.axes
import matplotlib.figure
import numpy as np
import pandas as pd

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim, published_runs
from backforward_suite.report.experiments._experiment import Cell, Compare, Data, Drawing, Experiment, Found, Own, Part
from backforward_suite.report.experiments._figures import curve, panels
from backforward_suite.report.experiments._measures import (
    ARITHMETIC,
    DURATION,
    EPOCHS,
    LOSS,
    TEST,
    TIME,
    UPDATES,
    Measure,
    Runs,
    common_level,
    done,
)
from backforward_suite.report.experiments._tables import INTERVALS, table
from backforward_suite.report.finding import Figure, Table
from backforward_suite.report.ground import Ground
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Currency, Effect

ARMS = ("sgd", "bfp", "bfp_poster", "sgd_2lr", "sgd_repeat")
EVALUATED_EVERY = 5  # epochs, in the published runs
PUBLISHED_IMAGES = 60_000  # in their training set
# The epoch at which each published run stopped (training loss, patience 200, min_delta 1e-4). The curves beside this
# package end SGD at lr 0.005 at epoch 728; its run went on to 1,000.
STOPS: Mapping[float, Mapping[str, int]] = {
    0.005: {"sgd": 1000, "bfp_poster": 1000},
    0.01: {"sgd": 1000, "bfp_poster": 424},
    0.05: {"sgd": 848, "bfp_poster": 839},
    0.1: {"sgd": 435, "bfp_poster": 344},
    0.5: {"sgd": 275, "bfp_poster": 234},
    1.0: {"sgd": 656, "bfp_poster": 1000},
}
# What the published logs call train loss: of the published loop that of its joint pass.
LOGGED = {"sgd": "loss/train", "bfp_poster": "loss/train_joint"}
AXES: dict[Currency, tuple[str, float]] = {
    "epochs": ("epochs", 1),
    "updates": ("updates of each weight (thousands)", 1e-3),
    "macs": ("multiply-accumulates (10$^{12}$)", 1e-12),
    "seconds": ("seconds of training", 1),
}


def label(lr: float) -> str:
    """A row's label."""
    return f"lr {lr:g}"


def arms_by_lr(runs: Runs) -> list[Cell]:
    """The arms at each learning rate at which Backforward, or the published loop, was run.

    `sgd_2lr` is SGD at twice the learning rate: about the way that two updates go where one goes.
    """
    methods: dict[tuple[str, float], list[Run]] = {}
    for run in done(runs):
        methods.setdefault((run.choice("method"), float(run.setting("lr"))), []).append(run)
    lrs = sorted({lr for method, lr in methods if method != "sgd"} or {lr for _, lr in methods})  # SGD alone so far
    cells = []
    for lr in lrs:
        arms = {arm: methods.get(("sgd", 2 * lr) if arm == "sgd_2lr" else (arm, lr), []) for arm in ARMS}
        cells.append(Cell({"lr": lr}, label(lr), {arm: members for arm, members in arms.items() if members}))
    return cells


def published(arm: str, lr: float, column: str) -> pd.Series[float]:
    """A published curve, by epoch; empty where there is none."""
    found = published_runs()
    rows = found[(found["arm"] == arm) & np.isclose(found["lr"], lr)]
    return rows.set_index("epoch")[column].dropna()


# --- against the published runs --------------------------------------------------------------------------------------


def against_published(runs: Runs, claims: Mapping[str, Claim], scale: str) -> Found:
    """Judge the claims about what the published logs show."""
    cells, ground = arms_by_lr(runs), Ground.of(runs, scale)
    last = max((int(run.metrics["epoch"].max()) for run in done(runs) if len(run.metrics)), default=0)
    judged = [
        verdicts.curve(claims[word], _tracks(cells, arm), ground, f"epochs 1 to {last}")
        for word, arm in (("tracks_published", "bfp_poster"), ("tracks_published_sgd", "sgd"))
    ]
    level = float(claims["epochs_to_loss"].arguments["loss"])
    epochs = [_epochs_to(level, claims["epochs_to_loss"], cell, arm) for cell, arm in _logged(cells)]
    best = [_best(claims["best_accuracy"], cell, arm) for cell, arm in _logged(cells)]
    judged += [
        verdicts.value(claims[word], [effect for effect in effects if effect.label in claims[word].published], ground)
        for word, effects in (("epochs_to_loss", epochs), ("best_accuracy", best))
    ]
    figure = Figure(
        "bfp_learning_rates_published",
        "The published runs and ours: training loss as logged",
        "Hollow markers: the published runs (one seed), lines: ours, mean over seeds with its pointwise 95 % t "
        "interval. For the published loop this is the loss of its joint pass, after the single updates of each batch.",
        partial(_draw_published, cells),
    )
    return Found(judged, [_published_table(claims["epochs_to_loss"], epochs)], [figure] if cells else [])


def _logged(cells: Sequence[Cell]) -> list[tuple[Cell, str]]:
    return [(cell, arm) for cell in cells for arm in LOGGED if cell.arms.get(arm)]


def _named(cell: Cell, arm: str) -> str:
    return f"{style.look(arm).label}, {cell.label}"


def _images(runs: Runs) -> str:
    """Why runs cannot be compared with the published ones; empty where they can."""
    other = {int(run.result["data"]["train"]) for run in runs} - {PUBLISHED_IMAGES}
    return f"trained on {max(other):,} images, the published runs on {PUBLISHED_IMAGES:,}" if other else ""


def _tracks(cells: Sequence[Cell], arm: str) -> list[Effect]:
    """For each learning rate, each seed's mean over epochs of log(ours / published)."""
    rows, what = [], f"training loss, {style.look(arm).label} / published, mean over epochs"
    for cell in cells:
        target, runs = published(arm, cell.row["lr"], "train_loss_as_logged"), cell.arms.get(arm, [])
        if target.empty or not runs:
            continue
        if note := _images(runs):
            rows.append(Effect(cell.label, (), ratio=True, lost=len(runs), note=note))
            continue
        curves = [run.curve(LOGGED[arm]) for run in runs]
        shared = [curve.index.intersection(target.index) for curve in curves]
        logs = [
            np.log(curve.loc[epochs].to_numpy() / target.loc[epochs].to_numpy())
            for curve, epochs in zip(curves, shared, strict=True)
            if len(epochs)
        ]
        usable = [log for log in logs if np.isfinite(log).all()]
        note = ""
        if usable and len({len(log) for log in usable}) == 1:
            mean = np.mean(usable, axis=0)
            worst = int(np.argmax(np.abs(mean)))
            note = f"farthest at epoch {shared[0][worst]}, {np.exp(mean[worst]):.2f} times"
        values = tuple(float(log.mean()) for log in usable)
        rows.append(Effect(cell.label, values, ratio=True, lost=len(curves) - len(usable), note=note, what=what))
    return rows


def _epochs_to(level: float, claim: Claim, cell: Cell, arm: str) -> Effect:
    """Whole epochs to a loss as logged. Runs that all reach it followed the published protocol as far as it goes."""
    runs, what = cell.arms[arm], f"epochs to a logged training loss of {level:g}"
    costs = [statistics.cost_of(run, level, key=LOGGED[arm], between=False) for run in runs]
    known = [cost for cost in costs if cost is not None]
    lost, last = len(costs) - len(known), max(int(run.metrics["epoch"].max()) for run in runs)
    note = f"{len(known)} of {len(costs)} runs reach it in {last} epochs" if lost else ""
    found = Effect(_named(cell, arm), () if lost else tuple(known), unit=claim.unit, lost=lost, note=note)
    return replace(found, what=what, protocol=not _images(runs))


def best_accuracy(run: Run, arm: str, lr: float) -> float | None:
    """The best accuracy, percent, over the epochs at which the published run was evaluated: more are more chances.

    The published protocol chooses on the test set, and so does `data.protocol=poster`.
    """
    accuracy = 100 * run.curve("accuracy/validation")
    stop = STOPS[lr][arm]
    seen = accuracy[(accuracy.index > 0) & (accuracy.index % EVALUATED_EVERY == 0) & (accuracy.index <= stop)]
    return float(seen.max()) if len(seen) else None


def _best(claim: Claim, cell: Cell, arm: str) -> Effect:
    """Best accuracies. A run followed the published protocol if it went as far as the published one."""
    lr, runs = float(cell.row["lr"]), cell.arms[arm]
    if lr not in STOPS:
        return Effect(_named(cell, arm), ())
    found = [best_accuracy(run, arm, lr) for run in runs]
    known = tuple(value for value in found if value is not None)
    stop = STOPS[lr][arm]
    whole = not _images(runs) and all(run.metrics["epoch"].max() >= stop for run in runs if len(run.metrics))
    note = "" if whole else f"the published run went on to epoch {stop}"
    best = Effect(_named(cell, arm), known, unit=claim.unit, lost=len(found) - len(known), note=note)
    return replace(best, what="best test accuracy, %", protocol=whole)


def _published_table(claim: Claim, epochs: Sequence[Effect]) -> Table:
    rows = [
        {"arm": effect.label, "published": f"{claim.number(effect.label):g}",
         "ours": effect.estimate() if effect.values else effect.note}
        for effect in epochs if effect.label in claim.published
    ]  # fmt: skip
    return table(
        f"Epochs to a training loss of {claim.arguments['loss']:g}, as logged",
        rows,
        "Published: one seed. Whole epochs. The published loop's logged loss is that of its joint pass, after the "
        "single updates on the same batch. The published runs stopped at epoch "
        + ", ".join(f"{stops['sgd']:,} / {stops['bfp_poster']:,} (lr {lr:g})" for lr, stops in STOPS.items())
        + ", SGD / loop.",
    )


# --- what a loss costs -----------------------------------------------------------------------------------------------


def costs(cells: Sequence[Cell]) -> list[Table]:
    """The loss at which exact Backforward and SGD are compared, and what each needs to get there."""
    rows = []
    for cell in cells:
        both = [*cell.arms.get("sgd", []), *cell.arms.get("bfp", [])]
        level = common_level(both) if cell.arms.get("sgd") and cell.arms.get("bfp") else None
        row: dict[str, object] = {"": cell.label, "training loss": None if level is None else f"{level:g}"}
        for arm in ("sgd", "bfp"):
            reach = Measure("", partial(statistics.cost_of, level=level)) if level is not None else None
            row[f"epochs to it, {style.look(arm).label}"] = reach and reach.mean(cell.arms[arm])
        rows.append(row)
    note = (
        "The lowest of a fixed row of levels that all runs of both arms reach; between epochs along the line of its "
        f"logarithm. {INTERVALS}"
    )
    return [table("The training loss at which exact Backforward and SGD are compared", rows, note)]


def draw_costs(lr: float, data: Data) -> matplotlib.figure.Figure:
    """Training loss by epochs, updates, arithmetic and time at a learning rate."""
    figure, axes = style.canvas(2, 2, sharey=True)
    arms = next((cell.arms for cell in data.cells if cell.row["lr"] == lr), {})
    for panel, (currency, (name, times)) in zip(axes.flat, AXES.items(), strict=True):
        for arm, runs in arms.items():
            frame = curve(runs, "loss/train", currency, logs=True)
            frame.index = frame.index * times
            style.band(panel, style.look(arm), frame)
        panel.set(yscale="log", xlabel=name)
        panel.set_xlim(left=0)
    for row in axes:
        row[0].set_ylabel("training loss (nats)")
    style.legend(figure)
    return figure


def draw_published(panel: matplotlib.axes.Axes, lr: float, column: str) -> None:
    """Mark what the published runs at a learning rate logged, as far as the lines in the panel go."""
    last = max((float(np.max(line.get_xdata(), initial=0)) for line in panel.lines), default=0.0)
    for arm in LOGGED:
        target = published(arm, lr, column)
        target = target[target.index <= last]
        name = f"published: {style.look(arm).label}"
        style.published(panel, style.look(arm), target.index.to_numpy(), target.to_numpy(), name)


def _draw_published(cells: Sequence[Cell]) -> matplotlib.figure.Figure:
    figure, axes = panels(len(cells))
    for panel, cell in zip(axes, cells, strict=True):
        for arm, key in LOGGED.items():
            style.band(panel, style.look(arm), curve(cell.arms.get(arm, []), key, logs=True, whole=True))
        draw_published(panel, cell.row["lr"], "train_loss_as_logged")
        panel.set(yscale="log", title=cell.label)
        style.epochs(panel)
    for panel in axes[::2]:
        panel.set_ylabel("training loss (nats)")
    style.legend(figure)
    return figure


def draw_ratios(data: Data) -> matplotlib.figure.Figure:
    """What a loss costs, relative to SGD: exact Backforward and the published loop, each currency on its own scale.

    The paper's three rates alone: at 0.5 and 1 single seeds fail, and their ratios would press the others flat.
    """
    exact, poster = style.look("bfp"), style.look("bfp_poster")
    titles = ("exact: epochs, updates", "exact: arithmetic", "exact: time", "loop: epochs", "loop: updates")
    figure, axes = style.canvas(3, 2, panel=(3.6, 1.7))
    for panel, title, effects in zip(axes.T.flat, titles, data.effects, strict=False):
        rows = [(effect.label, effect.estimate() if effect.values else None)
                for effect in effects if float(effect.label.removeprefix("lr ")) <= 0.1]  # fmt: skip
        style.forest(panel, rows, exact if title.startswith("exact") else poster, zero=1.0, form="{:.3f}")
        panel.set(title=title, xlabel="ratio to SGD")
    axes.T.flat[len(titles)].set_visible(False)
    return figure


def _cost_drawing(lr: float) -> Drawing:
    return Drawing(
        f"cost_{lr:g}",
        f"Training loss at lr {lr:g}: by epochs, updates, arithmetic and time",
        "Mean over seeds (of the logarithm) with its pointwise 95 % t interval. The loss of each batch is taken before "
        "its update, in every arm. If the gain were that of removing the shift, exact Backforward would lie below SGD "
        "by epochs; if it is that of twice the updates, the published loop meets SGD by updates.",
        partial(draw_costs, lr),
        lambda data: any(cell.row["lr"] == lr for cell in data.cells),
    )


EXPERIMENT = Experiment(
    "bfp_learning_rates",
    "Does exact Backforward converge faster than SGD, at equal epochs, updates, arithmetic and time, "
    "or is the published gain that of the joint pass?",
    Part(
        arms_by_lr,
        (
            Compare(EPOCHS, "bfp", "sgd", "fewer_epochs gain_as_published"),
            Compare(ARITHMETIC, "bfp", "sgd", "fewer_macs"),
            Compare(TIME, "bfp", "sgd", "less_time"),
            Compare(EPOCHS, "bfp_poster", "sgd", "published_loop"),
            Compare(UPDATES, "bfp_poster", "sgd", "beyond_updates"),
            Compare(EPOCHS, "bfp_poster", "sgd_2lr"),
            Compare(EPOCHS, "bfp_poster", "sgd_repeat"),
        ),
        title="What a training loss costs",
        note="Exact Backforward updates each weight once a batch, as SGD does; the published loop (single updates, "
        "then one of all layers), SGD at twice the learning rate and SGD with two steps a batch go twice as far. "
        "Arithmetic: multiply-accumulates as carried out. Time: of training steps, with runs side by side.",
        tables=costs,
        drawings=(
            *(_cost_drawing(lr) for lr in (0.1, 0.05, 0.01)),
            Drawing(
                "ratios",
                "What a training loss costs, relative to SGD",
                "Ratios with 95 % intervals at the paper's learning rates; the line is no difference, left of it "
                "Backforward (squares) or the published loop (triangles) needs less. The scales differ.",
                draw_ratios,
            ),
        ),
    ),
    Part(
        arms_by_lr,
        (
            Compare(TEST, "bfp", "sgd", "better"),
            Compare(DURATION, "bfp", "sgd", "slower"),
            Compare(LOSS, "bfp", "sgd"),
            Compare(LOSS, "bfp_poster", "sgd"),
            Compare(TEST, "bfp_poster", "sgd"),
        ),
        title="After the last epoch",
        means=(LOSS, TEST),
        note="Nothing was chosen by these accuracies: every learning rate is shown.",
    ),
    Own(against_published),
)
