"""Fig. 1 of Backforward Propagation: speed, cost, accuracy and weight norm of the rule and of the published loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import matplotlib.figure
import numpy as np
import pandas as pd

from backforward_suite.report import statistics, style
from backforward_suite.report.claims import claims_of, published_runs
from backforward_suite.report.experiments import _measures as measures
from backforward_suite.report.experiments._experiment import (
    Cell,
    Compare,
    Data,
    Drawing,
    Effects,
    Experiment,
    Part,
)
from backforward_suite.report.experiments._figures import Axes, Looks, by_row, curve, curves, rows_of
from backforward_suite.report.experiments._measures import GAP, LOSS, TEST, Measure, Runs, common_level, finished
from backforward_suite.report.experiments._tables import INTERVALS, table
from backforward_suite.report.finding import Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Currency, Effect

CLAIMS = claims_of("bfp_learning_rates")
ARMS = ("sgd", "bfp", "bfp_poster", "sgd_2lr", "sgd_repeat")
EVALUATED_EVERY = 5  # epochs, in the published runs
PUBLISHED_IMAGES = 60_000  # in their training set
# The epoch at which each published run stopped (training loss, patience 200, min_delta 1e-4): SGD, published loop. The
# curves in `published/` end SGD at lr 0.005 at epoch 728; its run went on to 1,000.
STOPS = {0.005: (1000, 1000), 0.01: (1000, 424), 0.05: (848, 839), 0.1: (435, 344), 0.5: (275, 234), 1.0: (656, 1000)}
# What the published logs call train loss: for the published loop it is that of the joint pass.
LOGGED = {"sgd": "loss/train", "bfp_poster": "loss/train_joint"}
AXES: dict[Currency, tuple[str, float]] = {
    "epochs": ("epochs", 1),
    "updates": ("updates of each weight (thousands)", 1e-3),
    "macs": ("multiply-accumulates (10$^{12}$)", 1e-12),
    "seconds": ("seconds of training", 1),
}
SUM, L2 = "weight_norm/sum", "weight_norm/total"  # the published logs have the sum of the tensors' norms


def arms_by_lr(runs: Runs) -> list[Cell]:
    """The arms at each learning rate at which Backforward, or the published loop, was run.

    `sgd_2lr` is SGD at twice the learning rate: about the distance that two updates cover.
    """
    methods: dict[tuple[str, float], list[Run]] = {}
    for run in measures.done(runs):
        methods.setdefault((run.choice("method"), float(run.setting("lr"))), []).append(run)
    lrs = sorted({lr for method, lr in methods if method != "sgd"} or {lr for _, lr in methods})  # SGD alone so far
    cells = []
    for lr in lrs:
        arms = {arm: methods.get(("sgd", 2 * lr) if arm == "sgd_2lr" else (arm, lr), []) for arm in ARMS}
        cells.append(Cell({"lr": lr}, f"lr {lr:g}", {arm: members for arm, members in arms.items() if members}))
    return cells


# --- against the published runs --------------------------------------------------------------------------------------


def _published(arm: str, lr: float, column: str) -> pd.Series[float]:
    """A published curve, by epoch; empty if there is none."""
    found = published_runs()
    rows = found[(found["arm"] == arm) & np.isclose(found["lr"], lr)]
    return rows.set_index("epoch")[column].dropna()


def _logged(cells: Sequence[Cell]) -> list[tuple[str, str, float, Runs]]:
    """For each rate and each arm that was published: label, arm, rate, runs."""
    return [(f"{style.look(arm).label}, {cell.label}", arm, cell.row["lr"], cell.arms[arm])
            for cell in cells for arm in LOGGED if cell.arms.get(arm)]  # fmt: skip


def _other_images(runs: Runs) -> str:
    """Why runs cannot be compared with the published ones; empty if they can."""
    other = {int(run.result["data"]["train"]) for run in runs} - {PUBLISHED_IMAGES}
    return f"trained on {max(other):,} images, the published runs on {PUBLISHED_IMAGES:,}" if other else ""


def _tracks(arm: str, cells: Sequence[Cell]) -> list[Effect]:
    """For each learning rate, each seed's mean over epochs of log(ours / published)."""
    rows = []
    for cell in cells:
        target, runs = _published(arm, cell.row["lr"], "train_loss_as_logged"), cell.arms.get(arm, [])
        if target.empty or not runs:
            continue
        if note := _other_images(runs):
            rows.append(Effect(cell.label, (), ratio=True, lost=len(runs), note=note))
            continue
        logs = [np.log((run.curve(LOGGED[arm]) / target).dropna()) for run in runs]
        usable = [log for log in logs if len(log) and np.isfinite(log).all()]
        if usable and len({len(log) for log in usable}) == 1:
            mean = pd.concat(usable, axis=1).mean(axis=1)
            worst = mean.abs().idxmax()
            note = f"farthest of {len(mean)} epochs at epoch {worst}, {np.exp(mean[worst]):.2f} times"
        values = tuple(float(log.mean()) for log in usable)
        rows.append(Effect(cell.label, values, ratio=True, lost=len(runs) - len(usable), note=note))
    return rows


def _epochs_to(cells: Sequence[Cell]) -> list[Effect]:
    """Whole epochs to a loss as logged. If all runs reach it, they followed the published protocol that far."""
    claim, rows = CLAIMS["epochs_to_loss"], []
    for label, arm, _, runs in _logged(cells):
        costs = [statistics.cost_of(run, claim.arguments["loss"], key=LOGGED[arm], between=False) for run in runs]
        known = tuple(cost for cost in costs if cost is not None)
        lost, last = len(costs) - len(known), max(int(run.metrics["epoch"].max()) for run in runs)
        note = f"{len(known)} of {len(costs)} runs reach it in {last} epochs" if lost else ""
        found = Effect(label, () if lost else known, unit=claim.unit, lost=lost, note=note)
        rows.append(replace(found, protocol=not _other_images(runs)))
    return rows


def best_accuracy(run: Run, stop: int) -> float | None:
    """The best accuracy, percent, over the epochs at which a published run that stopped there was evaluated.

    More evaluations would be more chances. The published protocol, and `data.protocol=poster`, choose on the test set.
    """
    accuracy = 100 * run.curve("accuracy/validation")
    seen = accuracy[(accuracy.index > 0) & (accuracy.index % EVALUATED_EVERY == 0) & (accuracy.index <= stop)]
    return float(seen.max()) if len(seen) else None


def _best(cells: Sequence[Cell]) -> list[Effect]:
    """Best accuracies. Runs followed the published protocol if they went as far as the published run."""
    rows = []
    for label, arm, lr, runs in _logged(cells):
        if lr in STOPS:
            stop = STOPS[lr][list(LOGGED).index(arm)]
            found = [best_accuracy(run, stop) for run in runs]
            known = tuple(value for value in found if value is not None)
            ends = [run.metrics["epoch"].max() for run in runs if len(run.metrics)]
            whole = not _other_images(runs) and all(end >= stop for end in ends)
            note = "" if whole else f"the published run went on to epoch {stop}"
            rows.append(Effect(label, known, unit="%", lost=len(found) - len(known), note=note, protocol=whole))
    return rows


def _published_table(cells: Sequence[Cell]) -> list[Table]:
    claim = CLAIMS["epochs_to_loss"]
    rows = [
        {"arm": effect.label, "published": f"{claim.number(effect.label):g}",
         "ours": effect.estimate() if effect.values else effect.note}
        for effect in _epochs_to(cells) if effect.label in claim.published
    ]  # fmt: skip
    note = (
        "Published: one seed. Whole epochs. The published loop's logged loss is that of its joint pass, after the "
        "single updates on the same batch. The published runs stopped at epoch "
        + ", ".join(f"{sgd:,} / {loop:,} (lr {lr:g})" for lr, (sgd, loop) in STOPS.items())
        + ", SGD / loop."
    )
    return [table(f"Epochs to a training loss of {claim.arguments['loss']:g}, as logged", rows, note)]


def _mark_published(panel: Axes, cell: Cell, column: str) -> None:
    """Mark what the published runs at a learning rate logged, as far as the lines in the panel go."""
    last = max((float(np.max(line.get_xdata(), initial=0)) for line in panel.lines), default=0.0)
    for arm in LOGGED:
        target = _published(arm, cell.row["lr"], column)
        target = target[target.index <= last]
        name = f"published: {style.look(arm).label}"
        style.published(panel, style.look(arm), target.index.to_numpy(), target.to_numpy(), name)


def _draw_logged(panel: Axes, cell: Cell, _: Looks) -> None:
    for arm, key in LOGGED.items():
        style.band(panel, style.look(arm), curve(cell.arms.get(arm, []), key, logs=True, whole=True))
    _mark_published(panel, cell, "train_loss_as_logged")
    panel.set_yscale("log")


# --- what a loss costs -----------------------------------------------------------------------------------------------


def _costs(cells: Sequence[Cell]) -> list[Table]:
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
        "The lowest of a fixed series of levels that all runs of both arms reach, interpolated between epochs in its "
        f"logarithm. {INTERVALS}"
    )
    return [table("The training loss at which exact Backforward and SGD are compared", rows, note)]


def _draw_costs(lr: float, data: Data) -> matplotlib.figure.Figure:
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
    return figure


def _draw_ratios(data: Data) -> matplotlib.figure.Figure:
    """Each cost on its own scale. The paper's three rates alone: at 0.5 and 1 single seeds fail, and set the scale."""
    titles = ("exact: epochs, updates", "exact: arithmetic", "exact: time", "loop: epochs", "loop: updates")
    figure, axes = style.canvas(3, 2, panel=(3.6, 1.7))
    for panel, title, effects in zip(axes.T.flat, titles, data.effects, strict=False):
        shown = [effect for effect in effects if float(effect.label.removeprefix("lr ")) <= 0.1]
        look = style.look("bfp" if title.startswith("exact") else "bfp_poster")
        style.forest(panel, rows_of(shown), look, zero=1.0, form="{:.3f}")
        panel.set(title=title, xlabel="ratio to SGD")
    axes.T.flat[len(titles)].set_visible(False)
    return figure


def _cost_drawing(lr: float) -> Drawing:
    return Drawing(
        f"cost_{lr:g}",
        f"Training loss at lr {lr:g}: by epochs, updates, arithmetic and time",
        "Mean over seeds (of the logarithm) with its pointwise 95 % t interval. In every arm the loss of a batch is "
        "taken before its update. If removing the shift were the cause of the gain, exact Backforward would lie below "
        "SGD by epochs; if twice the updates are the cause, the published loop lies on SGD by updates.",
        partial(_draw_costs, lr),
        lambda data: any(cell.row["lr"] == lr for cell in data.cells),
    )


# --- the norm of the weights -----------------------------------------------------------------------------------------


def _norm_at(run: Run, level: float) -> float | None:
    """The norm where the training loss first was at a level, on the straight line between epochs."""
    epochs, norms = statistics.cost_of(run, level), run.curve(SUM)
    return None if epochs is None or not len(norms) else float(np.interp(epochs, norms.index, norms))


def _at_equal_loss(ours: Runs, theirs: Runs, label: str) -> Effect:
    """Ratio of norms at the lowest training loss that both arms reach."""
    level = common_level([*ours, *theirs]) if ours and theirs else None
    if level is None:
        return Effect(label, (), ratio=True, note="no loss that all runs reach" if ours and theirs else "")
    found = measures.ratio(ours, theirs, label, partial(_norm_at, level=level))
    return replace(found, note=f"at a training loss of {level:g}")


def _against_loss(panel: Axes, cell: Cell, looks: Looks) -> None:
    """Norm over training loss; a mean over an epoch is paired with the norm in the epoch's middle."""
    for arm, runs in cell.arms.items():
        losses, norms = curve(runs, "loss/train", logs=True), curve(runs, SUM)
        # At large rates the norms of SGD at twice the rate, 100 to 1,000, would press the others flat.
        if not (losses.empty or norms.empty or (arm == "sgd_2lr" and cell.row["lr"] >= 0.5)):
            between, of = np.interp(losses.index, norms.index, norms["value"]), looks[arm]
            panel.plot(losses["value"], between, marker=of.marker, markersize=3, label=of.label, **of.line)
    panel.set_xscale("log")
    style.few_ticks(panel)
    panel.invert_xaxis()


NORM = Measure("norm of the weights", finished(lambda run: run.final(SUM)), ratio=True)
NORM_L2 = Measure("L2 norm of all parameters", finished(lambda run: run.final(L2)), ratio=True)
AT_LOSS = Measure("norm at equal training loss", lambda _: None, ratio=True, versus=_at_equal_loss)
TRACKS = "training loss, {} / published, mean over epochs"
EXPERIMENTS = (
    Experiment(
        "bfp_learning_rates",
        "Does exact Backforward converge faster than SGD, at equal epochs, updates, arithmetic and time, or does the "
        "published gain come from the joint pass?",
        Part(
            arms_by_lr,
            Compare(measures.EPOCHS, "bfp", "sgd", "fewer_epochs gain_as_published"),
            Compare(measures.ARITHMETIC, "bfp", "sgd", "fewer_macs"),
            Compare(measures.TIME, "bfp", "sgd", "less_time"),
            Compare(measures.EPOCHS, "bfp_poster", "sgd", "published_loop"),
            Compare(measures.UPDATES, "bfp_poster", "sgd", "beyond_updates"),
            Compare(measures.EPOCHS, "bfp_poster", "sgd_2lr"),
            Compare(measures.EPOCHS, "bfp_poster", "sgd_repeat"),
            *(_cost_drawing(lr) for lr in (0.1, 0.05, 0.01)),
            Drawing(
                "ratios",
                "What a training loss costs, relative to SGD",
                "Ratios with 95 % intervals at the paper's learning rates. The line marks no difference; left of it "
                "Backforward (squares) or the published loop (triangles) needs less. The scales differ.",
                _draw_ratios,
            ),
            title="What a training loss costs",
            note="Exact Backforward updates each weight once a batch, as SGD does. The published loop (single updates, "
            "then one of all layers), SGD at twice the learning rate and SGD with two steps a batch go twice as far. "
            "Arithmetic: multiply-accumulates actually executed. Time: of training steps, while several runs shared "
            "the machine.",
            tables=_costs,
        ),
        Part(
            arms_by_lr,
            Compare(TEST, "bfp", "sgd", "better"),
            Compare(measures.DURATION, "bfp", "sgd", "slower"),
            Compare(LOSS, "bfp", "sgd"),
            Compare(LOSS, "bfp_poster", "sgd"),
            Compare(TEST, "bfp_poster", "sgd"),
            title="After the last epoch",
            means=(LOSS, TEST),
            note="Nothing was chosen by these accuracies; all learning rates are shown.",
        ),
        Part(
            arms_by_lr,
            Effects(TRACKS.format("published loop"), partial(_tracks, "bfp_poster"), "tracks_published"),
            Effects(TRACKS.format("SGD"), partial(_tracks, "sgd"), "tracks_published_sgd"),
            Effects("epochs to a logged training loss of 0.01", _epochs_to, "epochs_to_loss"),
            Effects("best test accuracy, %", _best, "best_accuracy"),
            Drawing(
                "published",
                "The published runs and ours: training loss as logged",
                "Hollow markers: the published runs (one seed). Lines: ours, mean over seeds with its pointwise 95 % t "
                "interval. For the published loop this is the loss of its joint pass, after the single updates of each "
                "batch.",
                by_row(_draw_logged, "training loss (nats)"),
            ),
            tables=_published_table,
        ),
    ),
    Experiment(
        "bfp_weight_norm",
        "Are the norm of the weights and the gap between test and training loss larger without covariate shift?",
        Part(
            arms_by_lr,
            Compare(NORM, "bfp", "sgd", "larger"),
            Compare(NORM_L2, "bfp", "sgd", "larger_l2"),
            Compare(AT_LOSS, "bfp", "sgd", "at_equal_loss"),
            Compare(AT_LOSS, "bfp", "sgd_repeat", "its_cause"),
            Compare(AT_LOSS, "sgd_repeat", "sgd"),
            Compare(AT_LOSS, "sgd_2lr", "sgd"),
            Compare(NORM, "bfp_poster", "sgd"),
            Drawing(
                "curves",
                "Norm of the weights, epoch by epoch",
                "Sum of the L2 norms of the four tensors. Lines: mean over seeds with its pointwise 95 % t interval; "
                "hollow markers: the published runs (one seed). SGD at twice the rate is left out here.",
                curves(
                    SUM,
                    "norm of the weights",
                    arms=("sgd", "bfp", "bfp_poster", "sgd_repeat"),
                    free=True,
                    extra=partial(_mark_published, column="weight_norm"),
                ),
            ),
            Drawing(
                "loss",
                "Norm of the weights against training loss",
                "The same norms at equal training loss. Arms on one line differ only in how far they have trained. "
                "Mean over seeds, epoch by epoch; training goes from left to right. SGD at twice the rate is left out "
                "at lr 0.5 and 1, where its norm is several times that of all others.",
                by_row(_against_loss, "norm of the weights", "training loss (nats)"),
            ),
            title="Norm of the weights",
            note="The norm is the sum of the norms of the four tensors, except in the column with the L2 norm of all "
            "parameters. Diverged runs are left out.",
        ),
        Part(
            arms_by_lr,
            Compare(GAP, "bfp", "sgd", "regularising"),
            Compare(replace(GAP, ratio=True, points=""), "bfp", "sgd"),
            Compare(GAP, "bfp_poster", "sgd"),
            Compare(GAP, "sgd_repeat", "sgd"),
            title="Generalisation gap after the last epoch",
            means=(GAP,),
        ),
    ),
)
