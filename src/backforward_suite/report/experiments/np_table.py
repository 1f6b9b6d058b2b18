"""NormProp, Table 1: test errors of NormProp, BatchNorm and no normalisation on the same network."""

from __future__ import annotations

from collections.abc import Sequence

from backforward_suite.report.claims import claims_of
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
from backforward_suite.report.experiments._figures import forest, reached
from backforward_suite.report.experiments._measures import PERCENT, Measure
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "mnist": "MNIST"}
CLAIMS = claims_of("np_table")
ERRORS = [claim for word, claim in CLAIMS.items() if word.startswith("errors")]
PUBLISHED = {name: claim.number(name) for claim in ERRORS for name in claim.published}
EPOCHS = {"cifar10": 200, "cifar100": 200, "svhn": 25}


def data_set(run: Run) -> str:
    """The row of Table 1."""
    return NAMES.get(run.data, run.data) + (" flipped" if run.setting("data.augment") == "flip" else "")


def test_error(run: Run) -> float | None:
    """Percent of the test set that a run gets wrong; a diverged one guesses."""
    accuracy = run.final("accuracy/test")
    return None if accuracy is None else 100 * (1 - accuracy)


def paper(run: Run) -> bool:
    """Whether a run has the paper's images, epochs and width."""
    images, epochs = run.result.get("data", {}).get("train") or 0, run.setting("max_epochs")
    return bool(images >= 45_000 and epochs >= EPOCHS.get(run.data, 200) and run.setting("model.width") == 1)


def below_listed(cells: Sequence[Cell]) -> list[Effect]:
    """NormProp's test error less the least that Table 1 lists of other methods on that data set."""
    rows = []
    for cell in cells:
        listed = [
            value for name, value in CLAIMS["beats_listed"].published.items() if name.startswith(f"{cell.label}, ")
        ]
        found = ERROR.sample(cell.arms.get("prop", []), cell.label)
        if listed and found.values:
            values = tuple(value - min(map(float, listed)) for value in found.values)  # type: ignore[arg-type]
            whole = all(map(paper, cell.arms["prop"]))
            rows.append(Effect(cell.label, values, unit="points", images=found.images, protocol=whole))
    return rows


ERROR = Measure("test error, %", test_error, points="points", bounds=PERCENT)
EXPERIMENT = Experiment(
    "np_table",
    "Is NormProp's test error below BatchNorm's on the data sets of Table 1, and on MNIST?",
    Part(
        layout("norm", {"data": data_set}, chosen="lr"),
        (
            Compare(ERROR, "prop", "batch", "below_batchnorm competitive"),
            Effects(
                "test error, points, NormProp - the least of the other methods listed", below_listed, "beats_listed"
            ),
            Sample(ERROR, ("prop", "batch"), "errors_cifar10 errors_cifar100 errors_svhn", paper),
        ),
        title="NormProp against BatchNorm",
        note="Under 0: NormProp is better.",
        means=(ERROR,),
        drawings=(
            Drawing(
                "errors",
                "Test errors beside those of Table 1",
                "Filled: ours with 95 % intervals over seeds; hollow markers: published, on all images, at full width.",
                reached(ERROR, published=PUBLISHED),
            ),
            Drawing(
                "differences",
                "NormProp's test error less BatchNorm's",
                "95 % intervals. Left of zero NormProp is better; hollow markers: published.",
                forest("test error, NormProp - BatchNorm, points"),
            ),
        ),
    ),
)
