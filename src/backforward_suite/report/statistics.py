"""Estimates from runs: paired effects over seeds, intervals, cost of a loss level, choice of settings.

Two arms are compared by their runs of the same seed and setting. These share initial weights and the order of samples,
so most of the spread between seeds cancels in their difference. An estimate is the mean difference (or the geometric
mean of ratios) with a 95 % interval: Student's t, or for fewer than 10 pairs or heavy tails the wider of it and a
bias-corrected and accelerated bootstrap.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import NDArray

from backforward_suite.report.finding import Estimate, Method
from backforward_suite.report.reading import Run
from backforward_suite.runs.files import natural

LEVEL = 0.95
FEW = 10  # with fewer values the bootstrap is computed too
HEAVY = 2.0  # excess kurtosis above which tails count as heavy
RESAMPLES = 9999
GENERATOR_SEED = 20230207  # of the bootstrap: the same runs give the same report

Values = NDArray[np.float64]
Currency = Literal["epochs", "updates", "macs", "seconds"]


# --- intervals -------------------------------------------------------------------------------------------------------


def mean(values: Iterable[float], unit: str = "", level: float = LEVEL) -> Estimate:
    """Mean with its interval: t, or the bootstrap if it was computed and is wider.

    Args:
        values: One a seed or pair; all finite.
        unit: Of the values.
        level: Of the interval.

    Returns:
        Without an interval if there is one value, without a number if there is none.
    """
    data = np.asarray(list(values), dtype=np.float64)
    if len(data) == 0:
        return Estimate(None, None, None, 0, "t", level, unit)
    centre = float(data.mean())
    if len(data) == 1:
        return Estimate(centre, None, None, 1, "t", level, unit)
    low, high = _t_interval(data, level)
    method: Method = "t"
    if len(data) > 2 and (len(data) < FEW or heavy_tailed(data)):
        resampled = _bootstrap_interval(tuple(data.tolist()), level)
        if resampled is not None and resampled[1] - resampled[0] > high - low:
            (low, high), method = resampled, "bootstrap"
    return Estimate(centre, low, high, len(data), method, level, unit)


def heavy_tailed(values: Values) -> bool:
    """Whether the excess kurtosis (0 for a normal distribution, 6 for an exponential one) is 2 or more."""
    if len(values) < 4 or np.ptp(values) == 0:
        return False
    return bool(scipy.stats.kurtosis(values, bias=False) >= HEAVY)


def _t_interval(data: Values, level: float) -> tuple[float, float]:
    error = float(data.std(ddof=1)) / math.sqrt(len(data))
    reach = float(scipy.stats.t.ppf((1 + level) / 2, len(data) - 1)) * error
    centre = float(data.mean())
    return centre - reach, centre + reach


@functools.lru_cache(maxsize=4096)  # the range of tolerances asks for the same intervals again and again
def _bootstrap_interval(values: tuple[float, ...], level: float) -> tuple[float, float] | None:
    """BCa; None if all values are equal."""
    data = np.asarray(values)
    if np.ptp(data) == 0:
        return None
    with warnings.catch_warnings(action="ignore"):  # on degenerate data it returns nan
        found = scipy.stats.bootstrap(
            (data,),
            np.mean,
            confidence_level=level,
            n_resamples=RESAMPLES,
            method="BCa",
            rng=np.random.default_rng(GENERATOR_SEED),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def share(successes: int, n: int, level: float = LEVEL) -> Estimate:
    """A proportion with Wilson's interval, which stays within 0 to 1 and is valid at both ends."""
    if n == 0:
        return Estimate(None, None, None, 0, "exact", level)
    interval = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n, "exact", level)


def quantile(values: Iterable[float], q: float, unit: str = "", level: float = LEVEL) -> Estimate:
    """A quantile with its interval between order statistics, which holds for any distribution.

    Args:
        values: Infinite ones (diverged runs) count as largest.
        q: In (0, 1): 0.5 is the median.
        unit: Of the values.
        level: The least level of the interval; for a median it needs 6 values.
    """
    data = np.asarray(list(values), dtype=np.float64)
    data = np.sort(np.where(np.isnan(data), np.inf, data))
    if len(data) == 0:
        return Estimate(None, None, None, 0, "quantile", level, unit)
    value = float(np.quantile(data, q, method="inverted_cdf"))
    interval = scipy.stats.quantile_test(data, q=value if math.isfinite(value) else 0.0, p=q).confidence_interval(level)
    return Estimate(
        _finite(value), _finite(float(interval.low)), _finite(float(interval.high)), len(data), "quantile", level, unit
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- paired effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """The difference between two arms in one row of a table: a value for each pair.

    Attributes:
        label: The row's name, such as `lr 0.1`.
        values: One a pair; logarithms if `ratio`; 0 or 1 if `share`.
        ratio: Whether arms are compared by ratio; equal arms give 1 then, and 0 otherwise.
        unit: Of the difference.
        lost: Number of pairs without a value: a run is missing or did not reach the level (`note` says which).
        note: A remark for the reader.
        exact: Whether nothing was sampled (a closed form, hand-picked matrices), so that there is no interval.
        reach: How far off the mean may be, in both directions, because values were read from a grid; a logarithm if
            `ratio`. It widens the interval only in tests of equality: a grid can hide a difference but not create one.
        what: What is compared, such as `epochs to the loss, BFP / SGD`.
        images: The fewest training images that a run behind it saw; None without any training.
        protocol: Whether it was measured under the paper's whole protocol, at any scale.
        share: Whether the mean of the values is a share; its interval is then Wilson's.
    """

    label: str
    values: tuple[float, ...]
    ratio: bool = False
    unit: str = ""
    lost: int = 0
    note: str = ""
    exact: bool = False
    reach: float = 0.0
    what: str = ""
    images: int | None = None
    protocol: bool = False
    share: bool = False

    @property
    def equality(self) -> float:
        """The value for equal arms."""
        return 1.0 if self.ratio else 0.0

    def estimate(self, level: float = LEVEL, *, with_reach: bool = False) -> Estimate:
        """Mean difference, or geometric mean of ratios.

        Args:
            level: Of the interval.
            with_reach: Widen the interval by `reach` on both sides.
        """
        if self.share:
            found = share(round(sum(self.values)), len(self.values), level)
            return replace(found, low=found.value, high=found.value) if self.exact else found
        if self.exact and len(self.values) == 1:
            (value,) = self.values
            return Estimate(value, value, value, 1, "exact", level, self.unit)
        inner = mean(self.values, self.unit, level)
        if with_reach and inner.low is not None and inner.high is not None:
            inner = replace(inner, low=inner.low - self.reach, high=inner.high + self.reach)
        if not self.ratio or inner.value is None:
            return inner
        low, high = (None if end is None else _exponential(end) for end in (inner.low, inner.high))
        return replace(inner, value=_exponential(inner.value), low=low, high=high)


def _exponential(value: float) -> float:
    return math.exp(min(max(value, -700.0), 700.0))


def paired(
    ours: Mapping[Hashable, float | None],
    theirs: Mapping[Hashable, float | None],
    label: str,
    *,
    ratio: bool = False,
    unit: str = "",
) -> Effect:
    """The effect of one arm against another, pair by pair: ours - theirs, or log(ours / theirs).

    Args:
        ours: The number of each pair (a seed, or a seed with a setting) in one arm; None if it has none.
        theirs: The other arm's.
        label: The row's name.
        ratio: Compare by ratio; pairs with a number that is not positive are lost.
        unit: Of the difference.
    """
    values, lost = [], 0
    for key in {**ours, **theirs}:
        one, other = ours.get(key), theirs.get(key)
        if one is None or other is None or (ratio and (one <= 0 or other <= 0)):
            lost += 1
        else:
            values.append(math.log(one / other) if ratio else one - other)
    return Effect(label, tuple(values), ratio, "" if ratio else unit, lost)


def how_often(label: str, hits: int, n: int) -> Effect:
    """How often something happened, of how many; its estimate has Wilson's interval."""
    return Effect(label, (1.0,) * hits + (0.0,) * (n - hits), share=True)


def told_lost(effect: Effect) -> str:
    """How many pairs gave a value, in words; empty if all did."""
    total = len(effect.values) + effect.lost
    return f"{len(effect.values)} of {total} pairs; the others gave no value" if effect.values and effect.lost else ""


def sign_test(ours: Sequence[float | None], theirs: Sequence[float | None]) -> tuple[int, int, float]:
    """Which arm was first, pair by pair; runs that never arrived come last.

    Args:
        ours: Cost at which each of our runs reached a level; None: never.
        theirs: The same for the runs they are paired with.

    Returns:
        The pairs that ours won, the pairs that theirs won (ties count for neither), and the exact two-sided p of the
        sign test.
    """
    pairs = [
        (math.inf if one is None else one, math.inf if other is None else other)
        for one, other in zip(ours, theirs, strict=True)
    ]
    won, lost = sum(one < other for one, other in pairs), sum(one > other for one, other in pairs)
    p = float(scipy.stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return won, lost, p


# --- cost of a loss level --------------------------------------------------------------------------------------------


def spent(run: Run, currency: Currency) -> pd.Series[float] | None:
    """The cost of a run up to the end of each epoch, by epoch.

    epochs: passes over the data. updates: updates of each weight. macs: multiply-accumulates of all passes. seconds:
    time in training steps, divided among epochs by their number of batches.

    Returns:
        None if the run does not record it.
    """
    steps = run.curve("step")
    if currency == "epochs":
        return pd.Series(steps.index.to_numpy(dtype="float64"), index=steps.index)
    if currency == "seconds":
        seconds = run.result.get("timing", {}).get("training_seconds")
        return None if not seconds or not len(steps) or not steps.iloc[-1] else steps / steps.iloc[-1] * seconds
    key = "updates" if currency == "updates" else "update"
    phases = run.result.get("arithmetic") or []
    if not phases or not len(steps):
        return None
    a_batch = np.zeros(len(steps))
    for phase in phases:  # in the order of the epochs, counted from 0, from which they hold
        # Counted on few samples; multiply-accumulates, not updates, grow with the batch.
        times = 1.0 if currency == "updates" else run.setting("batch_size", 1) / phase["samples"]
        a_batch[steps.index > phase["from_epoch"]] = phase[key] * times
    return pd.Series(np.cumsum(np.diff(steps, prepend=0.0) * a_batch), index=steps.index)


def located(run: Run, key: str, currency: Currency) -> pd.Series[float] | None:
    """The cost of a run at the points where the values of a curve hold, by epoch.

    Training loss and accuracy are means over an epoch, so they hold in its middle; placed at its end they would
    penalise the arm that does most in an epoch. Everything else is measured at the end.
    """
    ends = spent(run, currency)
    if ends is None or not key.endswith(("/train", "/train_joint")):
        return ends
    return ends - ends.diff().fillna(0.0) / 2


def cost_of(
    run: Run, level: float, currency: Currency = "epochs", key: str = "loss/train", between: bool = True
) -> float | None:
    """The cost of a run when its loss first is at or below a level.

    Args:
        run: The run.
        level: In the unit of the curve.
        currency: In which to count.
        key: The curve.
        between: Interpolate log(loss) linearly between records; otherwise count whole epochs, as the published figures
            do. A level above the first record costs all that was spent up to it.

    Returns:
        None if it never is, or if the run does not record its cost.
    """
    curve, budget = run.curve(key), located(run, key, currency) if between else spent(run, currency)
    below = curve.index[curve <= level]
    if not len(below) or budget is None:
        return None
    epoch = below[0]
    before = curve.index[curve.index < epoch]
    here = float(budget[epoch])
    if not between or not len(before) or level <= 0 or curve[epoch] <= 0 or not math.isfinite(curve[before[-1]]):
        return here
    there = float(budget[before[-1]])
    above, under = math.log(curve[before[-1]]), math.log(curve[epoch])
    return there + (here - there) * (above - math.log(level)) / (above - under)


def levels_reached(runs: Iterable[Run], levels: Sequence[float], key: str = "loss/train") -> list[float]:
    """The levels that every run reaches after its first record, so that all costs are known."""
    curves = [run.curve(key) for run in runs]
    return [level for level in levels if curves and all(_crosses(curve, level) for curve in curves)]


def _crosses(curve: pd.Series[float], level: float) -> bool:
    return len(curve) > 0 and bool(curve.iloc[0] > level) and bool((curve <= level).any())


# --- groups of runs --------------------------------------------------------------------------------------------------


def by_seed(runs: Iterable[Run], read: Callable[[Run], float | None]) -> dict[Hashable, float | None]:
    """A number of each run, by seed; None for a seed with two runs of different settings.

    Such runs do not belong to one arm, and using either would be a choice. Runs of equal settings count once.
    """
    of_seed: dict[int, dict[object, Run]] = defaultdict(dict)
    for run in runs:
        of_seed[run.seed][run.result.get("settings_hash")] = run
    return {seed: read(next(iter(same.values()))) if len(same) == 1 else None for seed, same in of_seed.items()}


def grouped(runs: Iterable[Run], *keys: str) -> dict[tuple[object, ...], list[Run]]:
    """Runs grouped by the values of settings; a key that names a config group means its choice (`method`: `bfp`)."""
    groups: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(_plain(run.choice(key) or run.setting(key)) for key in keys)].append(run)
    return dict(sorted(groups.items(), key=lambda item: [natural(str(part)) for part in item[0]]))


def _plain(value: object) -> object:
    return value if isinstance(value, Hashable) else json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class Chosen:
    """The setting of an arm with the best validation score.

    Attributes:
        setting: The values of the chosen keys.
        runs: The arm's runs at this setting, one a seed.
        score: Their mean on validation data.
        tried: The number of settings to choose from.
    """

    setting: tuple[object, ...]
    runs: tuple[Run, ...]
    score: float
    tried: int


def choose(runs: Iterable[Run], *keys: str, by: str = "accuracy/validation") -> Chosen | None:
    """Choose an arm's setting by the mean over seeds of a validation metric after the last epoch.

    A diverged run counts as a guess. Only settings with the largest number of seeds take part, since a mean over fewer
    seeds is more often high by luck. Ties go to the first setting in natural order.

    Args:
        runs: The arm's, over all settings and seeds.
        keys: The settings to choose, such as `lr`.
        by: A metric on validation data; higher is better.

    Returns:
        None if no run has the metric.
    """
    if not by.endswith("/validation"):
        raise ValueError(f"settings are chosen on validation data only, not by {by}")
    scored = {
        setting: (members, [score for run in members if (score := run.final(by)) is not None])
        for setting, members in grouped(runs, *keys).items()
    }
    most = max((len(scores) for _, scores in scored.values()), default=0)
    full = {setting: pair for setting, pair in scored.items() if most and len(pair[1]) == most}
    if not full:
        return None
    means = {setting: float(np.mean(scores)) for setting, (_, scores) in full.items()}
    best = max(means, key=lambda setting: means[setting])
    return Chosen(best, tuple(full[best][0]), means[best], len(full))
