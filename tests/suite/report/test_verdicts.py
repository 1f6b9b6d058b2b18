"""Synthetic runs with a known effect give each verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers.synthetic import write_run, write_sweep

from backforward_suite.report import statistics as st
from backforward_suite.report import verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.finding import Verdict
from backforward_suite.report.reading import Run, read_runs
from backforward_suite.report.statistics import Effect
from backforward_suite.report.verdicts import Ground
from backforward_suite.runs.lifecycle import add_to_plan


def claim(rule: str = "direction", **changes: Any) -> Claim:
    given = {
        "id": "x.y",
        "experiment": "x",
        "statement": "Faster.",
        "source": "Paper, p. 1",
        "rule": rule,
        "tolerance": 0.1,
        "tolerance_why": "A test.",
        "data": ["mnist"],
        "arguments": {"sign": -1},
    }
    return Claim.model_validate(given | changes)


def faster(runs: list[Run], scale: str = "small", missing: tuple[str, ...] = (), **changes: Any) -> Verdict:
    """Judge whether `bfp` needs fewer epochs to a loss of .1 than `sgd`, at each learning rate."""
    effects = []
    by_lr = st.grouped(runs, "lr")
    for (lr,), members in by_lr.items():
        arms = st.grouped(members, "method")
        costs = [st.by_seed(arms.get((arm,), []), lambda run: st.cost_of(run, 0.1)) for arm in ("bfp", "sgd")]
        effects.append(st.paired(*costs, f"lr {lr}", ratio=True))
    return verdicts.judge(claim(**changes), effects, Ground.of(runs, scale, missing))


def test_a_positive_effect_is_reproduced_and_below_paper_scale_of_its_direction_only(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path, "x", {"sgd": 1.0, "bfp": 1.5}, lrs=(0.05, 0.1))
    found = faster(runs)
    assert found.kind == "reproduced"
    assert "about the direction only, at small scale" in found.why
    assert "a row counts against the claim or as equal by its 97.5 % interval (Bonferroni over 2 rows)" in found.why
    assert "lr 0.05: 0.7" in found.ours
    assert [row.label for row in found.rows] == ["lr 0.05", "lr 0.1"]
    paper = faster(runs, scale="paper")
    assert (paper.kind, "direction only" in paper.why) == ("reproduced", False)


def test_a_negative_effect_is_contradicted(tmp_path: Path) -> None:
    found = faster(write_sweep(tmp_path, "x", {"sgd": 1.5, "bfp": 1.0}))
    assert found.kind == "contradicted"
    assert "the opposite direction" in found.why


def test_no_effect_is_contradicted_even_where_a_tiny_one_can_be_told_from_none(tmp_path: Path) -> None:
    null = faster(write_sweep(tmp_path / "null", "x", {"sgd": 1.0, "bfp": 1.0}))
    assert null.kind == "contradicted"
    assert "no effect: within 0.9091 to 1.1" in null.why
    tiny = faster(write_sweep(tmp_path / "tiny", "x", {"sgd": 1.0, "bfp": 1.03}, spread=0.002))
    assert tiny.kind == "contradicted"
    assert "an effect too small to count: within 0.9091 to 1.1" in tiny.why


def test_too_noisy_runs_are_inconclusive(tmp_path: Path) -> None:
    found = faster(write_sweep(tmp_path, "x", {"sgd": 1.0, "bfp": 1.2}, spread=0.5, epochs=30))
    assert found.kind == "inconclusive"
    assert "consistent with no difference" in found.why


def test_one_seed_has_no_interval_and_is_inconclusive(tmp_path: Path) -> None:
    found = faster(write_sweep(tmp_path, "x", {"sgd": 1.0, "bfp": 1.5}, seeds=1))
    assert found.kind == "inconclusive"
    assert "one pair of runs" in found.why


def test_a_missing_arm_is_not_run_and_says_what_to_do(tmp_path: Path) -> None:
    found = faster(write_sweep(tmp_path, "x", {"sgd": 1.0}), missing=("bfp",))
    assert found.kind == "not run"
    assert found.why == "missing: bfp; run `make reproduce ONLY=x SCALE=small`"
    assert faster([]).kind == "not run"


def test_a_missing_row_keeps_a_claim_about_all_rows_open_and_is_named(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path, "x", {"sgd": 1.0, "bfp": 1.5}, lrs=(0.1,))
    found = faster(runs, arguments={"sign": -1, "rows": ["lr 0.05", "lr 0.1"]})
    assert found.kind == "inconclusive"
    assert "missing: lr 0.05" in found.why
    assert faster(runs, arguments={"sign": -1, "rows": ["lr 0.1"]}).kind == "reproduced"


def test_diverged_runs_count_as_the_worst_and_are_reported(tmp_path: Path) -> None:
    for seed in range(5):
        height = 1 + 0.01 * seed
        write_run(tmp_path, "x", method="sgd", seed=seed, losses=[0.2 * height, 0.1 * height])
        write_run(tmp_path, "x", method="bfp", seed=seed, losses=[9.0, math.nan], status="diverged")
    runs = read_runs(tmp_path)
    arms = st.grouped(runs, "method")
    losses = [st.by_seed(arms[arm,], lambda run: run.final("loss/train")) for arm in ("bfp", "sgd")]
    found = verdicts.judge(claim(), [st.paired(*losses, "", ratio=True)], Ground.of(runs, "small"))
    assert found.kind == "contradicted"
    assert "5 of 10 runs diverged" in found.why


def test_failed_runs_are_missing_ones(tmp_path: Path) -> None:
    write_run(tmp_path, "x", status="failed")
    ground = Ground.of(read_runs(tmp_path), "small")
    assert ground.runs == ()
    assert "failed" in ground.missing[0]


def test_a_verdict_waits_until_a_sweep_is_done(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path, "x", {"sgd": 1.0, "bfp": 1.5})
    root = runs[0].folder.parent
    add_to_plan(root, {run.name: () for run in runs})
    assert faster(runs).kind == "reproduced"
    add_to_plan(root, {"bfp-lr0.1-seed10": (), "bfp-lr0.1-seed9": ()})
    found = faster(runs)
    assert found.kind == "inconclusive"
    assert "not done: bfp-lr0.1-seed9, bfp-lr0.1-seed10" in found.why


def test_smoke_is_inconclusive_at_most_and_says_where_it_points(tmp_path: Path) -> None:
    found = faster(write_sweep(tmp_path, "x", {"sgd": 1.0, "bfp": 1.5}), scale="smoke")
    assert found.kind == "inconclusive"
    assert "smoke scale only shows that it runs (it points to reproduced)" in found.why


def test_other_data_is_a_stand_in_and_says_what_it_would_have_been(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path, "x", {"sgd": 1.0, "bfp": 1.5}, data="digits")
    found = faster(runs)
    assert found.kind == "stand-in data"
    assert found.why.startswith("on digits instead of mnist it would be reproduced:")
    assert faster(runs, data=[]).kind == "reproduced"  # a claim about any data
    assert faster(runs, scale="smoke").kind == "stand-in data"


def row(label: str, centre: float, spread: float = 0.01) -> Effect:
    return Effect(label, tuple(centre + spread * x for x in (-1.2, -0.4, 0.1, 0.5, 1.0)))


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    write_run(tmp_path, "x")
    return Ground.of(read_runs(tmp_path), "paper")


@pytest.mark.parametrize(
    ("centres", "over", "kind"),
    [
        ((-1, -1, -1), "all", "reproduced"),
        ((-1, -1, 0), "all", "contradicted"),
        ((-1, -1, 0), "most", "reproduced"),
        ((-1, 0, 1), "most", "contradicted"),
        ((-1, 0, 1), "any", "reproduced"),
        ((0, 1, 1), "any", "contradicted"),
    ],
)
def test_rows_are_taken_together_as_the_claim_says(
    ground: Ground, centres: tuple[float, ...], over: str, kind: str
) -> None:
    effects = [row(str(k), centre) for k, centre in enumerate(centres)]
    found = verdicts.judge(claim(arguments={"sign": -1, "over": over}), effects, ground)
    assert found.kind == kind


@pytest.mark.parametrize(
    ("centres", "over", "kind"),
    [
        ((0, 0), "all", "reproduced"),
        ((1, 0), "all", "reproduced"),
        ((-1, 0), "all", "contradicted"),
        ((-1, 1), "all", "contradicted"),
        ((-1, 0), "any", "reproduced"),
        ((-1, -1), "any", "contradicted"),
    ],
)
def test_an_effect_that_is_denied_must_be_absent_from_each_row(
    ground: Ground, centres: tuple[float, ...], over: str, kind: str
) -> None:
    effects = [row(str(k), centre) for k, centre in enumerate(centres)]
    denies = claim(arguments={"sign": -1, "over": over, "negated": True})
    assert verdicts.judge(denies, effects, ground).kind == kind


def test_an_open_row_leaves_a_claim_open_unless_another_decides(ground: Ground) -> None:
    unsure = row("b", -0.3, spread=1.0)
    for over, kind in (("all", "inconclusive"), ("most", "inconclusive"), ("any", "reproduced")):
        found = verdicts.judge(claim(arguments={"sign": -1, "over": over}), [row("a", -1), unsure], ground)
        assert found.kind == kind
    assert "a: as claimed; b: consistent with no difference" in found.why


def test_rows_that_a_claim_is_not_about_are_only_shown(ground: Ground) -> None:
    asked = claim(arguments={"sign": -1, "rows": ["a"]})
    found = verdicts.judge(asked, [row("a", -1), row("b", 1)], ground)
    assert found.kind == "reproduced"
    assert "as claimed" in found.why
    beside = found.row("b")
    assert beside is not None
    assert (beside.judged, beside.state, beside.why) == (False, "against", "the opposite direction")


def test_a_number_agrees_differs_or_is_open(ground: Ground) -> None:
    table = claim("value", published={"error": 9.0, "other": 4.0}, tolerance=0.5, unit="%")
    cases = {(9.1, 0.1): "reproduced", (10.0, 0.1): "contradicted", (9.4, 0.3): "inconclusive"}
    for (centre, spread), kind in cases.items():
        found = verdicts.judge(table, [row("error", centre, spread)], ground)
        assert found.kind == kind
        assert "9, ± 0.5" in found.why
        assert " %" in found.ours
    relative = claim("value", published={"error": 9.0}, tolerance=0.5, arguments={"relative": True})
    assert verdicts.judge(relative, [row("error", 10.0, 0.1)], ground).kind == "reproduced"
    with pytest.raises(KeyError, match="speed"):
        verdicts.judge(table, [row("speed", 1.0)], ground)
    between = claim("value", published={"error": [20.0, 160.0]}, tolerance=0.0)
    for centre, kind in ((90.0, "reproduced"), (19.0, "contradicted"), (160.0, "inconclusive")):
        found = verdicts.judge(between, [row("error", centre)], ground)
        assert (found.kind, "20 to 160" in found.why) == (kind, True)


def test_mathematics_is_judged_at_any_scale_but_smoke(tmp_path: Path) -> None:
    write_run(tmp_path, "x")
    law = claim("identity", published={"mean": 0.4}, tolerance=0.01, data=[])
    for centre, kind in ((0.401, "reproduced"), (0.43, "contradicted")):
        found = verdicts.judge(law, [row("mean", centre, 0.002)], Ground.of(read_runs(tmp_path), "small"))
        assert found.kind == kind
        assert "direction only" not in found.why
    smoke = verdicts.judge(law, [row("mean", 0.4, 0.002)], Ground.of(read_runs(tmp_path), "smoke"))
    assert smoke.kind == "inconclusive"
    known = Effect("mean", (0.4001,), exact=True)
    assert verdicts.judge(law, [known], Ground.of(read_runs(tmp_path), "small")).kind == "reproduced"
    one_draw = Effect("mean", (0.4001,))
    assert verdicts.judge(law, [one_draw], Ground.of(read_runs(tmp_path), "small")).kind == "inconclusive"


@pytest.mark.parametrize(
    ("hits", "n", "asked", "kind"),
    [
        (990, 1000, 0.95, "reproduced"),
        (600, 1000, 0.95, "contradicted"),
        (19, 20, 0.95, "inconclusive"),
        (50, 50, 1.0, "reproduced"),
        (49, 50, 1.0, "contradicted"),
        (0, 0, 0.95, "not run"),
    ],
)
def test_a_share_is_judged_by_its_interval(ground: Ground, hits: int, n: int, asked: float, kind: str) -> None:
    often = claim("share", tolerance=None, arguments={"at_least": asked})
    assert verdicts.judge(often, [st.how_often("", hits, n)], ground).kind == kind
    below = verdicts.judge(often, [st.how_often("", hits, n)], replace(ground, scale="small"))
    assert (below.kind, "direction" in below.why) == (kind, False)  # how often is how often


def ratios(runs: list[Run], published: list[float]) -> Effect:
    found = [float(np.mean(np.log(run.curve("loss/train").to_numpy() / published))) for run in runs]
    return Effect("lr 0.1", tuple(found), ratio=True)


def test_a_curve_is_followed_or_it_is_not(tmp_path: Path) -> None:
    published = [0.6 * math.exp(-0.5 * epoch) for epoch in range(8)]
    follows = claim("curve")
    for speed, kind in ((1.0, "reproduced"), (1.5, "contradicted")):
        runs = write_sweep(tmp_path / str(speed), "x", {"sgd": speed}, spread=0.01)
        found = verdicts.judge(follows, [ratios(runs, published)], Ground.of(runs, "small"))
        assert found.kind == kind
    # Seeds so far apart that the published one may be one more of them.
    apart = Effect("lr 1", (-0.3, -1.0, -0.7, -1.3, -0.5), ratio=True)
    assert apart.estimate().high < 1 / 1.1
    found = verdicts.judge(follows, [apart], Ground.of(runs, "small"))
    assert found.kind == "inconclusive"
    assert "our own seeds differ by a factor of 1.49" in found.why
    noisy = write_sweep(tmp_path / "noisy", "x", {"sgd": 1.0}, spread=0.4, seeds=3)
    found = verdicts.judge(follows, [ratios(noisy, published)], Ground.of(noisy, "small"))
    assert found.kind == "inconclusive"


def test_a_row_without_a_number_but_with_a_reason_is_open_not_missing(ground: Ground) -> None:
    found = verdicts.judge(claim(), [Effect("lr 1", (), ratio=True, lost=5, note="neither arm learns")], ground)
    assert (found.kind, "neither arm learns" in found.why, found.ours) == ("inconclusive", True, "lr 1: -")
    other = [Effect("lr 1", (), ratio=True, note="trained on 400 images")]
    assert verdicts.judge(claim("curve"), other, ground).kind == "inconclusive"


# --- several rows ----------------------------------------------------------------------------------------------------


def test_all_rows_for_is_not_corrected_and_one_row_against_is(ground: Ground) -> None:
    """Each of three rows at p = .03: together they speak for a claim; one of them alone does not refute it."""
    weak = [row(name, -0.5, spread=0.4) for name in "abc"]
    assert weak[0].estimate(0.95).high < 0 < weak[0].estimate(1 - 0.05 / 3).high
    assert verdicts.judge(claim(), weak, ground).kind == "reproduced"
    one = [row("a", 0.5, spread=0.4), row("b", -1), row("c", -1)]
    found = verdicts.judge(claim(), one, ground)
    assert (found.kind, found.rows[0].state) == ("inconclusive", "open")
    assert verdicts.judge(claim(), one[:1], ground).kind == "contradicted"  # alone, nothing is to be corrected
    assert "by its 98.3 % interval" in found.why


def test_where_any_row_may_speak_for_a_claim_it_is_that_which_is_corrected(ground: Ground) -> None:
    any_row = claim(arguments={"sign": -1, "over": "any"})
    weak, open_ = row("a", -0.5, spread=0.4), [row(name, 0.0, spread=1.0) for name in "bc"]
    assert verdicts.judge(any_row, [weak], ground).kind == "reproduced"
    assert verdicts.judge(any_row, [weak, *open_], ground).kind == "inconclusive"
    reverse = [row(name, 0.5, spread=0.4) for name in "abc"]
    assert verdicts.judge(any_row, reverse, ground).kind == "contradicted"  # all of them must say so


def test_equality_is_read_at_the_corrected_level(ground: Ground) -> None:
    near = row("a", 0.0, spread=0.09)
    assert near.estimate(0.95).high < 0.1 < near.estimate(1 - 0.05 / 3).high
    assert verdicts.judge(claim(), [near], ground).kind == "contradicted"
    found = verdicts.judge(claim(), [near, row("b", -1), row("c", -1)], ground)
    assert found.kind == "inconclusive"
    corrected = found.rows[0].corrected
    assert corrected is not None
    assert corrected.level == pytest.approx(1 - 0.05 / 3)
    value = claim("value", published=dict.fromkeys("abc", 0.0), tolerance=0.1)
    assert verdicts.judge(value, [near], ground).kind == "reproduced"
    three = [replace(near, label=name) for name in "abc"]
    assert verdicts.judge(value, three, ground).kind == "inconclusive"


def test_rows_that_a_claim_is_not_about_do_not_count_in_the_family(ground: Ground) -> None:
    weak = row("a", 0.5, spread=0.4)
    asked = claim(arguments={"sign": -1, "rows": ["a"]})
    others = [row(name, -0.3, spread=1.0) for name in "bc"]
    assert verdicts.judge(asked, [weak, *others], ground).kind == "contradicted"
    empty = [Effect(name, (), note="neither arm learns") for name in "bc"]
    assert "Bonferroni" not in verdicts.judge(claim(), [weak, *empty], ground).why


def test_among_many_null_rows_a_false_refutation_stays_rare(ground: Ground) -> None:
    draw = np.random.default_rng(3)
    tables = [
        [Effect(str(k), tuple(values)) for k, values in enumerate(draw.standard_normal((6, 5)))] for _ in range(300)
    ]
    found = [verdicts.judge(claim(tolerance=0.0), table, ground).kind for table in tables]
    assert found.count("contradicted") / len(found) < 0.06
    assert found.count("reproduced") == 0


# --- equality, absence, tolerances -----------------------------------------------------------------------------------


def test_a_claim_of_no_difference_either_way(ground: Ground) -> None:
    same = claim(arguments={"sign": 0})
    cases = {0.0: "reproduced", 0.05: "reproduced", 0.5: "contradicted", -0.5: "contradicted", 0.1: "inconclusive"}
    for centre, kind in cases.items():
        assert verdicts.judge(same, [row("a", centre, spread=0.01)], ground).kind == kind


def test_an_absent_effect_leaves_room_for_the_opposite_one(ground: Ground) -> None:
    """No worse by more than .1: an interval from no change to far better says so, though it is not within .1."""
    no_worse = claim(arguments={"sign": -1, "negated": True})
    assert verdicts.judge(no_worse, [row("a", 0.3, spread=0.2)], ground).kind == "reproduced"
    assert verdicts.judge(no_worse, [row("a", -0.3, spread=0.01)], ground).kind == "contradicted"
    assert verdicts.judge(no_worse, [row("a", 0.0, spread=0.3)], ground).kind == "inconclusive"


def test_a_verdict_says_for_which_tolerances_it_holds(ground: Ground) -> None:
    effect = row("a", -0.5, spread=0.1)
    low, high = effect.estimate().low, effect.estimate().high
    assert low is not None
    assert high is not None
    found = verdicts.judge(claim(), [effect], ground)
    assert (found.kind, found.holds) == ("reproduced", f"for tolerances up to {-low:.2g}")
    small = verdicts.judge(claim(tolerance=1.0), [effect], ground)
    assert (small.kind, small.holds) == ("contradicted", f"for tolerances from {-low:.2g} up")
    reverse = verdicts.judge(claim(arguments={"sign": 1}), [effect], ground)
    assert (reverse.kind, reverse.holds) == ("contradicted", "whatever the tolerance")
    ratio = verdicts.judge(claim(), [Effect("a", (-0.02, -0.021, -0.019), ratio=True)], ground)
    assert ratio.kind == "contradicted"
    assert ratio.holds == "for tolerances from 2.3 % up"


def test_a_verdict_that_turns_with_the_tolerance_does_turn_there(ground: Ground) -> None:
    effects = [row("a", -0.5, spread=0.1), row("b", -0.2, spread=0.05)]
    found = verdicts.judge(claim(tolerance=0.01), effects, ground)
    end = float(found.holds.removeprefix("for tolerances up to "))
    for tolerance, kind in ((0.97 * end, "reproduced"), (1.03 * end, "contradicted")):
        assert verdicts.judge(claim(tolerance=tolerance), effects, ground).kind == kind


def test_a_grid_keeps_limits_from_counting_as_equal_and_from_nothing_else(ground: Ground) -> None:
    """All seeds in one bracket of the grid: the limits may still differ by a step."""
    alike = Effect("a", (0.0,) * 5, ratio=True, reach=0.3)
    assert verdicts.judge(claim(), [alike], ground).kind == "inconclusive"
    assert verdicts.judge(claim(), [replace(alike, reach=0.0)], ground).kind == "contradicted"
    apart = Effect("a", (0.0, 0.35, 0.35, 0.35, 0.35), ratio=True, reach=0.4)
    assert verdicts.judge(claim(), [apart], ground).kind == "contradicted"  # the opposite direction


# --- what cannot be judged -------------------------------------------------------------------------------------------


def test_runs_that_end_before_the_papers_first_data_point_are_inconclusive_by_rule(ground: Ground) -> None:
    curves = claim(least_images=45_000)
    for images, kind in ((12_000, "inconclusive"), (44_999, "inconclusive"), (45_000, "reproduced")):
        found = verdicts.judge(curves, [replace(row("a", -1), images=images)], ground)
        assert found.kind == kind
    short = [replace(row("a", -1), images=90_000), replace(row("b", 1), images=12_000)]
    found = verdicts.judge(curves, short, ground)
    assert found.kind == "inconclusive"
    assert "b: its runs saw 12,000 images, fewer than at the paper's first data point (45,000)" in found.why


def test_a_published_number_is_compared_row_by_row_where_its_protocol_was_run(tmp_path: Path) -> None:
    write_run(tmp_path, "x")
    small = Ground.of(read_runs(tmp_path), "small")
    table = claim("value", published={"a": 17.0, "b": 6.0, "c": 289.0}, tolerance=1.0, unit="epochs")
    whole = [replace(row("a", 17.1), protocol=True), replace(row("b", 9.0), protocol=True)]
    found = verdicts.judge(table, [*whole, row("c", 40.0)], small)
    assert [each.state for each in found.rows] == ["for", "against", "open"]
    assert found.kind == "contradicted"
    assert "c: not run under the paper's whole protocol" in found.why
    agreeing = verdicts.judge(table, [whole[0], row("c", 40.0)], small)
    assert (agreeing.kind, agreeing.rows[0].state) == ("inconclusive", "for")
    assert verdicts.judge(table, [whole[0]], small).kind == "reproduced"
    assert verdicts.judge(table, [], Ground.of([], "small")).kind == "not run"
    only_whole = claim(arguments={"sign": -1, "protocol": True})
    assert verdicts.judge(only_whole, [row("a", -1)], small).kind == "inconclusive"
    assert verdicts.judge(only_whole, [replace(row("a", -1), protocol=True)], small).kind == "reproduced"


def test_hand_picked_cases_have_no_interval(ground: Ground) -> None:
    always = claim("share", tolerance=None, arguments={"at_least": 1.0})
    found = verdicts.judge(always, [replace(st.how_often("matrices", 40, 48), exact=True)], ground)
    assert found.kind == "contradicted"
    assert found.ours == "matrices: 0.8333"
    assert "40 of 48" in found.why


def test_a_question_is_answered_and_not_judged(ground: Ground) -> None:
    asked = claim(kind="question", statement="Is it faster?")
    for centre, kind, word in ((-1.0, "reproduced", "yes"), (1.0, "contradicted", "no")):
        found = verdicts.judge(asked, [replace(row("a", centre), what="epochs, ours / theirs")], ground)
        assert (found.kind, found.word) == (kind, word)
        assert "epochs, ours / theirs (under 0 favours a yes)" in found.ours
    assert verdicts.judge(asked, [row("a", 0.0, spread=1.0)], ground).word == "open"
    assert verdicts.not_run(asked, "small").word == "not run"


def test_runs_on_data_that_another_claim_is_about_stand_in_for_nothing(tmp_path: Path) -> None:
    """Table 1 without SVHN: its CIFAR runs are no stand-ins."""
    write_run(tmp_path, "np_table", data="cifar10")
    svhn = claim(id="np_table.y", experiment="np_table", data=["svhn"])
    assert Ground.of(read_runs(tmp_path), "small").of_data(svhn).runs == ()
    write_run(tmp_path / "other", "np_table", data="digits")
    assert Ground.of(read_runs(tmp_path / "other"), "small").of_data(svhn).stands_in(svhn) == "digits"
