"""Findings of every kind, as the tests of the page want them."""

from __future__ import annotations

from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd

from backforward_suite.report import style
from backforward_suite.report.claims import Claim
from backforward_suite.report.finding import KINDS, Estimate, Figure, Finding, Table, Verdict
from backforward_suite.report.page import Examined, draw, stamp_of
from backforward_suite.report.reading import Run

WORD = str.maketrans(" -", "__")
HOSTILE = "<script>alert('x')</script> & |_*`[b](c)"


def claim(experiment: str, word: str, statement: str = "BFP reaches a loss of .01 in fewer epochs than SGD") -> Claim:
    return Claim(
        id=f"{experiment}.{word}",
        experiment=experiment,
        statement=statement,
        source="AAAI 2023, p. 2, Fig. 1",
        rule="direction",
        published={"sgd": 31, "bfp": 13},
        unit="epochs",
        tolerance=0.01,
        tolerance_why="A hundredth of a loss.",
        arguments={"sign": -1},
    )


def curves() -> matplotlib.figure.Figure:
    figure, axes = style.canvas(1, 2)
    looks = style.looks(["sgd", "bfp", "bfp_poster", "an arm of nobody's"])
    epochs = np.arange(1, 21)
    for k, look in enumerate(looks.values()):
        values = np.exp(-epochs / (4 + 2 * k))
        frame = pd.DataFrame({"value": values, "low": 0.8 * values, "high": 1.2 * values}, index=epochs)
        style.band(axes[0, 0], look, frame)
        style.points(axes[0, 1], look, [0.01, 0.1], [Estimate(float(k), k - 0.5, k + 0.5, 5), None])
    style.published(axes[0, 0], looks["sgd"], [1, 10], [0.7, 0.3])
    style.at_values(axes[0, 1], [0.01, 0.1])
    axes[0, 0].set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes[0, 1].set(xlabel="learning rate", ylabel="accuracy, %")
    return figure


def comparison() -> matplotlib.figure.Figure:
    figure, axes = style.canvas()
    rows = [("lr 0.1", Estimate(-0.2, -0.3, -0.1, 5)), ("lr 0.5", Estimate(0.1, None, None, 1)), ("lr 1", None)]
    style.forest(axes[0, 0], rows, style.look("bfp"), tolerance=0.05)
    axes[0, 0].set_xlabel("difference to SGD")
    return figure


def findings(root: Path) -> list[Examined]:
    """One with everything, one without claims, one not run, one that failed."""
    result = {
        "status": "finished",
        "settings": {"seed": 0},
        "data": {"name": HOSTILE, "classes": 10},
        "final": {"epoch": 20, "loss/train": 0.0123, "accuracy/validation": 0.98, "accuracy/test": 0.9812},
        "timing": {"training_seconds": 1234.5},
        "code": {"commit": "0123456789abcdef+changes", "torch": "2.13.0"},
    }
    runs = tuple(Run(root / "small" / "bfp_learning_rates" / f"bfp-lr0.1-seed{seed}", result) for seed in range(3))
    failed = Run(root / "small" / "bfp_learning_rates" / "bfp-lr9", {"status": "failed", "cause": HOSTILE})
    table = pd.DataFrame(
        [["sgd", "17", "17.2 [16.8, 17.6]"], [HOSTILE, "6", "16.9 [16.5, 17.3]"]],
        columns=["arm", "published", "ours"],
    )
    everything = Finding(
        "bfp_learning_rates",
        "Does exact Backforward reach a training loss in fewer epochs than SGD?",
        tuple(
            Verdict(claim("bfp_learning_rates", kind.translate(WORD)), kind, "-0.4 [-0.7, -0.1], 5 pairs", "So")
            for kind in KINDS
        ),
        (Table("Epochs to a training loss of .01", table, "Holm's correction over the rows."),),
        (
            Figure("bfp_learning_rates_curves", "Training loss", "Bands: 95 % intervals over seeds.", curves),
            Figure("bfp_learning_rates_forest", "Differences " + HOSTILE, "Left of zero: BFP is better.", comparison),
        ),
        (*runs, failed),
        "small",
        "2 cores of an AMD EPYC",
        ("lr 1: one of 5 seeds diverged.", HOSTILE),
    )  # fmt: skip
    nobody = Finding("bfp_depth", "How does depth change it?", (), (), (), runs[:1], "small", "2 cores of an AMD EPYC")
    not_run = Verdict(claim("np_table", "cifar10"), "not run", "", "make reproduce ONLY=np_table")
    missing = Finding("np_table", "Table 1?", (not_run,), (), (), (), "small", "")
    broken = Finding("np_speed", "How fast?", (), (), (), (), "small", "")
    return [
        Examined(everything, tuple(draw(figure, stamp_of(everything)) for figure in everything.figures)),
        Examined(nobody),
        Examined(missing),
        Examined(broken, fault="could not be examined: KeyError: 'x'"),
    ]
