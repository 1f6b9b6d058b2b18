"""Does the effect of Backforward depend on learning rate and batch size?"""

from __future__ import annotations

from backforward_suite.report.experiments._experiment import Compare, Drawing, Experiment, Part, layout
from backforward_suite.report.experiments._figures import over
from backforward_suite.report.experiments._measures import EPOCHS, LOSS, TEST

EXPERIMENT = Experiment(
    "bfp_batch_size",
    "Does Backforward converge faster than SGD whatever the learning rate and the batch size?",
    Part(
        layout("method", {"lr": "lr {:g}", "batch_size": "batch {:g}"}),
        (Compare(EPOCHS, "bfp", "sgd", "faster"), Compare(LOSS, "bfp", "sgd"), Compare(TEST, "bfp", "sgd")),
        title="Backforward against SGD, by learning rate and batch size",
        note="The loss is the lowest of a fixed row of levels that all runs of both rules reach.",
        drawings=(
            Drawing(
                "epochs",
                "Epochs to a training loss, Backforward / SGD",
                "By batch size, a line for each learning rate; geometric mean of the pairs with its 95 % interval. "
                "Under 1 Backforward is faster; the grey region counts as no difference.",
                over("batch_size", "batch size", "epochs, BFP / SGD"),
            ),
        ),
    ),
    Part(
        layout("method", chosen="lr", where=lambda run: run.setting("batch_size") == 128),
        (Compare(TEST, "bfp", "sgd"),),
        title="At batch 128, each rule at the learning rate of its best validation accuracy",
        means=(LOSS, TEST),
    ),
)
