"""The experiments that take covariate shift apart, on synthetic runs with known effects."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.study_runs import write_parts, write_rates, write_to_loss, write_witnesses

from backforward_suite.report import experiments
from backforward_suite.report.claims import claims_of
from backforward_suite.report.experiments.bfp_shift import best
from backforward_suite.report.finding import Finding
from backforward_suite.report.reading import read_runs


def found(root: Path, name: str) -> Finding:
    return experiments.load(name).examine(read_runs(root), list(claims_of(name).values()), "small")


def words(finding: Finding) -> dict[str, str]:
    return {verdict.claim.word: verdict.word for verdict in finding.verdicts}


def test_the_parts_of_a_known_change_are_told_apart(tmp_path: Path) -> None:
    write_parts(tmp_path)
    finding = found(tmp_path, "bfp_parts")
    assert words(finding) == dict.fromkeys(claims_of("bfp_parts"), "yes")
    row = next(verdict for verdict in finding.verdicts if verdict.claim.word == "order").row("lr 0.1")
    assert row is not None
    assert row.estimate.value == pytest.approx(1.2 / 0.95, rel=0.01)


def test_parts_without_effect_are_answered_no(tmp_path: Path) -> None:
    from tests.helpers.study_runs import ARMS

    write_parts(tmp_path, dict.fromkeys(ARMS, 1.0))
    assert words(found(tmp_path, "bfp_parts")) == {**dict.fromkeys(claims_of("bfp_parts"), "no"), "noise": "yes"}


@pytest.mark.parametrize(("gain", "word"), [(0.8, "yes"), (1.2, "no"), (1.0, "no")])
def test_each_arm_is_judged_at_its_own_best_rates(gain: float, word: str, tmp_path: Path) -> None:
    write_rates(tmp_path, gain)
    finding = found(tmp_path, "bfp_rates")
    assert words(finding) == {"fair_training": word, "fair_validation": word}
    chosen = next(table.frame for table in finding.tables if table.title.startswith("Rates"))
    assert set(chosen["hidden layers' rate"]) == {"0.2", "0.1"}
    assert set(chosen["inside the grid"]) == {"yes"}
    (row,) = finding.verdicts[0].rows
    assert row.estimate.value == pytest.approx(gain, rel=0.02)
    assert row.estimate.n == 10, "the grid's own seed judges nothing"


def test_a_best_on_the_border_of_the_grid_is_not_compared(tmp_path: Path) -> None:
    write_rates(tmp_path, best=0.1)  # BFP's best hidden rate is then the grid's lowest
    finding = found(tmp_path, "bfp_rates")
    assert words(finding) == {"fair_training": "not run", "fair_validation": "not run"}
    chosen = next(table.frame for table in finding.tables if table.title.startswith("Rates"))
    assert "no: widen it" in set(chosen["inside the grid"])


def test_the_best_of_a_grid() -> None:
    grid = {(x, y): abs(x - 2) + abs(y - 2) for x in (1.0, 2.0, 3.0) for y in (1.0, 2.0, 3.0)}
    assert best(grid) == ((2.0, 2.0), True)
    assert best({at: loss for at, loss in grid.items() if at[1] > 1}) == ((2.0, 2.0), False)
    assert best({}) is None


def test_epochs_to_a_loss_are_read_from_the_curve_that_was_logged(tmp_path: Path) -> None:
    write_to_loss(tmp_path, pace=2.0)
    finding = found(tmp_path, "bfp_to_loss")
    (verdict,) = finding.verdicts
    row = verdict.row("lr 0.1")
    assert row is not None
    # SGD: .6 exp(-k / 2) <= .01 from k = 9 on, its tenth epoch; the loop's joint loss is half its own: k = 4.
    assert row.estimate.value == pytest.approx(0.5, abs=0.06)
    assert verdict.kind == "inconclusive", "55,000 images are not the published protocol"


@pytest.mark.parametrize("name", ["bfp_witnesses", "np_witnesses"])
@pytest.mark.parametrize(
    ("noisy", "slope", "expected"),
    [
        (0.96, -0.005, {"noisy_as_well": "yes", "noisy_shifts_more": "yes", "explains": "no"}),
        (0.90, 0.01, {"noisy_as_well": "no", "noisy_shifts_more": "yes", "explains": "yes"}),
    ],
)
def test_the_witnesses_answer_as_constructed(
    name: str, noisy: float, slope: float, expected: dict[str, str], tmp_path: Path
) -> None:
    write_witnesses(tmp_path, name, noisy, slope)
    assert words(found(tmp_path, name)) == expected
