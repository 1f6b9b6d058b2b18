"""What would settle an open claim, on rows and runs with known scatter and times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.synthetic import write_run

from backforward_suite.report.claims import Claim
from backforward_suite.report.ground import Ground
from backforward_suite.report.reading import read_runs
from backforward_suite.report.settle import how
from backforward_suite.report.statistics import Effect
from backforward_suite.report.verdicts import judge


def claim(**changes: Any) -> Claim:
    given = {"id": "x.y", "experiment": "x", "statement": "Lower.", "source": "p. 1", "rule": "direction",
             "tolerance": 0.01, "tolerance_why": "A test.", "arguments": {"sign": -1}}  # fmt: skip
    return Claim.model_validate(given | changes)


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    """Two runs of an hour each on one thread, on 55,000 images for one epoch."""
    for seed in range(2):
        write_run(tmp_path, "x", seed=seed, losses=[1.0])
    runs = read_runs(tmp_path)
    for run in runs:
        run.result["timing"] |= {"training_seconds": 3600.0, "threads": 1}
        run.result["data"]["train"] = 55_000
        run.result["settings"]["max_epochs"] = 1
    return Ground.of(runs, "small")


def told(of: Claim, effect: Effect, ground: Ground) -> str:
    return how(of, [effect], ground, judge(of, [effect], ground))


UNSURE = Effect("a", (-0.3, 0.1, -0.4, 0.2, -0.2))


def test_a_decided_claim_needs_nothing(ground: Ground) -> None:
    assert told(claim(), Effect("a", (-1.0, -1.1, -0.9)), ground) == ""


def test_the_seeds_that_it_names_decide_and_half_of_them_do_not(ground: Ground) -> None:
    text = told(claim(), UNSURE, ground)
    times = int(text.split()[0])
    price = f"about {2 * (times - 1)} core-hours on this hardware"
    assert text == f"{times} times as many seeds, if they scatter alike: {price}"
    for factor, kind in ((times, "reproduced"), (times // 2, "inconclusive")):
        assert judge(claim(), [replace(UNSURE, values=UNSURE.values * factor)], ground).kind == kind


def test_an_estimate_on_the_border_is_settled_by_no_number_of_seeds(ground: Ground) -> None:
    border = Effect("a", (-0.5, 0.5, -0.3, 0.3))
    assert told(claim(tolerance=0.0), border, ground).startswith("more than 64 times as many seeds")


def test_short_runs_and_other_protocols_are_priced_by_their_images(ground: Ground) -> None:
    short = replace(UNSURE, images=55_000)
    assert "of at least 110,000 images each" in told(claim(least_images=110_000), short, ground)
    assert told(claim(least_images=110_000), short, ground).endswith("about 4 core-hours on this hardware")
    number = claim(rule="value", published={"a": 1.0}, paper_images=550_000)
    assert "SCALE=paper`: about 20 core-hours" in told(number, UNSURE, ground)
    for run in ground.runs:
        run.result["settings"]["model"] = {"width": 0.5}
    assert "about 80 core-hours on this hardware, if time grows with the square" in told(number, UNSURE, ground)


def test_missing_runs_are_named_with_their_command(ground: Ground) -> None:
    missing = told(claim(), UNSURE, replace(ground, missing=("b",)))
    assert missing.startswith("the runs that are missing: `make reproduce ONLY=x SCALE=small`")
    assert told(claim(), Effect("a", ()), ground) == missing
    assert told(claim(), Effect("a", (), note="neither arm learns"), ground).startswith("longer runs, or other")


def test_a_smoke_run_settles_nothing(ground: Ground) -> None:
    assert told(claim(), UNSURE, replace(ground, scale="smoke")) == ""
