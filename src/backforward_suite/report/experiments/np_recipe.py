"""NormProp 4.2-4.4: one change at a time from the paper's recipe."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from backforward_suite.report import statistics
from backforward_suite.report.experiments._experiment import (
    Cell,
    Compare,
    Drawing,
    Effects,
    Experiment,
    Part,
    layout,
    setting,
)
from backforward_suite.report.experiments._figures import forest
from backforward_suite.report.experiments._measures import TEST, VALIDATION, Runs
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

RECIPE: Mapping[str, object] = {
    "batch_size": 50,
    "lr": 0.05,
    "weight_decay": 5e-4,
    "model.dropout": 0.0,
    "data.shuffle": True,
    "schedule": "halve",
}
CHANGES: Mapping[str, str] = {
    "weight_decay": "weight decay {:g}",
    "model.dropout": "dropout {}",
    "data.shuffle": "not shuffled",
    "schedule": "{} lr",
}


def changed(run: Run) -> list[str]:
    """The keys in which a run differs from the recipe."""
    return [key for key, usual in RECIPE.items() if setting(run, key) not in (usual, None)]


def change(run: Run) -> str | None:
    """What a run changes of the recipe, in words; None of more than one change, or of batch size and rate."""
    keys = changed(run)
    if not keys:
        return "the recipe"
    if len(keys) > 1 or keys[0] not in CHANGES:
        return None
    value = setting(run, keys[0])
    return "no weight decay" if keys == ["weight_decay"] and not value else CHANGES[keys[0]].format(value)


def batch_and_lr(run: Run) -> str | None:
    """Such as `batch 100, lr 0.08`, of a run that is otherwise the recipe's."""
    if set(changed(run)) - {"batch_size", "lr"}:
        return None
    return f"batch {run.setting('batch_size')}, lr {run.setting('lr'):g}"


def rate_by_batch(cells: Sequence[Cell]) -> list[Effect]:
    """At each larger batch, what a larger learning rate gains there less what it gains at the recipe's batch.

    A larger rate that is better at every batch size says nothing of the batch.
    """
    by_setting = {
        (members[0].setting("batch_size"), members[0].setting("lr")): members
        for cell in cells
        for members in cell.arms.values()
    }
    small, low = RECIPE["batch_size"], RECIPE["lr"]
    gains = {
        (size, lr): _gain(members, by_setting[size, low])
        for (size, lr), members in by_setting.items()
        if (size, low) in by_setting and lr != low
    }
    return [
        statistics.paired(gain, gains[small, lr], f"lr {lr:g} - {low:g}, batch {size} - {small}", unit="points")
        for (size, lr), gain in gains.items()
        if size != small and (small, lr) in gains
    ]


def _gain(ours: Runs, theirs: Runs) -> dict[Hashable, float | None]:
    """By how many points ours are better, by seed."""
    one, other = (statistics.by_seed(arm, TEST.read) for arm in (ours, theirs))
    return {
        seed: None if accuracy is None or (beside := other.get(seed)) is None else accuracy - beside
        for seed, accuracy in one.items()
    }


def normprop(run: Run) -> bool:
    """Whether it is one of NormProp; those of BatchNorm answer a claim of their own."""
    return run.choice("norm") in ("prop", "")


EXPERIMENT = Experiment(
    "np_recipe",
    "Which parts of NormProp's recipe matter: weight decay, no dropout, shuffling, halving, lr by batch size?",
    Part(
        layout(change, where=normprop),
        (Compare(TEST, lambda _: True, "the recipe", "weight_decay dropout shuffling halving"),),
        title="Each change against the recipe",
        note="Under 0: the change harms, so that what the recipe has in its place helps.",
        means=(VALIDATION, TEST),
        drawings=(
            Drawing(
                "changes",
                "What each change does to test accuracy",
                "Difference to the recipe (batch 50, lr .05 halved, weight decay 5e-4, no dropout, shuffled) at the "
                "same seed, with 95 % intervals. Right of zero: the change helps.",
                forest("test accuracy, change - recipe, points"),
            ),
        ),
    ),
    Part(
        layout(change, where=lambda run: run.choice("norm") == "batch"),
        (Compare(TEST, lambda arm: arm.startswith("dropout"), "the recipe", "dropout_batchnorm"),),
        title="Dropout under BatchNorm, against the recipe",
        means=(TEST,),
    ),
    Part(
        layout(batch_and_lr, where=normprop),
        (
            Effects(
                "points of test accuracy that a larger rate gains, larger - smaller batch", rate_by_batch, "batch_lr"
            ),
        ),
        title="What a larger learning rate gains at the larger batch less at the smaller",
        means=(VALIDATION, TEST),
    ),
)
