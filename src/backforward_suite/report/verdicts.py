"""From estimates to verdicts: five rules, and what scale, data and missing runs allow to be said.

direction  An effect of a claimed sign, in each row of a table (a learning rate, a data set). A row speaks for the claim
           if its 95 % interval and Holm's correction over the rows exclude "no difference" on the claimed side and the
           interval is not wholly within the tolerance; against it if they exclude it on the other side, or if the
           interval lies wholly within the tolerance: there is no effect worth the name. Else the row is open.
           Where the claim is that the effect is not there (`negated`), for and against change places in each row.
value      Published numbers: ours agrees where its interval lies within the tolerance about the number, disagrees
           where the interval (Bonferroni's level over the rows) lies wholly outside. At paper scale only.
identity   The same for what mathematics says must hold; scale does not matter but for smoke.
share      How often something happens: Wilson's interval (Bonferroni's level over the rows) against the share asked.
curve      Runs follow a published curve: the mean ratio over epochs, with its interval over seeds, is within the
           tolerance. They are off where it is wholly outside, and the published curve is not like one more seed of
           ours either (prediction interval): it is of one seed.

What a claim's rows say together is decided by its `over`: all (the default), most or any.

A verdict says no more than its runs allow: below paper scale it speaks of direction only, smoke is `inconclusive` at
most, runs on other data than the claim's are `stand-in data`, and no runs are `not run`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.stats

from backforward_suite.report import statistics
from backforward_suite.report.claims import Claim
from backforward_suite.report.finding import Estimate, Kind, Verdict
from backforward_suite.report.reading import Run, planned_and_not_done
from backforward_suite.report.statistics import LEVEL, Effect
from backforward_suite.runs.files import DONE

State = Literal["for", "against", "open"]
_KINDS: dict[State, Kind] = {"for": "reproduced", "against": "contradicted", "open": "inconclusive"}
NOTHING = "nothing to compare"


@dataclass(frozen=True)
class Ground:
    """What a verdict stands on.

    Attributes:
        scale: `smoke`, `small` or `paper`.
        runs: The runs behind it.
        missing: What ought to be there and is not, such as `bfp at lr 0.1`.
        awaited: Names of runs that sweeps have planned and that are not done. A verdict on part of a sweep would
            depend on where it happened to stand, so that it is open until they are.
    """

    scale: str
    runs: tuple[Run, ...]
    missing: tuple[str, ...] = ()
    awaited: tuple[str, ...] = ()

    @classmethod
    def of(cls, runs: Sequence[Run], scale: str, missing: Sequence[str] = ()) -> Ground:
        """The ground that the finished and diverged of these runs give; failed ones are missing."""
        failed = tuple(f"{run.name} (failed: {run.result.get('cause', 'no cause')})" for run in runs if not _done(run))
        there = tuple(run for run in runs if _done(run))
        return cls(scale, there, (*missing, *failed), planned_and_not_done(runs))

    def stands_in(self, claim: Claim) -> str:
        """Name of the data set that stands in for the claim's; empty where none does."""
        other = {run.data for run in self.runs if claim.data and run.data not in claim.data}
        return ", ".join(sorted(other))

    @property
    def diverged(self) -> int:
        """How many of the runs diverged."""
        return sum(run.status == "diverged" for run in self.runs)


def _done(run: Run) -> bool:
    return run.status in DONE


@dataclass(frozen=True)
class Row:
    """What one row of a table says of a claim."""

    label: str
    state: State
    estimate: Estimate
    why: str


# --- the rules -------------------------------------------------------------------------------------------------------


def direction(claim: Claim, effects: Sequence[Effect], ground: Ground) -> Verdict:
    """Judge a claim about the sign of an effect.

    Args:
        claim: Its `sign` is that of ours - theirs, or of log(ours / theirs).
        effects: All rows of the table: Holm's correction is over all of them, whichever the claim speaks of.
        ground: What they stand on.
    """
    rows = [_signed(claim, effect) for effect in statistics.holm(effects)]
    corrected = f"Holm's correction over {len(effects)} rows" if len(effects) > 1 else ""
    return _judged(claim, rows, ground, corrected)


def value(claim: Claim, measured: Sequence[Effect], ground: Ground, effects: Sequence[Effect] = ()) -> Verdict:
    """Compare numbers with published ones; below paper scale judge the sign of what lies between them, if anything.

    Args:
        claim: Its `published` has a number for each label of `measured`.
        measured: One a number: its values over seeds.
        ground: What they stand on.
        effects: The differences whose sign the published numbers show (claim's `sign`), for smaller scales; none where
            another claim is about that sign, lest one result counts twice.
    """
    if ground.scale != "paper" and ground.runs:
        shown = tuple(effect.estimate() for effect in measured)
        ours = _listed([Row(effect.label, "open", effect.estimate(), "") for effect in measured])
        if effects and "sign" in claim.arguments:
            judged = direction(claim, effects, ground)
            same = [effect.label for effect in measured] == [effect.label for effect in effects]
            told = judged.ours if same else f"{judged.ours}; numbers, not judged: {ours}"
            return replace(judged, ours=told, estimates=shown)
        why = "a published number is compared at paper scale only"
        return _grounded(claim, "open", ours, why, shown, ground)
    relative = bool(claim.arguments.get("relative"))
    rows = []
    for effect in measured:
        published = claim.published.get(effect.label)
        if published is None:
            raise KeyError(f"{claim.id} has no published number called {effect.label!r}")
        reach = _tolerance(claim) * (abs(published) if relative else 1)
        rows.append(_near(effect.label, effect, published, reach, claim.unit, len(measured)))
    corrected = f"Bonferroni's level over {len(rows)} rows" if len(rows) > 1 else ""
    return _judged(claim, rows, ground, corrected)


def identity(claim: Claim, measured: Sequence[Effect], ground: Ground) -> Verdict:
    """Compare what was measured with what mathematics says.

    Args:
        claim: Its `published` has a number for each label of `measured`.
        measured: One a number: its values over draws or seeds.
        ground: What they stand on.
    """
    rows = [
        _near(effect.label, effect, claim.published[effect.label], _tolerance(claim), claim.unit, len(measured))
        for effect in measured
    ]
    corrected = f"Bonferroni's level over {len(rows)} rows" if len(rows) > 1 else ""
    return _judged(claim, rows, ground, corrected, any_scale=True)


def share(claim: Claim, counts: Mapping[str, tuple[int, int]], ground: Ground) -> Verdict:
    """Judge how often something happens.

    Args:
        claim: Its `at_least` is the share asked for.
        counts: By row, how often it happened, of how many.
        ground: What they stand on.
    """
    asked = float(claim.arguments["at_least"])
    rows = []
    for label, (hits, n) in counts.items():
        level = 1 - (1 - LEVEL) / len(counts)
        wide = statistics.share(hits, n, level)
        state: State = "open"
        if wide.low is not None and wide.high is not None:
            # Asked for all, no sample can prove it: then one counterexample decides, and none must be seen.
            proved = hits == n if asked == 1 else wide.low > asked
            refuted = hits < n if asked == 1 else wide.high < asked
            state = "for" if proved else "against" if refuted else "open"
        words = {"for": "over", "against": "under", "open": "not told apart from"}[state]
        why = f"{words} the share asked for, {asked:.0%}" if n else NOTHING
        rows.append(Row(label, state, statistics.share(hits, n), why))
    corrected = f"Bonferroni's level over {len(rows)} rows" if len(rows) > 1 else ""
    return _judged(claim, rows, ground, corrected, any_scale=True)


def curve(claim: Claim, ratios: Sequence[Effect], ground: Ground, epochs: str) -> Verdict:
    """Judge whether runs follow a published curve.

    Args:
        claim: Its tolerance is that of the ratio.
        ratios: By row (a learning rate), for each seed the mean over epochs of log(ours / published).
        ground: What they stand on.
        epochs: Over which epochs, in words.
    """
    rows = []
    for effect in ratios:
        if not effect.values:
            rows.append(Row(effect.label, "open", effect.estimate(), effect.note or NOTHING))
            continue
        wide = effect.estimate(1 - (1 - LEVEL) / len(ratios))
        narrow = effect.estimate()
        state: State = "open"
        if _within(narrow, *_band(1.0, _tolerance(claim))):
            state = "for"
        elif _outside(wide, *_band(1.0, _tolerance(claim))) and not _like_another_seed(effect):
            state = "against"
        words = {"for": "follows it", "against": "is off", "open": "may or may not follow it"}[state]
        if state == "open" and len(effect.values) > 1:
            words += f", our own seeds differ by a factor of {math.exp(float(np.std(effect.values, ddof=1))):.2f}"
        rows.append(Row(effect.label, state, narrow, _remarked(words, effect)))
    corrected = f"Bonferroni's level over {len(rows)} rows" if len(rows) > 1 else ""
    return _judged(claim, rows, ground, "; ".join(filter(None, [epochs, corrected])), any_scale=True)


def not_run(claim: Claim, scale: str, missing: Sequence[str] = ()) -> Verdict:
    """Say that nothing was measured, and what to do."""
    lacking = f"missing: {some(missing)}; " if missing else ""
    why = f"{lacking}run `make reproduce ONLY={claim.experiment} SCALE={scale}`"
    return Verdict(claim, "not run", "nothing", why)


# --- rows ------------------------------------------------------------------------------------------------------------


def _signed(claim: Claim, effect: Effect) -> Row:
    found, equal, sign = effect.estimate(), effect.equality, int(claim.arguments["sign"])
    if found.value is None:
        return Row(effect.label, "open", found, effect.note or NOTHING)
    if not found.has_interval:
        return Row(effect.label, "open", found, _remarked("one pair of runs: no interval", effect))
    low, high = _band(equal, _tolerance(claim), effect.ratio)
    sure = effect.corrected_p is not None and effect.corrected_p < 1 - LEVEL
    beyond = sure and _outside(found, equal, equal)
    shows = (found.value > equal) == (sign > 0)
    denied = bool(claim.arguments.get("negated"))
    state: State = "open"
    if _within(found, low, high):
        # Paired runs may tell even an effect from none that is too small to speak of.
        told = "an effect too small to count" if beyond else "no effect"
        state, why = "for" if denied else "against", f"{told}: within {_number(low)} to {_number(high)}"
    elif beyond:
        state = "for" if shows != denied else "against"
        why = ("the effect that is denied" if denied else "as claimed") if shows else "the other way"
    else:
        why = "not told apart from no difference"
    return Row(effect.label, state, found, _remarked(why, effect))


def _near(label: str, effect: Effect, target: float, reach: float, unit: str, rows: int) -> Row:
    found = replace(effect.estimate(), unit=unit)
    if not effect.values:
        return Row(label, "open", found, effect.note or NOTHING)
    if len(effect.values) == 1 and effect.exact:
        found = replace(found, low=found.value, high=found.value, method="exact")
    wide = found if found.method == "exact" else effect.estimate(1 - (1 - LEVEL) / rows)
    state: State = "open"
    if _within(found, target - reach, target + reach):
        state = "for"
    elif _outside(wide, target - reach, target + reach):
        state = "against"
    words = {"for": "agrees with", "against": "differs from", "open": "may or may not agree with"}[state]
    return Row(label, state, found, _remarked(f"{words} {_number(target)} ± {_number(reach)}", effect))


def _remarked(why: str, effect: Effect) -> str:
    """With what a reader must know of a row that has values: its note, and what gave none."""
    return "; ".join(filter(None, [why, effect.note, statistics.told_lost(effect)]))


def _like_another_seed(effect: Effect) -> bool:
    """Whether 1 lies in the 95 % prediction interval of one more seed's ratio."""
    values = np.asarray(effect.values)
    n = len(values)
    if n < 2:
        return False
    reach = float(scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1)) * float(values.std(ddof=1)) * math.sqrt(1 + 1 / n)
    return abs(float(values.mean())) <= reach


def _tolerance(claim: Claim) -> float:
    assert claim.tolerance is not None, f"{claim.id} was read with one"
    return claim.tolerance


def _band(centre: float, reach: float, ratio: bool = True) -> tuple[float, float]:
    return (centre / (1 + reach), centre * (1 + reach)) if ratio else (centre - reach, centre + reach)


def _within(found: Estimate, low: float, high: float) -> bool:
    return found.low is not None and found.high is not None and low <= found.low and found.high <= high


def _outside(found: Estimate, low: float, high: float) -> bool:
    return found.low is not None and found.high is not None and (found.low > high or found.high < low)


# --- together --------------------------------------------------------------------------------------------------------


def _judged(claim: Claim, rows: Sequence[Row], ground: Ground, corrected: str, any_scale: bool = False) -> Verdict:
    wanted = claim.arguments.get("rows")
    asked = [row for row in rows if wanted is None or row.label in wanted]
    absent = [label for label in wanted or [] if label not in [row.label for row in rows]]
    ground = replace(ground, missing=(*ground.missing, *absent))
    # A row without a number may still have a reason why there is none; that is an open row, not a missing run.
    if not ground.runs or not any(row.estimate.value is not None or row.why != NOTHING for row in asked):
        return _or_stand_in(not_run(claim, ground.scale, ground.missing), ground)
    state = _together(asked, str(claim.arguments.get("over", "all")), complete=not absent)
    reasons = [_reasons(asked), corrected]
    if ground.awaited:
        state = "open"
        reasons.insert(0, f"open until all is run that was planned; not done: {some(ground.awaited)}")
    beside = [row for row in rows if row not in asked]
    if beside:
        reasons.append(f"not judged: {_reasons(beside, named=True)}")
    if ground.diverged:
        reasons.append(f"{ground.diverged} of {len(ground.runs)} runs diverged and count as the worst")
    if ground.missing:
        reasons.append(f"missing: {some(ground.missing)}")
    why = "; ".join(filter(None, reasons))
    estimates = tuple(row.estimate for row in rows)
    return _grounded(claim, state, _listed(asked), why, estimates, ground, any_scale)


def _together(rows: Sequence[Row], over: str, complete: bool) -> State:
    count = {state: sum(row.state == state for row in rows) for state in ("for", "against", "open")}
    n = len(rows)
    if over == "any":
        return "for" if count["for"] else "against" if count["against"] == n and complete else "open"
    if over == "most":
        return "for" if 2 * count["for"] > n else "against" if 2 * count["against"] > n else "open"
    return "against" if count["against"] else "for" if count["for"] == n and complete else "open"


def _grounded(
    claim: Claim,
    state: State,
    ours: str,
    why: str,
    estimates: tuple[Estimate, ...],
    ground: Ground,
    any_scale: bool = False,
) -> Verdict:
    """The verdict that this ground allows."""
    kind = _KINDS[state]
    ours = f"{ours} ({ground.scale} scale)"
    if ground.scale == "smoke":
        would = "" if kind == "inconclusive" else f" (it points to {kind})"
        kind, why = "inconclusive", f"smoke scale shows that it runs, no more{would}; {why}"
    elif ground.scale != "paper" and not any_scale and kind != "inconclusive":
        why = f"{why}; of the direction only, at {ground.scale} scale"
    other = ground.stands_in(claim)
    if other:
        why = f"on {other} in place of {' and '.join(claim.data)} it would be {kind}: {why}"
        kind = "stand-in data"
    return Verdict(claim, kind, ours, why, estimates)


def _or_stand_in(verdict: Verdict, ground: Ground) -> Verdict:
    other = ground.stands_in(verdict.claim)
    if not other:
        return verdict
    return replace(verdict, kind="stand-in data", why=f"on {other}, and nothing to judge: {verdict.why}")


def _listed(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.label}: {row.estimate}" if row.label else str(row.estimate) for row in rows)


def _reasons(rows: Sequence[Row], named: bool = False) -> str:
    """Why, each reason once, with the rows it holds for."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        labels.setdefault(row.why, []).append(row.label)
    if len(labels) == 1 and not named:
        return next(iter(labels))
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in labels.items())


def some(names: Sequence[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
