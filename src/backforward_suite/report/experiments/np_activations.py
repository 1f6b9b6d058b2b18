"""NormProp 4.6: other activations than ReLU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.figure

from backforward_suite.report import style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.experiments import _normprop as family
from backforward_suite.report.finding import Figure, Finding, Table
from backforward_suite.report.reading import Run

QUESTION = "Does NormProp help with PReLU, Tanh and ELU as it does with ReLU?"
Arms = Mapping[str, Mapping[str, Sequence[Run]]]  # by activation and norm


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare NormProp with no normalisation, each at its learning rate; of several, validation chose."""
    ended = common.done(runs)
    arms = {
        str(name): {norm: family.chosen(common.done(ended, model__activation=name, norm=norm)) for norm in family.NORMS}
        for name in family.values(ended, "model.activation")
    }
    effects = {name: common.points(by["prop"], by["none"], "accuracy/test", name) for name, by in arms.items()}
    ground = verdicts.Ground.of(runs, scale)
    return common.finding(
        "np_activations", QUESTION, runs, claims, scale,
        [verdicts.direction(claim, list(effects.values()), ground) for claim in claims],
        tables=[
            _table(arms),
            common.effects_table(
                "NormProp less no norm, test accuracy, points", list(effects.values()), "activation",
                "ReLU is shown beside the three that the claim names.",
            ),
        ],
        figures=[
            Figure(
                "np_activations_accuracy",
                "Test accuracy by activation",
                "Means over seeds with 95 % intervals; a diverged run counts as a guess.",
                lambda: _draw(arms),
            )
        ],
    )  # fmt: skip


def _table(arms: Arms) -> Table:
    rows = [
        {
            "activation": name,
            "norm": style.look(norm).label,
            "lr": ", ".join(map(str, family.values(runs, "lr"))),
            "seeds": len(runs),
            "diverged": str(sum(run.status == "diverged" for run in runs)),
            "validation accuracy, %": common.estimate_of(runs, family.validation_accuracy),
            "test accuracy, %": common.estimate_of(runs, family.test_accuracy),
        }
        for name, by in arms.items()
        for norm, runs in by.items()
        if runs
    ]
    note = "Means over seeds with 95 % intervals, at the learning rate shown; of several, validation accuracy chose."
    return common.table("Accuracy by activation", rows, note)


def _draw(arms: Arms) -> matplotlib.figure.Figure:
    figure, panels = style.canvas()
    norms = [norm for norm in family.NORMS if any(by[norm] for by in arms.values())]
    estimates = {norm: [common.estimate_of(by[norm], family.test_accuracy) for by in arms.values()] for norm in norms}
    style.bars(panels[0, 0], list(arms), estimates, style.looks(norms))
    panels[0, 0].set_ylabel("test accuracy, %")
    style.legend(figure)
    return figure
