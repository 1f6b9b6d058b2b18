from __future__ import annotations

import pytest

from backforward_suite.report import answer
from backforward_suite.report.claims import read_claims
from backforward_suite.report.finding import Estimate, Finding, Kind, Row, Verdict


def finding(kinds: dict[str, Kind], value: float = 0.987) -> Finding:
    """Verdicts of some claims, each on two rows."""
    claims = {claim.id: claim for claim in read_claims()}
    rows = (
        Row("lr 0.01", "for", Estimate(value, value, value, 5), ""),
        Row("lr 0.05", "for", Estimate(0.5, 0.4, 0.6, 5), ""),
        Row("beside", "for", Estimate(7.0, 6.0, 8.0, 5), "", judged=False),
    )
    verdicts = tuple(Verdict(claims[name], kind, "", "", rows) for name, kind in kinds.items())
    return Finding("x", "Why?", verdicts, (), (), (), "small", "")


def test_without_runs_nothing_is_claimed() -> None:
    told = answer.sentences([])
    assert len(told) == 5
    assert all("not measured yet" in sentence for sentence in told)
    assert not any("reproduced" in sentence or "removes it" in sentence for sentence in told)


def test_numbers_and_verdicts_are_those_of_the_findings() -> None:
    name = "bfp_learning_rates.fewer_epochs"
    (_, speed, *_) = answer.sentences([finding({name: "reproduced"})])
    assert "needs 0.987 (lr 0.01) and 0.5 (lr 0.05) times SGD's epochs" in speed  # rows that are judged alone
    assert "fewer epochs: reproduced; a gain as large as published: not run" in speed


@pytest.mark.parametrize(
    ("kind", "begins"), [("contradicted", "Removing it speeds up"), ("reproduced", "The speed of")]
)
def test_a_sentence_opens_with_what_the_verdicts_support(kind: Kind, begins: str) -> None:
    kinds: dict[str, Kind] = {
        "bfp_learning_rates.fewer_epochs": "reproduced",
        "bfp_learning_rates.gain_as_published": kind,
    }
    (_, speed, *_) = answer.sentences([finding(kinds)])
    assert speed.startswith(begins)


def test_undecided_claims_are_counted_and_questions_are_not() -> None:
    kinds: dict[str, Kind] = {
        "np_table.below_batchnorm": "inconclusive",
        "np_shift.distance": "not run",
        "np_speed.epoch_time": "reproduced",
        "np_moments.keeps_normal_factor": "contradicted",  # a question
    }
    *_, last = answer.sentences([finding(kinds)])
    assert "2 of the 3 claims about it are not decided by these runs" in last
