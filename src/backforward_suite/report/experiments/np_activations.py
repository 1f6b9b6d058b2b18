"""NormProp 4.6: other activations than ReLU."""

from __future__ import annotations

from backforward_suite.report.experiments._experiment import Compare, Drawing, Experiment, Part, layout
from backforward_suite.report.experiments._figures import reached
from backforward_suite.report.experiments._measures import TEST, VALIDATION

ACTIVATIONS = {"relu": "ReLU", "prelu": "PReLU", "tanh": "Tanh", "sigmoid": "Sigmoid", "elu": "ELU"}

EXPERIMENT = Experiment(
    "np_activations",
    "Does NormProp help with PReLU, Tanh and Sigmoid as it does with ReLU?",
    Part(
        layout("norm", {"model.activation": ACTIVATIONS}, chosen="lr"),
        (Compare(TEST, "prop", "none", "trains"), Compare(TEST, "prop", "batch")),
        title="NormProp against no norm, by activation",
        note="ReLU and ELU, of which the paper's section says nothing, stand beside.",
        means=(VALIDATION, TEST),
        drawings=(
            Drawing(
                "accuracy",
                "Test accuracy by activation",
                "Means over seeds with 95 % intervals; a diverged run counts as a guess.",
                reached(TEST),
            ),
        ),
    ),
)
