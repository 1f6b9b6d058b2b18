from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tests.helpers.synthetic import BATCH, FORWARD, STEPS, write_run, write_sweep

from backforward_suite.report import statistics as st
from backforward_suite.report.finding import Estimate
from backforward_suite.report.reading import read_runs

# --- intervals ---------------------------------------------------------------------------------------------------


def test_the_t_interval_is_that_of_the_tables() -> None:
    found = st.mean([9.0, 10.0, 11.0, 10.0, 10.0, 9.5, 10.5, 10.0, 10.0, 10.0], unit="%")
    # s = .5270, t(.975, 9) = 2.2622
    assert found.method == "t"
    assert (found.low, found.high) == pytest.approx((10 - 0.3770, 10 + 0.3770), abs=1e-4)
    assert (found.n, found.unit, found.level) == (10, "%", 0.95)


def test_no_value_no_number_one_value_no_interval_equal_values_no_width() -> None:
    assert st.mean([]) == Estimate(None, None, None, 0)
    assert st.mean([2.0]) == Estimate(2.0, None, None, 1)
    assert st.mean([2.0] * 4) == Estimate(2.0, 2.0, 2.0, 4)


def test_the_wider_of_the_two_intervals_is_given_by_name_and_the_same_one_each_time() -> None:
    skewed = np.random.default_rng(0).lognormal(0, 2, 20)
    found = st.mean(skewed)
    low, high = st._t_interval(skewed, 0.95)
    assert found.method == "bootstrap"
    assert found.high - found.low > high - low
    assert found == st.mean(skewed)
    assert st.mean([1.0, 2.0, 3.0, 4.0, 5.0]).method == "t"  # the bootstrap is made as well, and is narrower
    low, high = st._bootstrap_interval((1.0, 2.0, 3.0, 4.0, 5.0), 0.95)
    assert high - low < 2 * 1.963  # the t interval's: s = 1.581, t(.975, 4) = 2.776


def test_heavy_tails_are_known_by_their_kurtosis() -> None:
    draw = np.random.default_rng(0)
    assert st.heavy_tailed(draw.standard_t(2, size=200))
    assert not st.heavy_tailed(draw.standard_normal(200))
    assert not st.heavy_tailed(np.ones(20))


def coverage(draw: st.Values, truth: float) -> float:
    inside = [found.low <= truth <= found.high for found in map(st.mean, draw)]
    return float(np.mean(inside))


@pytest.mark.parametrize("n", [3, 5, 8])
def test_of_normal_samples_95_percent_of_the_intervals_hold_the_mean(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(st, "RESAMPLES", 499)
    samples = np.random.default_rng(n).normal(3.0, 2.0, size=(600, n))
    # 2.6 standard errors of a share of .95 among 600 are .023; wider of two intervals may hold more.
    assert 0.927 <= coverage(samples, 3.0) <= 0.99


def test_of_skewed_samples_fewer_but_not_many_fewer_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(st, "RESAMPLES", 499)
    samples = np.random.default_rng(1).exponential(1.0, size=(600, 5))
    assert 0.86 <= coverage(samples, 1.0) <= 0.95


def test_wilson_s_interval_is_that_of_the_formula_and_stays_within_0_and_1() -> None:
    found = st.share(8, 10)
    z, p, n = 1.959964, 0.8, 10
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.low, found.high) == pytest.approx((centre - reach, centre + reach), abs=1e-6)
    assert st.share(0, 10).low == 0
    assert st.share(10, 10).high == 1
    assert st.share(0, 0).value is None


def test_a_quantile_s_interval_lies_between_order_statistics_and_takes_infinite_values() -> None:
    values = list(range(1, 21))
    found = st.quantile(values, 0.5)
    assert (found.value, found.low, found.high) == (10, 6, 15)  # the 6th and 15th of 20: binomial tables
    with_lost = st.quantile([*range(1, 15), *[math.inf] * 5, math.nan], 0.5)
    assert (with_lost.value, with_lost.low, with_lost.high) == (10, 6, None)
    assert st.quantile([1.0, 2.0, 3.0], 0.5).low is None
    assert st.quantile([], 0.5).value is None
    assert st.quantile([math.inf] * 3, 0.5).value is None


def test_a_quantile_s_interval_covers_it() -> None:
    draw = np.random.default_rng(2).lognormal(size=(400, 25))
    inside = [found.low <= 1.0 <= found.high for found in (st.quantile(row, 0.5) for row in draw)]
    assert np.mean(inside) >= 0.93


# --- paired effects ----------------------------------------------------------------------------------------------


def test_pairs_are_of_equal_keys_and_what_has_no_partner_is_lost() -> None:
    effect = st.paired({0: 1.0, 1: 2.0, 2: None, 5: 9.0}, {0: 0.5, 1: 1.0, 2: 1.0, 4: 1.0}, "row", unit="nats")
    assert effect.values == (0.5, 1.0)
    assert (effect.lost, effect.unit) == (3, "nats")
    ratio = st.paired({0: 2.0, 1: 8.0, 2: 0.0}, {0: 1.0, 1: 2.0, 2: 1.0}, "row", ratio=True)
    assert ratio.estimate().value == pytest.approx(math.sqrt(2 * 4))
    assert (ratio.lost, ratio.equality, effect.equality) == (1, 1.0, 0.0)


def test_pairing_removes_what_a_seed_brings_to_both_arms() -> None:
    draw = np.random.default_rng(0)
    of_seed = draw.normal(0, 1, 8)
    one = {seed: x + 0.1 + 0.01 * draw.standard_normal() for seed, x in enumerate(of_seed)}
    other = dict(enumerate(of_seed))
    found = st.paired(one, other, "").estimate()
    assert 0.08 < found.low < found.high < 0.12


def test_a_known_effect_is_found_and_its_size_is_inside() -> None:
    draw = np.random.default_rng(4)
    effect = st.Effect("", tuple(0.5 + 0.1 * draw.standard_normal(5)))
    assert effect.estimate(0.999).low > 0
    assert effect.estimate().low < 0.5 < effect.estimate().high


def test_what_was_not_sampled_has_no_interval() -> None:
    found = st.Effect("", (0.8275,), exact=True, unit="nats").estimate()
    assert (found.value, found.low, found.high, found.method) == (0.8275, 0.8275, 0.8275, "exact")
    assert str(found) == "0.8275 nats"
    assert st.Effect("", (0.8275,)).estimate().low is None  # one run of many


def test_a_grid_widens_an_interval_where_it_is_asked_for() -> None:
    effect = st.Effect("", (0.1, 0.2, 0.3), ratio=True, reach=0.5)
    narrow, wide = effect.estimate(), effect.estimate(with_reach=True)
    assert wide.value == narrow.value
    assert wide.low == pytest.approx(narrow.low * math.exp(-0.5))
    assert wide.high == pytest.approx(narrow.high * math.exp(0.5))


def test_the_sign_test_lets_those_who_never_arrive_come_last() -> None:
    assert st.sign_test([1.0, 2.0, 3.0, None, 1.0, 1.0, 1.0], [2.0, None, 3.0, None, 9.0, 9.0, 9.0]) == (5, 0, 0.0625)
    assert st.sign_test([None], [None]) == (0, 0, 1.0)


# --- cost of a loss level ----------------------------------------------------------------------------------------


def test_what_was_spent_follows_epochs_updates_arithmetic_and_time(tmp_path: Path) -> None:
    write_run(tmp_path, "x", method="bfp_poster", losses=[0.4, 0.2], seconds=10)
    (run,) = read_runs(tmp_path)
    assert st.spent(run, "epochs").to_dict() == {0: 0, 1: 1, 2: 2}
    assert st.spent(run, "updates").to_dict() == {0: 0, 1: 2 * STEPS, 2: 4 * STEPS}
    assert st.spent(run, "macs")[2] == 2 * STEPS * BATCH * 3 * FORWARD * 2.5
    assert st.spent(run, "seconds").to_dict() == {0: 0, 1: 12.5, 2: 25}


def test_a_rule_that_changes_is_charged_for_each_of_its_phases(tmp_path: Path) -> None:
    phases = [
        {"from_epoch": 0, "samples": 1, "forward": 1, "update": 5, "updates": 1},
        {"from_epoch": 2, "samples": 1, "forward": 1, "update": 3, "updates": 2},
    ]
    write_run(tmp_path, "x", losses=[0.4, 0.3, 0.2], arithmetic=phases)
    (run,) = read_runs(tmp_path)
    batches = STEPS * BATCH
    assert st.spent(run, "macs").to_dict() == {0: 0, 1: 5 * batches, 2: 10 * batches, 3: 13 * batches}
    assert st.spent(run, "updates").to_dict() == {0: 0, 1: STEPS, 2: 2 * STEPS, 3: 4 * STEPS}


def test_what_a_run_does_not_say_is_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "x")
    text = (folder / "result.json").read_text().replace('"arithmetic"', '"no"').replace('"training_seconds"', '"no"')
    (folder / "result.json").write_text(text)
    (run,) = read_runs(tmp_path)
    assert st.spent(run, "macs") is None
    assert st.spent(run, "seconds") is None
    assert st.cost_of(run, 0.2, "macs") is None


def test_means_over_an_epoch_hold_in_its_middle_and_what_is_measured_at_its_end_there(tmp_path: Path) -> None:
    write_run(tmp_path, "x", losses=[0.4, 0.1])
    (run,) = read_runs(tmp_path)
    assert st.located(run, "loss/train", "epochs").to_dict() == {0: 0, 1: 0.5, 2: 1.5}
    assert st.located(run, "loss/validation", "updates").to_dict() == {0: 0, 1: STEPS, 2: 2 * STEPS}


def test_twice_the_updates_an_epoch_cost_a_level_the_same_updates(tmp_path: Path) -> None:
    """Two arms on the same path, one of which records half as often."""

    def mean_loss(first: float, last: float) -> float:
        return float(np.mean([0.5 * math.exp(-0.05 * t) for t in np.linspace(first, last, 200)]))

    write_run(tmp_path, "x", method="sgd", losses=[mean_loss(t, t + 1) for t in range(40)])
    write_run(tmp_path, "x", method="bfp_poster", losses=[mean_loss(2 * t, 2 * t + 2) for t in range(20)])
    poster, sgd = (st.cost_of(run, 0.1, "updates") for run in read_runs(tmp_path))
    assert poster == pytest.approx(sgd, rel=0.001)


def test_the_cost_of_a_level_goes_between_epochs_and_is_none_if_never_reached(tmp_path: Path) -> None:
    write_run(tmp_path, "x", losses=[0.4, 0.1, 0.2])
    (run,) = read_runs(tmp_path)
    assert st.cost_of(run, 0.2) == pytest.approx(1.0)  # half way in the logarithm, between .5 and 1.5
    assert st.cost_of(run, 0.2, between=False) == 2
    assert st.cost_of(run, 0.2, "updates") == pytest.approx(STEPS)
    assert st.cost_of(run, 0.5) == 0.5  # below it from the first
    assert st.cost_of(run, 0.05) is None


def test_levels_that_somebody_misses_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, "x", seed=0, losses=[0.4, 0.1])
    write_run(tmp_path, "x", seed=1, losses=[0.5, 0.2])
    runs = read_runs(tmp_path)
    assert st.levels_reached(runs, [0.45, 0.3, 0.2, 0.15]) == [0.3, 0.2]  # .45 is reached before the first record
    assert st.levels_reached([], [0.3]) == []


# --- groups and choice -------------------------------------------------------------------------------------------


def test_two_runs_of_a_seed_that_are_not_of_one_arm_are_not_mixed(tmp_path: Path) -> None:
    for seed, decay in ((0, 0.0), (1, 0.0), (1, 0.1), (2, 0.0)):
        write_run(tmp_path, "x", seed=seed, settings={"weight_decay": decay}, name=f"seed{seed}-{decay}")
    runs = read_runs(tmp_path)
    assert st.by_seed(runs, lambda run: 1.0) == {0: 1.0, 1: None, 2: 1.0}
    for run in runs:
        run.result["settings_hash"] = f"that of seed {run.seed}"
    assert st.by_seed(runs, lambda run: 1.0) == {0: 1.0, 1: 1.0, 2: 1.0}


def test_runs_are_grouped_by_choices_and_settings_in_natural_order(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path, "x", {"sgd": 1.0, "bfp": 1.0}, lrs=(0.1, 0.05), seeds=2)
    groups = st.grouped(runs, "method", "lr")
    assert list(groups) == [("bfp", 0.05), ("bfp", 0.1), ("sgd", 0.05), ("sgd", 0.1)]
    assert [run.seed for run in groups["sgd", 0.1]] == [0, 1]


def test_a_setting_is_chosen_by_validation_alone_and_divergence_counts(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, "x", lr=0.1, seed=seed, accuracy=0.95, final={"accuracy/test": 0.90})
        write_run(tmp_path, "x", lr=0.2, seed=seed, accuracy=0.94, final={"accuracy/test": 0.99})
        status = "diverged" if seed else "finished"
        write_run(tmp_path, "x", lr=0.4, seed=seed, accuracy=0.999, status=status)
    write_run(tmp_path, "x", lr=0.8, seed=0, accuracy=1.0)  # one seed alone
    chosen = st.choose(read_runs(tmp_path), "lr")
    assert chosen is not None
    assert (chosen.setting, len(chosen.runs), chosen.tried) == ((0.1,), 2, 3)
    assert chosen.score == pytest.approx(0.95)


def test_nothing_is_chosen_on_test_data_nor_from_nothing() -> None:
    assert st.choose([], "lr") is None
    with pytest.raises(ValueError, match="validation data only"):
        st.choose([], "lr", by="accuracy/test")
