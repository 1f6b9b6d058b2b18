"""NormProp 4.2-4.4: one change at a time from the paper's recipe."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.figure
import pandas as pd

from backforward.report import style, verdicts
from backforward.report.claims import Claim
from backforward.report.experiments import _common as common
from backforward.report.experiments import _normprop as family
from backforward.report.finding import Figure, Finding, Table
from backforward.report.reading import Run
from backforward.report.statistics import Effect

QUESTION = "Which parts of NormProp's recipe matter: weight decay, no dropout, shuffling, halving, lr by batch size?"
RECIPE = {
    "batch_size": 50,
    "lr": 0.05,
    "weight_decay": 5e-4,
    "model.dropout": 0.0,
    "data.shuffle": True,
    "schedule": "halve",
}


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare test accuracy with the recipe's."""
    ended = family.done(runs)
    recipe = _with(ended)
    decays = [float(str(value)) for value in family.values(ended, "weight_decay") if value not in (0, 5e-4)]
    dropouts = [value for value in family.values(ended, "model.dropout") if value]
    no_decay = _changed(ended, recipe, "no weight decay", weight_decay=0.0)
    others = [_changed(ended, recipe, f"weight decay {value:g}", weight_decay=value) for value in decays]
    dropped = [_changed(ended, recipe, f"dropout {value}", model__dropout=value) for value in dropouts]
    unshuffled = _changed(ended, recipe, "not shuffled", data__shuffle=False)
    constant = _changed(ended, recipe, "constant lr", schedule="constant")
    batches = _batch_effects(ended)
    effects = [no_decay, *others, *dropped, unshuffled, constant]
    lacking = [effect.label for effect in (no_decay, unshuffled, constant) if not effect.values]
    ground = verdicts.Ground.of(runs, scale, lacking if recipe else ["the recipe itself"])
    judged = {
        "weight_decay": lambda claim: verdicts.direction(claim, [_against(no_decay)], ground),
        "dropout": lambda claim: verdicts.direction(claim, dropped, ground),
        "shuffling": lambda claim: verdicts.direction(claim, [_against(unshuffled)], ground),
        "halving": lambda claim: verdicts.direction(claim, [_against(constant)], ground),
        "batch_lr": lambda claim: verdicts.direction(claim, batches, ground),
    }
    shown = [effect for effect in effects if effect.values]
    return common.finding(
        "np_recipe", QUESTION, runs, claims, scale,
        [judged[word](claim) for word, claim in common.by_word(claims).items()],
        tables=[
            _table(recipe),
            family.effects_table("Each change less the recipe, test accuracy, points", shown, "change"),
            family.effects_table("Larger less smaller learning rate, test accuracy, points", batches, "batch size"),
        ],
        figures=[
            Figure(
                "np_recipe_changes",
                "What each change does to test accuracy",
                "Difference to the recipe (batch 50, lr .05 halved, weight decay 5e-4, no dropout, shuffled) at the "
                "same seed, 95 % intervals. Right of zero: the change helps.",
                lambda: _draw(shown),
            )
        ],
    )  # fmt: skip


def _with(runs: Sequence[Run], **changes: object) -> list[Run]:
    """The runs of the recipe with some keys changed."""
    return family.done(runs, **{key.replace(".", "__"): value for key, value in RECIPE.items()} | changes)


def _changed(runs: Sequence[Run], recipe: Sequence[Run], label: str, **change: object) -> Effect:
    """A change less the recipe."""
    return family.difference(_with(runs, **change), recipe, family.test_accuracy, label)


def _against(effect: Effect) -> Effect:
    """The recipe less the change: what the paper claims to help."""
    return Effect(f"recipe - {effect.label}", tuple(-value for value in effect.values), False, effect.unit, effect.lost)


def _batch_effects(runs: Sequence[Run]) -> list[Effect]:
    """At each larger batch: the paper's larger learning rate less that of batch 50."""
    effects = []
    for size, members in family.runs_by(_with_any_batch(runs), "batch_size").items():
        by_lr = family.runs_by(members, "lr")
        if size == RECIPE["batch_size"] or RECIPE["lr"] not in by_lr:
            continue
        for lr in by_lr:
            if lr != RECIPE["lr"]:
                label = f"batch {size}: lr {lr} - {RECIPE['lr']}"
                effects.append(family.difference(by_lr[lr], by_lr[RECIPE["lr"]], family.test_accuracy, label))
    return effects


def _with_any_batch(runs: Sequence[Run]) -> list[Run]:
    fixed = {key.replace(".", "__"): value for key, value in RECIPE.items() if key not in ("batch_size", "lr")}
    return family.done(runs, **fixed)


def _table(recipe: Sequence[Run]) -> Table:
    row = {
        "setting": "the recipe",
        "seeds": str(len(recipe)),
        "validation accuracy, %": family.described(family.over_seeds(recipe, family.validation_accuracy)),
        "test accuracy, %": family.described(family.over_seeds(recipe, family.test_accuracy)),
    }
    return Table("The recipe", pd.DataFrame([row]), "Mean over seeds with 95 % interval.")


def _draw(effects: Sequence[Effect]) -> matplotlib.figure.Figure:
    figure, panels = style.canvas(panel=(4.4, 0.8 + 0.38 * len(effects)))
    rows = [(effect.label, effect.estimate()) for effect in effects]
    style.forest(panels[0, 0], rows, style.look("prop"), tolerance=0.2, form="{:+.2f}")
    panels[0, 0].set_xlabel("difference of test accuracy to the recipe, points")
    return figure
