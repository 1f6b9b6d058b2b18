"""What else is asked of Backforward on an MLP: by batch size, rate, schedule, depth, and when it is used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

from backforward_suite.report import statistics
from backforward_suite.report.experiments._experiment import (
    Cell,
    Compare,
    Drawing,
    Effects,
    Experiment,
    Part,
    Sample,
    layout,
)
from backforward_suite.report.experiments._figures import by_lr, curves, limits, over, ratios
from backforward_suite.report.experiments._measures import (
    EPOCHS,
    LARGEST,
    LOSS,
    SPENT,
    TEST,
    Measure,
    Read,
    curve_of,
)
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

SCHEDULES = {"constant": "constant rate", "halve": "rate halved every few epochs", "cosine": "cosine to zero"}
LEVEL = 0.01  # the training loss of `bfp_to_loss`


# --- the lead in training loss ---------------------------------------------------------------------------------------


def lead(cell: Cell, share: float = 1.0) -> Mapping[Hashable, float | None]:
    """For each seed, training loss of Backforward over that of SGD after a share of the epochs."""

    def read(run: Run) -> float | None:
        if share == 1:
            return run.final("loss/train")  # a diverged run counts as a guess
        curve = curve_of(run, "loss/train")
        return float(curve.iloc[max(0, round(share * len(curve)) - 1)]) if len(curve) else None

    ours, theirs = (statistics.by_seed(cell.arms.get(rule, []), read) for rule in ("bfp", "sgd"))
    return {seed: one / other if one and (other := theirs.get(seed)) else None for seed, one in ours.items()}


def _later(cells: Sequence[Cell]) -> list[Effect]:
    return [statistics.paired(lead(cell), lead(cell, 0.5), cell.label, ratio=True) for cell in cells]


def _under_decay(cells: Sequence[Cell]) -> list[Effect]:
    constant = [cell for cell in cells if cell.row["schedule"] == "constant"]
    return [
        statistics.paired(lead(cell), lead(base), cell.label, ratio=True)
        for base in constant
        for cell in cells
        if cell is not base
    ]


def _deeper(depth: int, shallow: int) -> Callable[[Sequence[Cell]], list[Effect]]:
    def effects(cells: Sequence[Cell]) -> list[Effect]:
        at = {(cell.row["lr"], cell.row["model.depth"]): cell for cell in cells}
        return [
            statistics.paired(lead(cell), lead(at[lr, shallow]), f"lr {lr:g}", ratio=True)
            for (lr, layers), cell in at.items()
            if layers == depth and (lr, shallow) in at
        ]

    return effects


# --- epochs to a loss ------------------------------------------------------------------------------------------------


def _epochs_to(key: str) -> Read:
    """Reads the first epoch whose loss is at most `LEVEL`; None if it never is."""

    def read(run: Run) -> float | None:
        curve = curve_of(run, key if len(run.curve(key)) else "loss/train")
        reached = curve.index[curve <= LEVEL]
        return float(reached[0]) if len(reached) else None

    return read


AS_LOGGED = Measure("epochs to a logged loss of .01", _epochs_to("loss/train_joint"), ratio=True)
BEFORE_UPDATES = Measure("epochs to a loss of .01, before a batch's updates", _epochs_to("loss/train"), ratio=True)


def _published_share(cells: Sequence[Cell]) -> list[Effect]:
    """The loop's epochs over SGD's; runs on all 60,000 images in batches of 128 follow the published protocol."""
    rows = []
    for cell in cells:
        ours, theirs = cell.arms.get("bfp_poster", []), cell.arms.get("sgd", [])
        whole = all(
            (run.result.get("data", {}).get("train"), run.setting("batch_size"), run.setting("stop_loss"))
            == (60_000, 128, LEVEL)
            for run in [*ours, *theirs]
        )
        rows.append(replace(AS_LOGGED.compare(ours, theirs, cell.label), protocol=whole))
    return rows


# --- a rule that changes ---------------------------------------------------------------------------------------------


def _switching(name: str, question: str, form: str, word: str) -> Experiment:
    """Training that changes its rule, against SGD throughout; Backforward throughout is shown too.

    Args:
        name: Of the experiment, and of the rule that changes.
        question: What it asks.
        form: The name of an arm, given the epoch at which it changes.
        word: The question that it answers.
    """

    def arm(run: Run) -> str:
        method = run.choice("method")
        return form.format(run.setting("method.at_epoch")) if method == name else method

    return Experiment(
        name,
        question,
        Part(
            layout(arm),
            Compare(LOSS, lambda arm: arm not in ("sgd", "bfp"), "sgd", word),
            Compare(LOSS, lambda _: True, "sgd"),
            Compare(TEST, lambda _: True, "sgd"),
            Compare(SPENT, lambda _: True, "sgd"),
            Drawing(
                "ratio",
                "Training loss relative to SGD throughout, epoch by epoch",
                "Geometric mean of the pairs with its pointwise 95 % t interval; under 1 it is below SGD's. Dotted "
                "lines: the epochs after which a rule changes.",
                ratios("sgd", "training loss / SGD", changes="method.at_epoch"),
            ),
            title="Against SGD throughout",
            names={"sgd": "SGD throughout", "bfp": "BFP throughout"},
            means=(LOSS, TEST),
        ),
    )


BY_DEPTH = layout("method", {"lr": "lr {:g}", "model.depth": "depth {}"})
BY_LEAD = "BFP / SGD in training loss, "
EXPERIMENTS = (
    Experiment(
        "bfp_batch_size",
        "Does Backforward converge faster than SGD at every learning rate and batch size?",
        Part(
            layout("method", {"lr": "lr {:g}", "batch_size": "batch {:g}"}),
            Compare(EPOCHS, "bfp", "sgd", "faster"),
            Compare(LOSS, "bfp", "sgd"),
            Compare(TEST, "bfp", "sgd"),
            Drawing(
                "epochs",
                "Epochs to a training loss, Backforward / SGD",
                "By batch size, a line for each learning rate; geometric mean of the pairs with its 95 % interval. "
                "Under 1 Backforward is faster; the grey region counts as no difference.",
                over("batch_size", "batch size", "epochs, BFP / SGD"),
            ),
            title="Backforward against SGD, by learning rate and batch size",
            note="The loss is the lowest of a fixed series of levels that all runs of both rules reach.",
        ),
        Part(
            layout("method", chosen="lr", where=lambda run: run.setting("batch_size") == 128),
            Compare(TEST, "bfp", "sgd"),
            title="At batch 128, each rule at the learning rate of its best validation accuracy",
            means=(LOSS, TEST),
        ),
    ),
    Experiment(
        "bfp_max_lr",
        "Does Backforward train at larger learning rates than SGD?",
        Part(
            layout("method"),
            Compare(LARGEST, ("bfp", "bfp_poster", "sgd_repeat"), "sgd", "larger"),
            Drawing(
                "by_lr",
                "Up to which learning rate training works",
                "Above: training loss after the last epoch, median over seeds with their whole range; a diverged run "
                "counts as a guess or worse. Below: share of seeds that train (end below the loss of a guess), with "
                "its 95 % interval.",
                by_lr(LOSS, logs=True),
            ),
            title="The largest learning rate that trains, against that of SGD",
            tables=limits,
        ),
    ),
    Experiment(
        "bfp_schedule",
        "Are Backforward and SGD alike at learning rate 0.1, and does Backforward lead by more when the rate decays?",
        Part(
            layout("method", {"schedule": SCHEDULES}),
            Compare(LOSS, "bfp", "sgd", "similar"),
            Effects(BY_LEAD + "last epoch / half of the epochs", _later, "plateau"),
            Effects(BY_LEAD + "under decay / at the constant rate", _under_decay, "mitigated"),
            Compare(TEST, "bfp", "sgd"),
            Drawing(
                "curves",
                "Training loss at lr 0.1, by schedule",
                "Mean over seeds (of the logarithm) with its pointwise 95 % t interval.",
                curves("loss/train", "training loss (nats)", logs=True),
            ),
            Drawing(
                "ratio",
                "Training loss of Backforward / SGD, epoch by epoch",
                "Geometric mean of the pairs with its pointwise 95 % t interval. Under 1 Backforward leads.",
                ratios("sgd", "training loss, BFP / SGD"),
            ),
            title="At lr 0.1, by schedule",
            means=(LOSS, TEST),
        ),
    ),
    Experiment(
        "bfp_depth",
        "Does Backforward gain more over SGD in deeper networks?",
        Part(
            BY_DEPTH,
            Compare(LOSS, "bfp", "sgd"),
            Compare(TEST, "bfp", "sgd"),
            Drawing(
                "loss",
                "Training loss of Backforward / SGD, by depth",
                "After the last epoch; geometric mean of the pairs with its 95 % interval, a line for each learning "
                "rate. Under 1 Backforward is ahead. The upper panel, with its own scale, shows where runs diverged: "
                "they count as a guess (a loss of 2.3, imputed).",
                over("model.depth", "hidden layers", "training loss, BFP / SGD"),
            ),
            title="Backforward against SGD, by depth",
            means=(LOSS, TEST),
        ),
        Part(
            BY_DEPTH,
            Effects(BY_LEAD + "with four hidden layers / with one", _deeper(4, 1), "greater_impact"),
            Effects(BY_LEAD + "with eight hidden layers / with four", _deeper(8, 4), "deepest"),
            title="How the ratio of training losses changes with depth",
            note="Under 1: the gain grows. One to four layers and four to eight are apart, as the trend reverses "
            "between them.",
        ),
    ),
    _switching(
        "bfp_warmup",
        "Does Backforward in the first epochs alone leave a lower training loss than SGD throughout?",
        "BFP until epoch {}, then SGD",
        "enough",
    ),
    _switching(
        "bfp_finetune",
        "Does Backforward in the last epochs alone leave a lower training loss than SGD throughout?",
        "SGD until epoch {}, then BFP",
        "better",
    ),
    Experiment(
        "bfp_to_loss",
        "How many epochs do SGD and the published loop need to a training loss of .01?",
        Part(
            layout("method", {"lr": "lr {:g}"}),
            Effects("epochs to a logged loss of .01, published loop / SGD", _published_share, "shares"),
            Compare(BEFORE_UPDATES, "bfp_poster", "sgd"),
            Sample(AS_LOGGED),
            Drawing(
                "ratio",
                "The published loop's epochs as a fraction of SGD's",
                "Epochs to a logged training loss of .01; geometric mean of the pairs with its 95 % interval.",
                over("lr", "learning rate", "epochs, loop / SGD"),
            ),
            title="Epochs to a training loss of .01",
            note="The loop's logged loss is the one that its authors logged: that of the joint pass, after the single "
            "updates.",
            means=(AS_LOGGED, BEFORE_UPDATES),
        ),
        notes=("Settings and the tolerance were committed before the runs, in 62654bd.",),
    ),
)
