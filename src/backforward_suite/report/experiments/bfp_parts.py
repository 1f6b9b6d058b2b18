"""What of Backforward's change makes the difference: order, direction, length, or its size?"""

from __future__ import annotations

import matplotlib.figure

from backforward_suite.report import style
from backforward_suite.report.experiments._experiment import Compare, Data, Drawing, Experiment, Part, layout
from backforward_suite.report.experiments._measures import LOSS
from backforward_suite.report.reading import Run

NAMES = {
    "bfp_reverse": "BFP, last layer first",
    "bfp_random": "BFP, in random order",
    "fresh_direction": "BFP's direction, SGD's length",
    "fresh_length": "SGD's direction, BFP's length",
    "shift_noise": "SGD, noise as large as the shift",
    "dose -1": "dose -1: the shift twice",
    "dose 0.5": "dose .5: half of it removed",
    "dose 1.5": "dose 1.5",
    "dose 2": "dose 2: corrected twice",
    "head": "SGD, the head's rate x 3",
}


def arm(run: Run) -> str:
    """The rule; of doses how much; of SGD whether the head has a rate of its own."""
    method = run.choice("method")
    if method == "dose":
        return f"dose {run.setting('method.dose'):g}"
    return "head" if method == "sgd" and run.setting("head_lr") is not None else method


def below_sgd(data: Data) -> matplotlib.figure.Figure:
    """Each arm's training loss over SGD's, a marker for each rate."""
    rows = {effect.label: effect.estimate() for effect in data.effects[0] if effect.values}
    arms = [key for key in ("bfp", *NAMES) if any(label.endswith(f", {_name(key)}") for label in rows)]
    figure, axes = style.canvas(panel=(3.6, 0.8 + 0.34 * max(1, len(arms))))
    panel = axes[0, 0]
    panel.axvline(1, color="0.35", linewidth=0.9)
    for k, (cell, look) in enumerate(
        zip(data.cells, style.sequence([c.label for c in data.cells]).values(), strict=True)
    ):
        for place, key in enumerate(reversed(arms)):
            found = rows.get(f"{cell.label}, {_name(key)}")
            if found is not None and found.value is not None:
                at = place + 0.22 * (k - (len(data.cells) - 1) / 2)
                style.interval(panel, look, at, found, upright=False, label=look.label)
    panel.set_yticks(range(len(arms)), [_name(key) for key in reversed(arms)])
    panel.set(xscale="log", xlabel="training loss / that of SGD at the same rate")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.grid(visible=False, axis="y")
    style.legend(figure)
    return figure


def _name(key: str) -> str:
    return NAMES.get(key) or style.look(key).label


EXPERIMENT = Experiment(
    "bfp_parts",
    "What of Backforward's change makes the difference to SGD: its order, its direction, or its length?",
    Part(
        layout(arm, {"lr": "lr {:g}"}),
        (Compare(LOSS, lambda _: True, "sgd"),),
        title="Against SGD",
        names=NAMES,
        note="Under 1: a lower training loss. dose a: each layer steps along g + a (g' - g), g its gradient before the "
        "batch and g' the one that it faces; SGD is dose 0, exact BFP dose 1.",
        means=(LOSS,),
        drawings=(
            Drawing(
                "arms",
                "One thing changed at a time",
                "Training loss after the last epoch over that of SGD at the same learning rate, geometric mean of the "
                "pairs with 95 % intervals. Left of 1: lower than SGD.",
                below_sgd,
            ),
        ),
    ),
    Part(
        layout(arm, {"lr": "lr {:g}"}),
        (
            Compare(LOSS, "bfp_reverse", "bfp", "order"),
            Compare(LOSS, "fresh_direction", "sgd", "direction"),
            Compare(LOSS, "fresh_length", "sgd", "length"),
            Compare(LOSS, "dose 2", "bfp", "overcorrected"),
            Compare(LOSS, "shift_noise", "sgd", "noise"),
            Compare(LOSS, "head", "bfp", "head"),
        ),
        title="One arm against another",
        names=NAMES,
    ),
    notes=("Arms, settings and tolerances were committed before the runs, in bc30810.",),
)
