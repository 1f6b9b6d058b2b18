"""Does covariate shift ask for smaller learning rates? The largest one that still trains, by update rule."""

from __future__ import annotations

from backforward_suite.report.experiments._experiment import Compare, Drawing, Experiment, Part, layout, limits
from backforward_suite.report.experiments._figures import by_lr
from backforward_suite.report.experiments._measures import LARGEST, LOSS

EXPERIMENT = Experiment(
    "bfp_max_lr",
    "Does Backforward train at larger learning rates than SGD?",
    Part(
        layout("method"),
        (Compare(LARGEST, ("bfp", "bfp_poster", "sgd_repeat"), "sgd", "larger"),),
        title="The largest learning rate that trains, against that of SGD",
        tables=limits,
        drawings=(
            Drawing(
                "by_lr",
                "Where training still works, by learning rate",
                "Above: training loss after the last epoch, median over seeds with their whole range; a diverged run "
                "counts as a guess or worse. Below: share of seeds that train (end below the loss of a guess), with "
                "its 95 % interval.",
                by_lr(LOSS, logs=True),
            ),
        ),
    ),
)
