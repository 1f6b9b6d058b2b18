"""What the experiments share in which the update rule changes at some epoch."""

from __future__ import annotations

from collections.abc import Callable

from backforward_suite.report.experiments._experiment import Compare, Drawing, Experiment, Part, layout
from backforward_suite.report.experiments._figures import ratios
from backforward_suite.report.experiments._measures import LOSS, SPENT, TEST
from backforward_suite.report.reading import Run


def switching(name: str, question: str, form: str, word: str) -> Experiment:
    """Training that changes its rule, against SGD throughout; Backforward throughout stands beside.

    Args:
        name: Of the experiment, and of the rule that changes.
        question: What it asks.
        form: What an arm is called, given the epoch at which it changes.
        word: The question that it answers.
    """

    def arm(run: Run) -> str:
        method = run.choice("method")
        return form.format(run.setting("method.at_epoch")) if method == name else method

    changes: Callable[[str], bool] = lambda arm: arm not in ("sgd", "bfp")  # noqa: E731
    return Experiment(
        name,
        question,
        Part(
            layout(arm),
            (
                Compare(LOSS, changes, "sgd", word),
                Compare(LOSS, lambda _: True, "sgd"),
                Compare(TEST, lambda _: True, "sgd"),
                Compare(SPENT, lambda _: True, "sgd"),
            ),
            title="Against SGD throughout",
            names={"sgd": "SGD throughout", "bfp": "BFP throughout"},
            means=(LOSS, TEST),
            drawings=(
                Drawing(
                    "ratio",
                    "Training loss / that of SGD throughout, epoch by epoch",
                    "Geometric mean of the pairs with its pointwise 95 % t interval; under 1 it is below SGD's. Dotted "
                    "lines: the epochs after which a rule changes.",
                    ratios("sgd", "training loss / SGD", changes="method.at_epoch"),
                ),
            ),
        ),
    )
