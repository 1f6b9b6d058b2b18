"""NormProp 4.2-4.4: one change at a time from the paper's recipe."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import matplotlib.figure

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.experiments import _normprop as family
from backforward_suite.report.finding import Figure, Finding, Table, Verdict
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

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
    ended = common.done(runs)
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
    shown = [effect for effect in effects if effect.values]
    ground = verdicts.Ground.of(runs, scale, () if recipe else ["the recipe itself"])

    def judge(claim: Claim) -> Verdict:
        # All changes are one table: a claim names its rows of it.
        return verdicts.direction(claim, batches if claim.word == "batch_lr" else shown, ground)

    tolerance = max((claim.tolerance for claim in claims if claim.tolerance is not None), default=None)
    return common.finding(
        "np_recipe", QUESTION, runs, claims, scale,
        [judge(claim) for claim in claims],
        tables=[
            _table(recipe),
            _batch_table(ended),
            common.effects_table("Each change less the recipe, test accuracy, points", shown, "change"),
            common.effects_table(
                "What a larger learning rate gains at the larger less at the smaller batch, test accuracy, points",
                batches, "batch size and learning rate",
            ),
        ],
        figures=[
            Figure(
                "np_recipe_changes",
                "What each change does to test accuracy",
                "Difference to the recipe (batch 50, lr .05 halved, weight decay 5e-4, no dropout, shuffled) at the "
                "same seed, 95 % intervals, not corrected as the verdicts are. Right of zero: the "
                "change helps.",
                lambda: _draw(shown, tolerance),
            )
        ],
    )  # fmt: skip


def _with(runs: Sequence[Run], **changes: object) -> list[Run]:
    """The runs of the recipe with some keys changed."""
    return common.done(runs, **{key.replace(".", "__"): value for key, value in RECIPE.items()} | changes)


def _changed(runs: Sequence[Run], recipe: Sequence[Run], label: str, **change: object) -> Effect:
    """A change less the recipe."""
    return common.points(_with(runs, **change), recipe, "accuracy/test", label)


def _batch_effects(runs: Sequence[Run]) -> list[Effect]:
    """At each larger batch, what a larger learning rate gains there less what it gains at the recipe's batch.

    A larger rate that is better at every batch size says nothing of the batch.
    """
    small, low = RECIPE["batch_size"], RECIPE["lr"]
    cells = _by_batch_and_lr(runs)
    gains = {
        (size, lr): _gain(members, cells[size, low]) for (size, lr), members in cells.items() if (size, low) in cells
    }
    return [
        statistics.paired(gain, gains[small, lr], f"batch {size} - {small}: lr {lr} - {low}", unit="points")
        for (size, lr), gain in gains.items()
        if size != small and lr != low and (small, lr) in gains
    ]


def _gain(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[Hashable, float | None]:
    """By how many points ours are better, by seed."""
    one, other = (statistics.by_seed(arm, family.test_accuracy) for arm in (ours, theirs))
    return {
        seed: None if accuracy is None or (beside := other.get(seed)) is None else accuracy - beside
        for seed, accuracy in one.items()
    }


def _by_batch_and_lr(runs: Sequence[Run]) -> dict[tuple[object, ...], list[Run]]:
    """The recipe at any batch size and learning rate."""
    fixed = {key.replace(".", "__"): value for key, value in RECIPE.items() if key not in ("batch_size", "lr")}
    return statistics.grouped(common.done(runs, **fixed), "batch_size", "lr")


def _table(recipe: Sequence[Run]) -> Table:
    row = {
        "setting": "the recipe",
        "seeds": len(recipe),
        "validation accuracy, %": common.estimate_of(recipe, family.validation_accuracy),
        "test accuracy, %": common.estimate_of(recipe, family.test_accuracy),
    }
    return common.table("The recipe", [row], "Mean over seeds with 95 % interval.")


def _batch_table(runs: Sequence[Run]) -> Table:
    rows = [
        {
            "batch size": size,
            "lr": lr,
            "seeds": len(members),
            "validation accuracy, %": common.estimate_of(members, family.validation_accuracy),
            "test accuracy, %": common.estimate_of(members, family.test_accuracy),
        }
        for (size, lr), members in _by_batch_and_lr(runs).items()
    ]
    return common.table("By batch size and learning rate", rows, "Means over seeds with 95 % intervals.")


def _draw(effects: Sequence[Effect], tolerance: float | None) -> matplotlib.figure.Figure:
    figure, panels = style.canvas(panel=(4.4, 0.8 + 0.38 * len(effects)))
    rows = [(effect.label, effect.estimate()) for effect in effects]
    style.forest(panels[0, 0], rows, style.look("prop"), tolerance=tolerance, form="{:+.2f}")
    panels[0, 0].set_xlabel("difference of test accuracy to the recipe, points")
    return figure
