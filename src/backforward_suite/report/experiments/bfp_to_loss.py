"""Epochs to a training loss of .01, SGD and the published loop, at every published learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backforward_suite.report.experiments._experiment import (
    Cell,
    Compare,
    Drawing,
    Effects,
    Experiment,
    Part,
    Sample,
    layout,
)
from backforward_suite.report.experiments._figures import over
from backforward_suite.report.experiments._measures import Measure, Read, curve_of
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

LEVEL = 0.01


def epochs_to(key: str) -> Read:
    """Reads the first epoch whose loss is at most `LEVEL`; None where it never is."""

    def read(run: Run) -> float | None:
        curve = curve_of(run, key if len(run.curve(key)) else "loss/train")
        reached = curve.index[curve <= LEVEL]
        return float(reached[0]) if len(reached) else None

    return read


AS_LOGGED = Measure("epochs to a logged loss of .01", epochs_to("loss/train_joint"), ratio=True)
BEFORE_UPDATES = Measure("epochs to a loss of .01, before a batch's updates", epochs_to("loss/train"), ratio=True)


def shares(cells: Sequence[Cell]) -> list[Effect]:
    """The loop's epochs over SGD's; the published protocol is that of runs on all 60,000 images in batches of 128."""
    rows = []
    for cell in cells:
        ours, theirs = cell.arms.get("bfp_poster", []), cell.arms.get("sgd", [])
        whole = all(
            (run.result.get("data", {}).get("train"), run.setting("batch_size"), run.setting("stop_loss"))
            == (60_000, 128, LEVEL)
            for run in [*ours, *theirs]
        )
        rows.append(replace(AS_LOGGED.compare(ours, theirs, cell.label), protocol=whole))
    return rows


EXPERIMENT = Experiment(
    "bfp_to_loss",
    "How many epochs do SGD and the published loop need to a training loss of .01?",
    Part(
        layout("method", {"lr": "lr {:g}"}),
        (
            Effects("epochs to a logged loss of .01, published loop / SGD", shares, "shares"),
            Compare(BEFORE_UPDATES, "bfp_poster", "sgd"),
            Sample(AS_LOGGED),
        ),
        title="Epochs to a training loss of .01",
        note="Logged is of the loop what its authors logged: the loss of the joint pass, after the single updates.",
        means=(AS_LOGGED, BEFORE_UPDATES),
        drawings=(
            Drawing(
                "ratio",
                "The published loop's share of SGD's epochs",
                "Epochs to a logged training loss of .01; geometric mean of the pairs with its 95 % interval.",
                over("lr", "learning rate", "epochs, loop / SGD"),
            ),
        ),
    ),
    notes=("Settings and the tolerance were committed before the runs, in 62654bd.",),
)
