"""What experiments measure: a number of each run, and how it compares two arms seed by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd

from backforward_suite.report import statistics
from backforward_suite.report.finding import Estimate
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Currency, Effect
from backforward_suite.runs.files import DONE

Runs = Sequence[Run]
PERCENT = (0.0, 100.0)
Read = Callable[[Run], float | None]
# Fixed in advance, so that nobody chooses the level at which arms are compared.
LOSS_LEVELS = tuple(lead * 10.0**power for power in range(0, -7, -1) for lead in (7, 5, 3, 2, 1))


@dataclass(frozen=True)
class Measure:
    """A number of each run.

    Attributes:
        name: Its name, such as `training loss after the last epoch`.
        read: Reads it; returns None if a run does not have it.
        unit: The unit of its mean over seeds.
        ratio: Whether arms are compared by ratio rather than by difference.
        points: The unit of the difference, if it is not `unit`.
        bounds: The range of its values; intervals are cut off there.
        versus: Compares two arms if the numbers alone cannot, for example at a loss that both reach.
    """

    name: str
    read: Read
    unit: str = ""
    ratio: bool = False
    points: str = ""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    versus: Callable[[Runs, Runs, str], Effect] | None = None

    def mean(self, runs: Runs) -> Estimate:
        """The mean over seeds with its interval."""
        found = statistics.by_seed(runs, self.read).values()
        mean = statistics.mean([value for value in found if value is not None], self.unit)
        if mean.low is None or mean.high is None:
            return mean
        return replace(mean, low=max(mean.low, self.bounds[0]), high=min(mean.high, self.bounds[1]))

    def sample(self, runs: Runs, label: str) -> Effect:
        """The number itself, one value a seed."""
        found = statistics.by_seed(runs, self.read)
        values = tuple(value for value in found.values() if value is not None)
        return Effect(label, values, unit=self.unit, lost=len(found) - len(values), images=images(runs))

    def compare(self, ours: Runs, theirs: Runs, label: str = "") -> Effect:
        """One arm against another, paired by seed."""
        if self.versus is not None:
            found = self.versus(ours, theirs, label)
        else:
            one, other = (statistics.by_seed(arm, self.read) for arm in (ours, theirs))
            found = statistics.paired(one, other, label, ratio=self.ratio, unit=self.points or self.unit)
        return replace(found, images=images([*ours, *theirs]))


def images(runs: Iterable[Run]) -> int | None:
    """The fewest training images that the settings of one of these runs ask for; None without any training."""
    return min((run.images for run in runs), default=None)


def done(runs: Iterable[Run]) -> list[Run]:
    """The runs that have a result, diverged ones included."""
    return [run for run in runs if run.status in DONE]


def final(key: str, times: float = 1.0) -> Read:
    """Reads a number after the last epoch."""
    return lambda run: None if (value := run.final(key)) is None else times * value


def finished(read: Read) -> Read:
    """Reads nothing of a diverged run."""
    return lambda run: None if run.status == "diverged" else read(run)


def curve_of(run: Run, key: str) -> pd.Series[float]:
    """A curve from the first epoch on."""
    curve = run.curve(key)
    return curve[curve.index > 0]


def settled(curve: pd.Series[float], within: float) -> int | None:
    """The first epoch from which a curve stays within a distance of its last value; None if it is empty."""
    if curve.empty:
        return None
    far = curve.index[(curve - curve.iloc[-1]).abs() > within]
    return int(curve.index[0]) if not len(far) else int(curve.index[curve.index > far[-1]][0])


# --- the cost of a loss ----------------------------------------------------------------------------------------------


def common_level(runs: Runs, key: str = "loss/train") -> float | None:
    """The lowest of the fixed loss levels that every run reaches, after its first recorded epoch."""
    return min(statistics.levels_reached(runs, LOSS_LEVELS, key), default=None)


def cost_effect(ours: Runs, theirs: Runs, label: str, currency: Currency = "epochs", key: str = "loss/train") -> Effect:
    """Ratio of the costs of the lowest level that all runs of both arms reach.

    Without such a level the effect has no values. Its note then says which arm was first at the lowest level that half
    of the runs reach, with a sign test in which runs that never reach it come last. Seconds are compared only between
    runs that were timed under the same conditions; other pairs are lost.
    """
    both = [*ours, *theirs]
    level = common_level(both, key) if ours and theirs else None
    if level is not None:
        cost = partial(statistics.cost_of, level=level, currency=currency, key=key)
        return _timed(ours, theirs, label, cost) if currency == "seconds" else ratio(ours, theirs, label, cost)
    empty = Effect(label, (), ratio=True)
    seeds = sorted({run.seed for run in ours} & {run.seed for run in theirs})
    if not seeds:
        return empty
    reached = [x for x in LOSS_LEVELS if 2 * sum(bool((run.curve(key) <= x).any()) for run in both) >= len(both)]
    if not reached:
        return replace(empty, lost=len(seeds), note="neither arm learns")
    cost = partial(statistics.cost_of, level=min(reached), currency=currency, key=key)
    costs = [statistics.by_seed(arm, cost) for arm in (ours, theirs)]
    won, lost, p = statistics.sign_test(*([of_arm[seed] for seed in seeds] for of_arm in costs))
    first = f"at {min(reached):g} first in {won} of {won + lost} pairs, sign test p = {p:.2g}"
    return replace(empty, lost=len(seeds), note=f"no level that all runs reach; {first}")


def ratio(ours: Iterable[Run], theirs: Iterable[Run], label: str, read: Read) -> Effect:
    """Ratio of a number, paired by seed."""
    return statistics.paired(statistics.by_seed(ours, read), statistics.by_seed(theirs, read), label, ratio=True)


def _timed(ours: Runs, theirs: Runs, label: str, read: Read) -> Effect:
    """Ratio of times, of those pairs whose runs had the same machine, threads and number of runs in a stack."""
    conditions = [{run.seed: _timed_on(run) for run in arm} for arm in (ours, theirs)]
    apart = {seed for seed, of in conditions[0].items() if conditions[1].get(seed, of) != of}
    one, other = ([run for run in arm if run.seed not in apart] for arm in (ours, theirs))
    found = ratio(one, other, label, read)
    note = f"{len(apart)} pairs differ in hardware, threads or runs in a stack" if apart else ""
    return replace(found, lost=found.lost + len(apart), note=note)


def _timed_on(run: Run) -> tuple[object, ...]:
    timing = run.result.get("timing", {})
    return run.hardware, timing.get("threads"), timing.get("stacked", 1)


def _seconds(run: Run) -> float | None:
    seconds: float | None = run.result.get("timing", {}).get("training_seconds")
    return seconds


def _macs(run: Run) -> float | None:
    spent = statistics.spent(run, "macs")
    return None if spent is None or not len(spent) else float(spent.iloc[-1])


# --- the largest learning rate ---------------------------------------------------------------------------------------


def trains(run: Run) -> bool:
    """Whether a run finished with a training loss below that of a guess."""
    loss, classes = run.final("loss/train"), int(run.result.get("data", {}).get("classes") or 10)
    return run.status == "finished" and loss is not None and loss < math.log(classes)


def largest_lr(runs: Iterable[Run]) -> dict[Hashable, float | None]:
    """For each seed, the largest learning rate of the grid up to which all train; None if not even the first does."""
    found: dict[Hashable, float | None] = {}
    for seed, by_lr in _by_seed_and_lr(runs).items():
        lrs = sorted(by_lr)
        first = _first_failing([by_lr[lr] for lr in lrs])
        found[seed] = lrs[first - 1] if first else None
    return found


def larger_lr(ours: Runs, theirs: Runs, label: str) -> Effect:
    """The largest learning rate that trains in one arm over that of another, seed by seed.

    Only rates that both arms have run are compared. The grid brackets a limit: it lies between the last rate that
    trains and the first that does not. A value is the ratio of the middles of the two brackets; the effect's `reach` is
    what the brackets leave open. If an arm trains at all rates, or at none, its limit is taken to lie one more step
    away. A pair in which both arms do so says nothing and is left out.
    """
    one, other = (_by_seed_and_lr(arm) for arm in (ours, theirs))
    seeds = sorted({*one, *other})
    values, reaches, tops, bottoms = [], [], [], []
    for seed in seeds:
        pair = one.get(seed, {}), other.get(seed, {})
        lrs = sorted(pair[0].keys() & pair[1].keys())
        limits = [_first_failing([arm[lr] for lr in lrs]) for arm in pair]
        if lrs and min(limits) == len(lrs):
            tops.append(lrs[-1])
        elif lrs and max(limits) == 0:
            bottoms.append(lrs[0])
        elif len(lrs) > 1:
            grid = np.log([lrs[0] ** 2 / lrs[1], *lrs, lrs[-1] ** 2 / lrs[-2]])
            middles, reach = np.transpose([((grid[k] + grid[k + 1]) / 2, (grid[k + 1] - grid[k]) / 2) for k in limits])
            values.append(float(middles[0] - middles[1]))
            reaches.append(float(sum(reach)))
    notes = []
    if tops:
        both = f"both train at the largest of the grid, {max(tops):g}"
        notes.append(f"{len(tops)} of {len(seeds)} pairs left out: {both}")
    if bottoms:
        neither = f"neither trains at the smallest of the grid, {min(bottoms):g}"
        notes.append(f"{len(bottoms)} of {len(seeds)} pairs left out: {neither}")
    if any(one.get(seed, {}).keys() != other.get(seed, {}).keys() for seed in seeds) and (values or notes):
        notes.append("learning rates that only one of the arms has run are left out")
    lost = len(seeds) - len(values) - len(tops) - len(bottoms)
    reach_ = float(np.mean(reaches)) if reaches else 0.0
    if reaches:
        notes.append(f"the grid leaves a factor of {math.exp(reach_):.2f} open in each pair")
    return Effect(label, tuple(values), ratio=True, lost=lost, note="; ".join(notes), reach=reach_)


def _first_failing(runs: Sequence[Run]) -> int:
    return next((k for k, run in enumerate(runs) if not trains(run)), len(runs))


def _by_seed_and_lr(runs: Iterable[Run]) -> dict[int, dict[float, Run]]:
    found: dict[int, dict[float, Run]] = {}
    for run in runs:
        found.setdefault(run.seed, {})[float(run.setting("lr"))] = run
    return found


# --- what most experiments measure -----------------------------------------------------------------------------------


def cost(currency: Currency, words: str) -> Measure:
    """The cost of the lowest training loss that both arms reach."""
    return Measure(f"{words} to the loss", final("epoch"), ratio=True, versus=partial(cost_effect, currency=currency))


def _gap(run: Run) -> float | None:
    test, train = run.final("loss/test"), run.final("loss/train")
    return None if test is None or train is None else test - train


LOSS = Measure("training loss after the last epoch", final("loss/train"), ratio=True)
TEST = Measure("test accuracy, %", final("accuracy/test", 100), points="points", bounds=PERCENT)
VALIDATION = Measure("validation accuracy, %", final("accuracy/validation", 100), points="points", bounds=PERCENT)
GAP = Measure("gap, test minus training loss", finished(_gap), "nats", points="nats")
EPOCHS, ARITHMETIC, TIME = cost("epochs", "epochs"), cost("macs", "multiply-accumulates"), cost("seconds", "seconds")
UPDATES = cost("updates", "updates of a weight")
SPENT = Measure("multiply-accumulates of all training", _macs, ratio=True)
DURATION = Measure("seconds of all training", _seconds, ratio=True, versus=partial(_timed, read=_seconds))
LARGEST = Measure("largest learning rate that trains", lambda _: None, ratio=True, versus=larger_lr)
