"""What the modules of experiments share: rows of effects, tables, curves over seeds, the finding around them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import matplotlib.figure
import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.ticker import NullFormatter

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.finding import Estimate, Figure, Finding, Table, Verdict
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import LEVEL, Effect
from backforward_suite.report.verdicts import Ground
from backforward_suite.runs.files import DONE

INTERVALS = (
    "Mean [95 % interval] over seeds: Student's t, or the BCa bootstrap where it is made (fewer than 10 values, or "
    "heavy tails) and is wider."
)
# Fixed beforehand, so that the level at which arms are compared is nobody's choice.
LOSS_LEVELS = tuple(lead * 10.0**power for power in range(0, -7, -1) for lead in (7, 5, 3, 2, 1))


def done(runs: Iterable[Run], **settings: object) -> list[Run]:
    """The runs `at` some settings that have a result, a diverged one included."""
    return [run for run in at(runs, **settings) if run.status in DONE]


def arms(runs: Iterable[Run], key: str = "method") -> dict[str, list[Run]]:
    """Runs by the choice of a group, or by a setting."""
    return {str(value): members for (value,), members in statistics.grouped(runs, key).items()}


def at(runs: Iterable[Run], **settings: object) -> list[Run]:
    """The runs of some settings: `norm="prop"`, `lr=0.1`, `data__augment="flip"`.

    Two underscores stand for a dot. A key that names a group of choices is compared with the choice.
    """
    wanted = {key.replace("__", "."): value for key, value in settings.items()}
    return [
        run for run in runs if all(_equal(run.choice(key) or run.setting(key), value) for key, value in wanted.items())
    ]


def _equal(found: object, value: object) -> bool:
    if isinstance(found, int | float) and isinstance(value, int | float):
        return math.isclose(found, value)
    return found == value


def numbers(runs: Iterable[Run], key: str) -> list[float]:
    """The values of a numeric setting, in order."""
    found = {float(value) for run in runs if isinstance(value := run.setting(key), int | float)}
    return sorted(found)


def cells(runs: Sequence[Run], *keys: str) -> dict[tuple[float, ...], dict[str, list[Run]]]:
    """By the values of numeric settings, such as learning rate and batch size: the arms of each, by method."""
    grid = itertools.product(*(numbers(runs, key) for key in keys))
    return {
        place: arms(members)
        for place in grid
        if (members := at(runs, **dict(zip((key.replace(".", "__") for key in keys), place, strict=True))))
    }


# --- effects ---------------------------------------------------------------------------------------------------------


def effect(
    ours: Sequence[Run],
    theirs: Sequence[Run],
    read: Callable[[Run], float | None],
    label: str,
    *,
    ratio: bool = False,
    unit: str = "",
) -> Effect:
    """A number of one arm against another's, paired by seed."""
    return statistics.paired(
        statistics.by_seed(ours, read), statistics.by_seed(theirs, read), label, ratio=ratio, unit=unit
    )


def points(ours: Sequence[Run], theirs: Sequence[Run], key: str, label: str = "") -> Effect:
    """Difference of a share (an accuracy), in points of a percent."""
    return effect(ours, theirs, percent(key), label, unit="points")


def percent(key: str) -> Callable[[Run], float | None]:
    """Reads a share after the last epoch, in percent."""

    def read(run: Run) -> float | None:
        share = run.final(key)
        return None if share is None else 100 * share

    return read


def common_level(runs: Sequence[Run], key: str = "loss/train") -> float | None:
    """The lowest of the fixed loss levels that every run reaches, after its first recorded epoch."""
    return min(statistics.levels_reached(runs, LOSS_LEVELS, key), default=None)


def cost_effect(
    ours: Sequence[Run],
    theirs: Sequence[Run],
    label: str,
    currency: statistics.Currency = "epochs",
    key: str = "loss/train",
) -> Effect:
    """Ratio of what it costs both arms to reach the lowest level that all of their runs reach.

    Where there is no such level the effect has no values; its note then tells who was first at the lowest level that
    half of the runs reach, with a sign test in which those who never arrive come last. Seconds are compared between
    runs alone that were timed alike; other pairs are lost.
    """
    both = [*ours, *theirs]
    level = common_level(both, key) if ours and theirs else None
    if level is not None:
        cost = partial(statistics.cost_of, level=level, currency=currency, key=key)
        apart = _timed_apart(ours, theirs) if currency == "seconds" else set()
        pairs = [[run for run in arm if run.seed not in apart] for arm in (ours, theirs)]
        found = effect(pairs[0], pairs[1], cost, label, ratio=True)
        note = f"{len(apart)} pairs differ in hardware, threads or runs in a stack" if apart else ""
        return replace(found, lost=found.lost + len(apart), note=note)
    empty = Effect(label, (), ratio=True)
    seeds = sorted({run.seed for run in ours} & {run.seed for run in theirs})
    if not seeds:
        return empty
    reached = [
        level for level in LOSS_LEVELS if 2 * sum(bool((run.curve(key) <= level).any()) for run in both) >= len(both)
    ]
    if not reached:
        return replace(empty, lost=len(seeds), note="neither arm learns")
    cost = partial(statistics.cost_of, level=min(reached), currency=currency, key=key)
    costs = [statistics.by_seed(arm, cost) for arm in (ours, theirs)]
    won, lost, p = statistics.sign_test(*([of_arm[seed] for seed in seeds] for of_arm in costs))
    first = f"at {min(reached):g} first in {won} of {won + lost} pairs, sign test p = {p:.2g}"
    return replace(empty, lost=len(seeds), note=f"no level that all runs reach; {first}")


def _timed_apart(ours: Iterable[Run], theirs: Iterable[Run]) -> set[int]:
    """Seeds whose two runs did not have the same machine, threads and number of runs in a stack."""
    conditions = [{run.seed: _timed_on(run) for run in arm} for arm in (ours, theirs)]
    return {seed for seed, of in conditions[0].items() if conditions[1].get(seed, of) != of}


def _timed_on(run: Run) -> tuple[object, ...]:
    timing = run.result.get("timing", {})
    return run.hardware, timing.get("threads"), timing.get("stacked", 1)


def trains(run: Run) -> bool:
    """Whether it ended with a training loss below that of a guess."""
    loss, classes = run.final("loss/train"), int(run.result.get("data", {}).get("classes") or 10)
    return run.status == "finished" and loss is not None and loss < math.log(classes)


def largest_lr(runs: Iterable[Run]) -> dict[Hashable, float | None]:
    """By seed, the largest learning rate of the grid up to which all train; None: not even the first does."""
    found: dict[Hashable, float | None] = {}
    for (seed,), members in statistics.grouped(runs, "seed").items():
        found[int(str(seed))] = None
        for run in sorted(members, key=lambda run: float(run.setting("lr"))):
            if not trains(run):
                break
            found[int(str(seed))] = float(run.setting("lr"))
    return found


def larger_lr(ours: Sequence[Run], theirs: Sequence[Run], label: str) -> Effect:
    """The largest learning rate that trains in one arm over that of another, seed by seed.

    Of a seed those rates alone are compared that both arms have run, and a limit is known no better than the grid: it
    lies somewhere between the last rate that trains and the first that does not. A value is the ratio of the middles
    of these brackets, and the effect's `reach` what they leave open. An arm that trains at all rates, or at none, is
    taken to have its limit one more step away; a pair of which both do says nothing, and is left out.
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
            middles, reach = (
                [(grid[k] + grid[k + 1]) / 2 for k in limits],
                [(grid[k + 1] - grid[k]) / 2 for k in limits],
            )
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
    mean_reach = float(np.mean(reaches)) if reaches else 0.0
    return Effect(label, tuple(values), ratio=True, lost=lost, note="; ".join(notes), reach=mean_reach)


def _first_failing(runs: Sequence[Run]) -> int:
    """How many of these train before the first that does not."""
    return next((k for k, run in enumerate(runs) if not trains(run)), len(runs))


def _by_seed_and_lr(runs: Iterable[Run]) -> dict[int, dict[float, Run]]:
    found: dict[int, dict[float, Run]] = {}
    for run in runs:
        found.setdefault(run.seed, {})[float(run.setting("lr"))] = run
    return found


# --- tables ----------------------------------------------------------------------------------------------------------


def table(title: str, rows: Sequence[Mapping[str, object]], note: str = "") -> Table:
    """A table of strings; a row without a column, or with None there, gets a dash."""
    frame = pd.DataFrame([{key: "-" if cell is None else str(cell) for key, cell in row.items()} for row in rows])
    return Table(title, frame.fillna("-"), note)


def shown(found: Effect) -> str | None:
    """An effect in a cell, with what it lacks; its note where it has no values."""
    if not found.values:
        return found.note or None
    lacks = f" ({len(found.values)} of {len(found.values) + found.lost} pairs)" if found.lost else ""
    return f"{found.estimate()}{lacks}"


def effects_table(title: str, effects: Sequence[Effect], heading: str, note: str = "") -> Table:
    """A row an effect: what it is, its interval, p as Holm corrects it over the rows."""
    rows = [
        {
            heading: effect.label,
            "difference [95 %]": effect.estimate(),
            "pairs": len(effect.values),
            "p, corrected": p_text(effect.corrected_p),
            **({"remark": effect.note} if any(each.note for each in effects) else {}),
        }
        for effect in statistics.holm(effects)
    ]
    return table(title, rows, " ".join(filter(None, [note, correction_note(len(rows))])))


def p_text(p: float | None) -> str | None:
    """A corrected p in a cell."""
    return None if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def mean_cell(runs: Sequence[Run], read: Callable[[Run], float | None], unit: str = "", times: float = 1.0) -> str:
    """The mean over seeds with its interval, and how many runs diverged."""
    estimate = estimate_of(runs, read, unit, times)
    diverged = sum(run.status == "diverged" for run in runs)
    return f"{estimate}" + (f" ({diverged} of {len(runs)} diverged)" if diverged else "")


def estimate_of(
    runs: Sequence[Run], read: Callable[[Run], float | None], unit: str = "", times: float = 1.0
) -> Estimate:
    """The mean over seeds of a number of each run, times a factor."""
    found = statistics.by_seed(runs, read).values()
    return statistics.mean([times * value for value in found if value is not None], unit)


def correction_note(rows: int) -> str:
    """How p was corrected."""
    return f"p: t test, Holm's correction over the {rows} rows." if rows > 1 else "p: t test."


# --- curves ----------------------------------------------------------------------------------------------------------


def curve(
    runs: Sequence[Run],
    key: str,
    currency: statistics.Currency = "epochs",
    *,
    logs: bool = False,
    times: float = 1.0,
    whole: bool = False,
) -> pd.DataFrame:
    """A curve's mean over seeds with its pointwise t interval, for `style.band`.

    Args:
        runs: One arm's, one a seed.
        key: The curve.
        currency: Of the horizontal axis; where seeds differ (seconds) their mean.
        logs: Average logarithms, as suits a loss on a logarithmic axis.
        times: A factor of the values.
        whole: Draw each value at its epoch's end, as published ones are, though it may be a mean over the epoch.

    Returns:
        Index: what was spent. Columns `value`, `low`, `high`. Epochs that some run does not have are left out.
    """
    empty = pd.DataFrame(columns=["value", "low", "high"], dtype="float64")
    curves = [run.curve(key) for run in runs]
    found = [statistics.spent(run, currency) if whole else statistics.located(run, key, currency) for run in runs]
    costs = [cost for cost in found if cost is not None]
    if not curves or len(costs) < len(curves):
        return empty
    values = pd.concat(curves, axis=1, join="inner") * times
    values = values[np.isfinite(values).all(axis=1)]
    if logs:
        values = np.log(values[(values > 0).all(axis=1)])
    if values.empty:
        return empty
    frame = _pointwise(values)
    frame = np.exp(frame) if logs else frame
    frame.index = pd.concat(costs, axis=1).loc[frame.index].mean(axis=1).to_numpy()
    return frame


def ratio_curve(ours: Sequence[Run], theirs: Sequence[Run], key: str) -> pd.DataFrame:
    """One arm's curve over another's: geometric mean of the pairs with its pointwise t interval, by whole epochs."""
    others = {run.seed: run.curve(key) for run in theirs}
    pairs = [run.curve(key) / others[run.seed] for run in ours if run.seed in others]
    logs = np.log(pd.concat(pairs, axis=1, join="inner")) if pairs else pd.DataFrame()
    return np.exp(_pointwise(logs[np.isfinite(logs).all(axis=1)]))


def _pointwise(values: pd.DataFrame) -> pd.DataFrame:
    """Mean over the columns of each row, with its t interval."""
    centre, n = values.mean(axis=1), values.shape[1]
    width = float(scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1)) / math.sqrt(n) if n > 1 else math.nan
    reach = width * values.std(axis=1, ddof=1)
    return pd.DataFrame({"value": centre, "low": centre - reach, "high": centre + reach}, dtype="float64")


def panels(
    count: int, *, sharex: bool = False, sharey: bool = False
) -> tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]:
    """A figure of so many panels, two in a row."""
    columns = min(2, max(1, count))
    figure, axes = style.canvas(max(1, -(-count // columns)), columns, sharex=sharex, sharey=sharey)
    for spare in list(axes.flat)[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat)[:count]


def draw_ratios(shown: Mapping[str, Mapping[str, Sequence[Run]]]) -> matplotlib.figure.Figure:
    """Training loss of Backforward over that of SGD, epoch by epoch: by title of a panel, its arms."""
    figure, axes = panels(len(shown), sharey=True)
    for panel, (title, of_method) in zip(axes, shown.items(), strict=True):
        panel.axhline(1, color="0.35", linewidth=0.9)
        frame = ratio_curve(of_method.get("bfp", []), of_method.get("sgd", []), "loss/train")
        style.band(panel, style.look("bfp"), frame)
        panel.set(title=title, xlabel="epochs", ylabel="training loss, BFP / SGD")
    return figure


def draw_over(
    effects: Mapping[tuple[float, ...], Effect], values: str, ratio: str, tolerance: float = 0.0
) -> matplotlib.figure.Figure:
    """Ratios over a number that is doubled (batch size, depth), a line for each learning rate.

    Args:
        effects: By learning rate and number. Where they are far apart, their axis is logarithmic.
        values: What the number is.
        ratio: What the ratio is.
        tolerance: What counts as no difference.
    """
    figure, axes = style.canvas()
    panel = axes[0, 0]
    places = sorted({place for _, place in effects})
    if tolerance:
        panel.axhspan(1 / (1 + tolerance), 1 + tolerance, color="0.93", zorder=0)
    panel.axhline(1, color="0.35", linewidth=0.9)
    estimates = {at: found.estimate() for at, found in effects.items()}
    for lr, of in style.sequence(sorted({lr for lr, _ in effects}), "lr {:g}").items():
        style.points(panel, of, places, [estimates.get((lr, place)) for place in places])
    style.at_values(panel, places)
    reached = [found.value for found in estimates.values() if found.value is not None]
    if reached and max(reached) > 3 * min(reached):  # else one that fails would press all others flat
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}" if max(reached) < 8 * min(reached) else NullFormatter())
    panel.set(xlabel=values, ylabel=ratio)
    style.legend(figure)
    return figure


# --- the finding -----------------------------------------------------------------------------------------------------


def by_word(claims: Sequence[Claim]) -> dict[str, Claim]:
    """Claims by the word after the dot of their id."""
    return {claim.word: claim for claim in claims}


def hardware(runs: Iterable[Run]) -> str:
    """What runs were made on: device and threads, each combination once."""
    told = []
    for run in runs:
        threads = run.result.get("timing", {}).get("threads")
        plural = "thread" if threads == 1 else "threads"
        told.append(run.hardware + (f", {threads} {plural} a run" if threads else ""))
    return "; ".join(dict.fromkeys(told))


def setting_of(runs: Sequence[Run]) -> str:
    """On what the runs were made and how long, in one line."""
    origins = (run.result.get("data", {}) for run in runs)
    data = dict.fromkeys(f"{of.get('name')} ({of.get('train'):,} training images)" for of in origins if of.get("train"))
    epochs, seeds = sorted({int(run.setting("max_epochs", 0)) for run in runs}), sorted({run.seed for run in runs})
    widths = sorted({run.setting("model.width") for run in runs if run.setting("model.width")})
    parts = [
        ", ".join(data),
        f"{', '.join(map(str, epochs))} {'epoch' if epochs == [1] else 'epochs'}",
        f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}",
        f"NIN at width {', '.join(f'{width:g}' for width in widths)}" if widths else "",
    ]
    return "; ".join(filter(None, parts))


def finding(
    experiment: str,
    question: str,
    runs: Sequence[Run],
    claims: Sequence[Claim],
    scale: str,
    verdicts_: Sequence[Verdict],
    tables: Sequence[Table] = (),
    figures: Sequence[Figure] = (),
    notes: Sequence[str] = (),
) -> Finding:
    """The finding around verdicts, tables and figures; a claim without a verdict is `not run`."""
    ground = Ground.of(runs, scale)
    judged = {verdict.claim.id for verdict in verdicts_}
    rest = [verdicts.not_run(claim, scale) for claim in claims if claim.id not in judged]
    failed = [f"Not there: {missing}." for missing in ground.missing]
    if ground.awaited:
        failed.append(f"{len(ground.awaited)} of the planned runs are not done: {verdicts.some(ground.awaited)}.")
    ended = done(runs)
    trained = [run for run in ended if len(run.metrics)]  # not a study
    if not ended:
        notes = [
            f"Nothing has been run. `make reproduce ONLY={experiment} SCALE={scale}` runs it; where its data cannot be "
            "had, that says what to do, and with `STAND_IN=1` it runs on scikit-learn's digits, marked as stand-ins."
        ]
    return Finding(
        experiment=experiment,
        question=question,
        verdicts=(*verdicts_, *rest),
        tables=tuple(part for part in tables if not part.frame.empty) if ended else (),
        figures=tuple(figures) if ended else (),
        runs=tuple(runs),
        scale=scale,
        hardware=hardware(ended),
        notes=(*([setting_of(trained)] if trained else []), *notes, *failed),
        stand_in=any(verdict.kind == "stand-in data" for verdict in verdicts_)
        or any(ground.stands_in(verdict.claim) for verdict in rest),
    )
