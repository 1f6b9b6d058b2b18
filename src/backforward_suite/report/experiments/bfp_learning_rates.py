"""Fig. 1 of Backforward Propagation: does it converge faster, at what cost, and is it the rule or the joint pass?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib.axes
import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullLocator

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim, published_runs
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.finding import Figure, Finding, Table, Verdict
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import CURRENCIES, Currency, Effect
from backforward_suite.report.verdicts import Ground

QUESTION = (
    "Does exact Backforward converge faster than SGD, at equal epochs, updates, arithmetic and time, "
    "or is the published gain that of the joint pass?"
)

ARMS = ("sgd", "bfp", "bfp_poster", "sgd_2lr", "sgd_repeat")
EVALUATED_EVERY = 5  # epochs, in the published runs
PUBLISHED_IMAGES = 60_000  # in their training set
# What the published logs call train loss: of the published loop that of its joint pass.
LOGGED = {"sgd": "loss/train", "bfp_poster": "loss/train_joint"}
AXES: dict[Currency, tuple[str, float]] = {
    "epochs": ("epochs", 1),
    "updates": ("updates of each weight (thousands)", 1e-3),
    "macs": ("multiply-accumulates (10$^{12}$)", 1e-12),
    "seconds": ("seconds of training", 1),
}
# In the table of costs; epochs stand for updates, since exact Backforward makes one of each weight a batch, like SGD.
NAMES: dict[Currency, str] = {"epochs": "epochs, updates", "macs": "arithmetic", "seconds": "time"}

Arms = Mapping[str, Sequence[Run]]


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Judge the claims by runs of all arms at several learning rates."""
    of = common.by_word(claims)
    there = common.done(runs)
    at = by_lr(there)
    gain = {currency: [_cost(arms, "bfp", "sgd", lr, currency) for lr, arms in at.items()] for currency in CURRENCIES}
    loop = {
        currency: [_cost(arms, "bfp_poster", "sgd", lr, currency) for lr, arms in at.items()] for currency in CURRENCIES
    }
    ground = Ground.of(runs, scale)
    judged = [
        verdicts.direction(of["fewer_epochs"], gain["epochs"], ground),
        verdicts.direction(of["gain_as_published"], gain["epochs"], ground),
        verdicts.direction(of["fewer_macs"], gain["macs"], ground),
        verdicts.direction(of["less_time"], gain["seconds"], ground),
        verdicts.direction(of["published_loop"], loop["epochs"], ground),
        verdicts.direction(of["beyond_updates"], loop["updates"], ground),
        *(
            verdicts.curve(of[word], _tracks(at, arm), ground, _epochs(there))
            for word, arm in (("tracks_published", "bfp_poster"), ("tracks_published_sgd", "sgd"))
        ),
        _published_epochs(of["epochs_to_loss"], at, ground),
        _best_accuracy(of["best_accuracy"], at, ground),
    ]
    tables = [
        _cost_table(at, gain),
        _cause_table(at, gain, loop),
        _final_table(at),
        _published_table(at, of["epochs_to_loss"]),
    ]
    return common.finding(
        "bfp_learning_rates", QUESTION, runs, claims, scale, judged, tables, _figures(at, gain, loop, of), _notes(at)
    )


def by_lr(runs: Sequence[Run]) -> dict[float, Arms]:
    """The arms at each learning rate at which Backforward, or the published loop, was run.

    `sgd_2lr` is SGD at twice the learning rate: about the way that two updates go where one goes.
    """
    methods = common.arms(runs)
    lrs = common.numbers([run for name, members in methods.items() if name != "sgd" for run in members], "lr")
    lrs = lrs or common.numbers(runs, "lr")  # SGD alone so far
    return {lr: {name: found for name, found in _arms_at(methods, lr).items() if found} for lr in lrs}


def _arms_at(methods: Mapping[str, Sequence[Run]], lr: float) -> dict[str, list[Run]]:
    return {
        name: common.at(methods.get("sgd" if name == "sgd_2lr" else name, []), lr=2 * lr if name == "sgd_2lr" else lr)
        for name in ARMS
    }


def label(lr: float) -> str:
    """A row's label."""
    return f"lr {lr:g}"


def _cost(arms: Arms, ours: str, theirs: str, lr: float, currency: Currency) -> Effect:
    return common.cost_effect(arms.get(ours, []), arms.get(theirs, []), label(lr), currency)


def _epochs(runs: Sequence[Run]) -> str:
    last = max((int(run.metrics["epoch"].max()) for run in runs if len(run.metrics)), default=0)
    return f"epochs 1 to {last}"


# --- the published curves --------------------------------------------------------------------------------------------


def _tracks(at: Mapping[float, Arms], arm: str) -> list[Effect]:
    """For each learning rate, each seed's mean over epochs of log(ours / published)."""
    rows = []
    for lr, arms in at.items():
        target = published(arm, lr, "train_loss_as_logged")
        if target.empty or not arms.get(arm):
            continue
        images = {int(run.result["data"]["train"]) for run in arms[arm]} - {PUBLISHED_IMAGES}
        if images:
            note = f"trained on {max(images):,} images, the published runs on {PUBLISHED_IMAGES:,}"
            rows.append(Effect(label(lr), (), ratio=True, lost=len(arms[arm]), note=note))
            continue
        curves = [run.curve(LOGGED[arm]) for run in arms[arm]]
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
        lost = len(curves) - len(usable)
        rows.append(Effect(label(lr), tuple(float(log.mean()) for log in usable), ratio=True, lost=lost, note=note))
    return rows


def published(arm: str, lr: float, column: str) -> pd.Series[float]:
    """A published curve, by epoch; empty where there is none."""
    found = published_runs()
    rows = found[(found["arm"] == arm) & np.isclose(found["lr"], lr)]
    return rows.set_index("epoch")[column].dropna()


def _published_epochs(claim: Claim, at: Mapping[float, Arms], ground: Ground) -> Verdict:
    level = float(claim.arguments["loss"])
    measured = []
    for lr, arms in at.items():
        for arm, key in LOGGED.items():
            name = f"{arm} {label(lr)}"
            if name in claim.published and arms.get(arm):
                costs = [statistics.cost_of(run, level, key=key, between=False) for run in arms[arm]]
                known = [cost for cost in costs if cost is not None]
                lost = len(costs) - len(known)
                note = f"{len(known)} of {len(costs)} runs reach it" if lost else ""
                measured.append(Effect(name, () if lost else tuple(known), lost=lost, note=note))
    return verdicts.value(claim, measured, ground)


def best_accuracy(run: Run, arm: str, lr: float) -> float | None:
    """The best accuracy over the epochs at which the published run was evaluated: more of them would be more chances.

    The published protocol chooses on the test set, and so does `data.protocol=poster`.
    """
    last = published(arm, lr, "train_loss_as_logged").index.max()
    accuracy = run.curve("accuracy/validation")
    seen = accuracy[(accuracy.index > 0) & (accuracy.index % EVALUATED_EVERY == 0) & (accuracy.index <= last)]
    return float(seen.max()) if len(seen) else None


def _best_accuracy(claim: Claim, at: Mapping[float, Arms], ground: Ground) -> Verdict:
    measured = []
    for lr, arms in at.items():
        for arm in LOGGED:
            name = f"{arm} {label(lr)}"
            if name in claim.published and arms.get(arm):
                best = [best_accuracy(run, arm, lr) for run in arms[arm]]
                known = [100 * value for value in best if value is not None]
                measured.append(Effect(name, tuple(known), lost=len(best) - len(known)))
    return verdicts.value(claim, measured, ground)


# --- tables ----------------------------------------------------------------------------------------------------------


def _cost_table(at: Mapping[float, Arms], gain: Mapping[Currency, Sequence[Effect]]) -> Table:
    corrected = {currency: statistics.holm(effects) for currency, effects in gain.items()}
    rows = []
    for k, (lr, arms) in enumerate(at.items()):
        both = [*arms.get("sgd", []), *arms.get("bfp", [])]
        level = common.common_level(both) if arms.get("sgd") and arms.get("bfp") else None
        row: dict[str, object] = {"lr": f"{lr:g}", "training loss": None if level is None else f"{level:g}"}
        for arm in ("sgd", "bfp"):
            cost = None if level is None else _mean_cost(arms[arm], level)
            row[f"epochs, {style.look(arm).label}"] = cost
        for currency, name in NAMES.items():
            found = corrected[currency][k]
            row[f"BFP / SGD: {name}"] = common.shown(found)
            row[f"p, {name}"] = common.p_text(found.corrected_p)
        rows.append(row)
    return common.table(
        "What a training loss costs: exact Backforward against SGD",
        rows,
        "The loss is the lowest of a fixed row of levels that all runs of both arms reach; between epochs along the "
        "line of its logarithm. Ratios: geometric mean of the pairs. "
        f"{common.INTERVALS} {common.correction_note(len(rows))} "
        "Exact Backforward updates each weight once a batch, as SGD does: epochs and updates are the same there. "
        "Arithmetic is counted in multiply-accumulates as carried out; time is that of training steps, with runs side "
        "by side on the machine.",
    )


def _mean_cost(runs: Sequence[Run], level: float) -> str:
    return common.mean_cell(runs, lambda run: statistics.cost_of(run, level))


def _cause_table(
    at: Mapping[float, Arms],
    gain: Mapping[Currency, Sequence[Effect]],
    loop: Mapping[Currency, Sequence[Effect]],
) -> Table:
    columns: dict[str, Sequence[Effect]] = {
        "loop / SGD: epochs": loop["epochs"],
        "loop / SGD: updates": loop["updates"],
        "loop / SGD at 2 lr: epochs": [_cost(arms, "bfp_poster", "sgd_2lr", lr, "epochs") for lr, arms in at.items()],
        "loop / SGD twice a batch: epochs": [
            _cost(arms, "bfp_poster", "sgd_repeat", lr, "epochs") for lr, arms in at.items()
        ],
        "exact / SGD: epochs": gain["epochs"],
    }
    rows = [
        {"lr": f"{lr:g}"}
        | {name: effects[k].estimate() if effects[k].values else None for name, effects in columns.items()}
        for k, lr in enumerate(at)
    ]
    return common.table(
        "Where the gain of the published loop comes from",
        rows,
        "Cost of a training loss, as a ratio: 1 is no difference. The published loop (single updates, then one of all "
        "layers) updates each weight twice a batch; SGD at twice the learning rate and SGD with two steps a batch go "
        "as far. Its loss here is that before any update of the batch, as for all arms. "
        f"{common.INTERVALS} Not corrected.",
    )


def _final_table(at: Mapping[float, Arms]) -> Table:
    rows = []
    for lr, arms in at.items():
        for arm, runs in arms.items():
            base = arms.get("sgd", [])
            other = arm != "sgd" and base
            rows.append(
                {
                    "lr": f"{lr:g}",
                    "arm": style.look(arm).label,
                    "training loss": common.mean_cell(runs, lambda run: run.final("loss/train")),
                    "/ SGD": _ratio(runs, base) if other else None,
                    "test accuracy": common.mean_cell(runs, lambda run: run.final("accuracy/test"), "%", 100),
                    "- SGD, points": common.points(runs, base, "accuracy/test").estimate() if other else None,
                    "seeds": len(runs),
                }
            )
    return common.table(
        "After the last epoch",
        rows,
        f"Differences and ratios to SGD at the same learning rate, paired by seed. {common.INTERVALS} Not corrected. "
        "Nothing was chosen by these accuracies: every learning rate is shown.",
    )


def _ratio(runs: Sequence[Run], base: Sequence[Run]) -> object:
    return common.effect(runs, base, lambda run: run.final("loss/train"), "", ratio=True).estimate()


def _published_table(at: Mapping[float, Arms], claim: Claim) -> Table:
    level = float(claim.arguments["loss"])
    rows = []
    for lr, arms in at.items():
        for arm, key in LOGGED.items():
            runs = arms.get(arm, [])
            epochs = claim.published.get(f"{arm} {label(lr)}")
            if not runs or epochs is None:
                continue
            costs = [statistics.cost_of(run, level, key=key, between=False) for run in runs]
            reached = [cost for cost in costs if cost is not None]
            last = max(int(run.metrics["epoch"].max()) for run in runs)
            ours = (
                statistics.mean(reached) if len(reached) == len(costs) else f"{len(reached)} of {len(costs)} in {last}"
            )
            rows.append({"lr": f"{lr:g}", "arm": style.look(arm).label, "published": f"{epochs:g}", "ours": ours})
    return common.table(
        f"Epochs to a training loss of {level:g}, as logged",
        rows,
        f"{claim.source}: one seed. Whole epochs. The published loop's logged loss is that of its joint pass, after "
        "the single updates on the same batch. A run that ends before it is there is counted, not guessed.",
    )


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(
    at: Mapping[float, Arms],
    gain: Mapping[Currency, Sequence[Effect]],
    loop: Mapping[Currency, Sequence[Effect]],
    of: Mapping[str, Claim],
) -> list[Figure]:
    if not at:
        return []
    in_the_paper = of["fewer_epochs"].arguments["rows"]  # those of its Fig. 1; the published logs have three more
    central = [lr for lr in at if label(lr) in in_the_paper] or list(at)[-1:]
    tolerance = of["gain_as_published"].tolerance
    return [
        Figure(
            f"bfp_learning_rates_cost_{lr:g}",
            f"Training loss at lr {lr:g}: by epochs, updates, arithmetic and time",
            "Mean over seeds (of the logarithm) with its pointwise 95 % t interval. The loss of each batch is taken "
            "before its update, in every arm. If the gain were that of removing the shift, exact Backforward would lie "
            "below SGD by epochs; if it is that of twice the updates, the published loop meets SGD by updates.",
            partial(_draw_costs, at[lr]),
        )
        for lr in sorted(central, reverse=True)
    ] + [
        Figure(
            "bfp_learning_rates_published",
            "The published runs and ours: training loss as logged",
            "Hollow markers: the published runs (one seed), lines: ours, mean over seeds with its pointwise 95 % t "
            "interval. For the published loop this is the loss of its joint pass, after the single updates of each "
            "batch.",
            partial(_draw_published, at),
        ),
        Figure(
            "bfp_learning_rates_ratios",
            "What a training loss costs, relative to SGD",
            "Ratios with 95 % intervals; 1 (line) is no difference; in the grey region a gain is not of the "
            "published order. Filled squares: "
            "exact Backforward. Triangles: the published loop.",
            partial(_draw_ratios, gain, loop, tolerance),
        ),
    ]


def _draw_costs(arms: Arms) -> matplotlib.figure.Figure:
    figure, axes = style.canvas(2, 2, sharey=True)
    for panel, (currency, (name, times)) in zip(axes.flat, AXES.items(), strict=True):
        for arm, runs in arms.items():
            frame = common.curve(runs, "loss/train", currency, logs=True)
            frame.index = frame.index * times
            style.band(panel, style.look(arm), frame)
        panel.set(yscale="log", xlabel=name)
        panel.set_xlim(left=0)
    for row in axes:
        row[0].set_ylabel("training loss (nats)")
    style.legend(figure)
    return figure


def draw_published(panel: matplotlib.axes.Axes, lr: float, column: str, last: float) -> None:
    """Mark what the published runs at a learning rate logged, up to the epoch `last`."""
    for arm in LOGGED:
        target = published(arm, lr, column)
        target = target[target.index <= last]
        name = f"published: {style.look(arm).label}"
        style.published(panel, style.look(arm), target.index.to_numpy(), target.to_numpy(), name)


def _draw_published(at: Mapping[float, Arms]) -> matplotlib.figure.Figure:
    figure, panels = common.panels(len(at))
    for panel, (lr, arms) in zip(panels, at.items(), strict=True):
        last = 0.0
        for arm, key in LOGGED.items():
            frame = common.curve(arms.get(arm, []), key, logs=True, whole=True)
            last = max([last, *frame.index])
            style.band(panel, style.look(arm), frame)
        draw_published(panel, lr, "train_loss_as_logged", last)
        panel.set(yscale="log", title=f"lr {lr:g}", xlabel="epochs", ylabel="training loss (nats)")
    style.legend(figure)
    return figure


def _draw_ratios(
    gain: Mapping[Currency, Sequence[Effect]], loop: Mapping[Currency, Sequence[Effect]], tolerance: float | None
) -> matplotlib.figure.Figure:
    exact, poster = style.look("bfp"), style.look("bfp_poster")
    parts = [
        ("exact: epochs and updates", gain["epochs"], exact),
        ("exact: arithmetic", gain["macs"], exact),
        ("exact: time", gain["seconds"], exact),
        ("published loop: epochs", loop["epochs"], poster),
        ("published loop: updates", loop["updates"], poster),
        ("published loop: arithmetic", loop["macs"], poster),
    ]
    figure, axes = style.canvas(3, 2, panel=(3.6, 0.6 + 0.3 * max(3, len(gain["epochs"]))))
    # Down the columns: exact Backforward left, the published loop right.
    for panel, (name, effects, of) in zip(axes.T.flat, parts, strict=True):
        rows = [(found.label, found.estimate() if found.values else None) for found in effects]
        style.forest(panel, rows, of, zero=1.0, tolerance=tolerance, form="{:.2f}")
        panel.set(title=name, xlabel="ratio to SGD", xscale="log")
        low, high = panel.get_xlim()
        panel.set_xlim(min(low, 0.45), max(high, 2.2))
        panel.xaxis.set_major_locator(LogLocator(2))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_locator(NullLocator())
    return figure


def _notes(at: Mapping[float, Arms]) -> list[str]:
    notes = []
    for lr, arms in at.items():
        missing = [style.look(arm).label for arm in ARMS if arm not in arms]
        if missing:
            notes.append(f"Not there at lr {lr:g}: {', '.join(missing)}.")
    return notes
