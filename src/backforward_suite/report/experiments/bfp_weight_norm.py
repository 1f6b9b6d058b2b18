"""Is the norm of the weights larger without covariate shift, and does that cost generalisation?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import matplotlib.figure
import numpy as np

from backforward_suite.report import statistics, style
from backforward_suite.report.experiments._experiment import Compare, Data, Drawing, Experiment, Part
from backforward_suite.report.experiments._figures import curve, curves, panels
from backforward_suite.report.experiments._measures import Measure, Read, Runs, common_level, ratio
from backforward_suite.report.experiments.bfp_learning_rates import arms_by_lr, draw_published
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

SUM, L2 = "weight_norm/sum", "weight_norm/total"  # the sum of the tensors' norms: what the published logs have


def finished(read: Read) -> Read:
    """Reads nothing of a diverged run, whose weights do not count."""
    return lambda run: None if run.status == "diverged" else read(run)


def gap(run: Run) -> float | None:
    """Test less training loss after the last epoch, nats. The training loss is the mean over that epoch."""
    test, train = run.final("loss/test"), run.final("loss/train")
    return None if test is None or train is None else test - train


def norm_at(run: Run, level: float) -> float | None:
    """The norm where the training loss first was at a level, on the straight line between epochs."""
    epochs, norms = statistics.cost_of(run, level), run.curve(SUM)
    return None if epochs is None or not len(norms) else float(np.interp(epochs, norms.index, norms))


def at_equal_loss(ours: Runs, theirs: Runs, label: str) -> Effect:
    """Ratio of norms at the lowest training loss that both arms reach."""
    level = common_level([*ours, *theirs]) if ours and theirs else None
    if level is None:
        return Effect(label, (), ratio=True, note="no loss that all runs reach" if ours and theirs else "")
    return replace(ratio(ours, theirs, label, partial(norm_at, level=level)), note=f"at a training loss of {level:g}")


NORM = Measure("norm of the weights", finished(lambda run: run.final(SUM)), ratio=True)
NORM_L2 = Measure("L2 norm of all parameters", finished(lambda run: run.final(L2)), ratio=True)
AT_LOSS = Measure("norm at equal training loss", lambda _: None, ratio=True, versus=at_equal_loss)
GAP = Measure("gap, test less training loss", finished(gap), "nats", points="nats")
RELATIVE_GAP = replace(GAP, ratio=True, points="")


def against_loss(data: Data) -> matplotlib.figure.Figure:
    """Norm over training loss, a panel for each learning rate."""
    figure, axes = panels(len(data.cells))
    for panel, cell in zip(axes, data.cells, strict=True):
        for arm, runs in cell.arms.items():
            if arm == "sgd_2lr" and cell.row["lr"] >= 0.5:
                continue  # its norms, of 100 to 1,000, would press the others flat
            losses, norms = curve(runs, "loss/train", logs=True), curve(runs, SUM)
            if losses.empty or norms.empty:
                continue
            # A mean over an epoch stands beside the norm in its middle.
            between, of = np.interp(losses.index, norms.index, norms["value"]), style.look(arm)
            panel.plot(losses["value"], between, marker=of.marker, markersize=3, label=of.label, **of.line)
        panel.set(title=cell.label, xscale="log")
        style.few_ticks(panel)
        panel.invert_xaxis()
    for panel in axes[::2]:
        panel.set_ylabel("norm of the weights")
    for panel in axes[-2:]:
        panel.set_xlabel("training loss (nats)")
    style.legend(figure)
    return figure


EXPERIMENT = Experiment(
    "bfp_weight_norm",
    "Is the norm of the weights larger without covariate shift, and the gap between test and training loss with it?",
    Part(
        arms_by_lr,
        (
            Compare(NORM, "bfp", "sgd", "larger"),
            Compare(NORM_L2, "bfp", "sgd", "larger_l2"),
            Compare(AT_LOSS, "bfp", "sgd", "at_equal_loss"),
            Compare(AT_LOSS, "bfp", "sgd_repeat", "its_cause"),
            Compare(AT_LOSS, "sgd_repeat", "sgd"),
            Compare(AT_LOSS, "sgd_2lr", "sgd"),
            Compare(NORM, "bfp_poster", "sgd"),
        ),
        title="Norm of the weights",
        note="Sum of the norms of the four tensors, but for the L2 norm of all parameters. A diverged run has none.",
        drawings=(
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
                    beside=lambda panel, cell: draw_published(panel, float(cell.row["lr"]), "weight_norm"),
                ),
            ),
            Drawing(
                "loss",
                "Norm of the weights against training loss",
                "The same norms where training stands equally far. Arms on one line differ in progress alone. Mean "
                "over seeds, epoch by epoch; training goes from left to right. SGD at twice the rate is left out at "
                "lr 0.5 and 1, where its norm is several times that of all others.",
                against_loss,
            ),
        ),
    ),
    Part(
        arms_by_lr,
        (
            Compare(GAP, "bfp", "sgd", "regularising"),
            Compare(RELATIVE_GAP, "bfp", "sgd"),
            Compare(GAP, "bfp_poster", "sgd"),
            Compare(GAP, "sgd_repeat", "sgd"),
        ),
        title="Generalisation gap after the last epoch",
        means=(GAP,),
    ),
)
