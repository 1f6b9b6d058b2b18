"""Turn estimates into verdicts: five rules, one correction, and what scale, data and missing runs allow to say.

direction  An effect of a claimed sign, in each row of a table (a learning rate, a data set). A row speaks for the claim
           if its interval excludes "no difference" on the claimed side and is not wholly within the tolerance. It
           speaks against it if the interval excludes "no difference" on the other side, or lies wholly within the
           tolerance. `negated`: the claim is that there is no effect of this sign. A row speaks for it if the interval
           leaves no room for an effect beyond the tolerance. Sign 0: there is no effect either way. A row speaks for it
           if the interval is within the tolerance, and against it if the interval is outside.
value      Published numbers: ours agrees if its interval is within the tolerance of the number, and disagrees if it is
           wholly outside. Only rows that were run under the paper's whole protocol are judged.
identity   The same for a mathematical identity, at any scale but smoke.
share      How often something happens: Wilson's interval against the share asked for. If that is 100 %, one
           counterexample decides.
curve      Runs follow a published curve: the mean ratio over epochs is within the tolerance. They deviate from it if it
           is wholly outside and the published curve is not like one more seed of ours either (prediction interval),
           since it is one seed.

A claim's `over` says how its rows combine: all (the default), most or any. `backforward_suite.report.ground` explains
the correction for several rows.

A verdict says no more than its runs allow. Below paper scale it is about direction only; at smoke scale it is always
`inconclusive`. A row whose runs saw fewer images than the claim asks for is open. Runs on data that the claim is not
about give `stand-in data`, and no runs give `not run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats

from backforward_suite.report import statistics
from backforward_suite.report.claims import Claim
from backforward_suite.report.finding import Estimate, Kind, Row, State, Verdict
from backforward_suite.report.ground import Family, Ground
from backforward_suite.report.statistics import LEVEL, Effect

_KINDS: dict[State, Kind] = {"for": "reproduced", "against": "contradicted", "open": "inconclusive"}
NOTHING = "nothing to compare"
Said = tuple[State, str]  # the state of a row, and the reason
Ask = Callable[[float], Said]  # the same, given a tolerance


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(claim: Claim, effects: Sequence[Effect], ground: Ground) -> Verdict:
    """Judge each row by the claim's rule, then all rows together, then find the tolerances for which that holds.

    Args:
        claim: Its `sign` is that of ours - theirs, or of log(ours / theirs); its `published` has a number for each
            label of `effects` (value, identity).
        effects: All rows of the table, including those that the claim is not about.
        ground: The runs behind them.
    """
    rule = _RULES[claim.rule]
    closed = {effect.label: why for effect in effects if (why := _why_open(claim, effect, ground))}
    judged = [effect for effect in effects if asked(claim, effect.label) and effect.label not in closed]
    family = Family(len(judged), str(claim.arguments.get("over", "all")))
    asks: dict[str, Ask] = {}
    turns: list[float] = []
    for effect in (effect for effect in effects if effect.label not in closed):
        asks[effect.label], at = rule(claim, effect, family if effect in judged else Family(1))
        turns += at if effect in judged else []

    def row(effect: Effect, tolerance: float) -> Row:
        ask = asks.get(effect.label)
        state, why = ask(tolerance) if ask else ("open", closed[effect.label])
        found = replace(effect.estimate(), unit="" if effect.ratio else effect.unit or claim.unit)
        corrected = effect.estimate(family.equality, with_reach=True) if effect in judged and family.rows > 1 else None
        return Row(effect.label, state, found, _remarked(why, effect), asked(claim, effect.label), corrected)

    def together(tolerance: float) -> State:
        states = [row(effect, tolerance).state for effect in effects if asked(claim, effect.label)]
        return family.together(states, complete=not absent_rows(claim, effects))

    tolerance = claim.tolerance or 0.0
    rows = [row(effect, tolerance) for effect in effects]
    by_level = any(len(effect.values) > 1 for effect in judged) and claim.arguments.get("at_least") != 1
    verdict = _together(claim, rows, ground, family, _head(claim, effects), family.told() if by_level else "")
    if not judged or verdict.kind == "not run" or claim.tolerance is None:
        return verdict
    low, high = _holds(together, tolerance, turns)
    if verdict.kind == "inconclusive" and (low, high) == (0.0, math.inf):
        return verdict
    return replace(verdict, holds=_range(claim, low, high, any(effect.ratio for effect in effects)))


def not_run(claim: Claim, scale: str, missing: Sequence[str] = ()) -> Verdict:
    """A verdict without any runs, with what to do."""
    lacking = f"missing: {some(missing)}; " if missing else ""
    why = f"{lacking}run `make reproduce ONLY={claim.experiment} SCALE={scale}`"
    return Verdict(claim, "not run", "nothing", why)


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """A row's intervals: as shown, and in the tests for the claim, against it, and of equality."""

    shown: Estimate
    support: Estimate
    counter: Estimate
    equal: Estimate

    @classmethod
    def of(cls, effect: Effect, family: Family) -> _Read:
        return cls(
            effect.estimate(),
            effect.estimate(family.level("for")),
            effect.estimate(family.level("against")),
            effect.estimate(family.equality, with_reach=True),
        )

    def ends(self) -> list[float]:
        """The ends of all intervals, where a verdict may turn."""
        return [end for each in (self.support, self.counter, self.equal) for end in (each.low, each.high)
                if end is not None]  # fmt: skip


def _direction(claim: Claim, effect: Effect, family: Family) -> tuple[Ask, list[float]]:
    read, equal, sign = _Read.of(effect, family), effect.equality, int(claim.arguments["sign"])
    kind = _no_difference if sign == 0 else _denied if claim.arguments.get("negated") else _claimed

    def says(tolerance: float) -> Said:
        return kind(read, equal, _band(equal, tolerance, effect.ratio), sign)

    turns = [abs(math.log(end / equal)) if effect.ratio and end > 0 else abs(end - equal) for end in read.ends()]
    return says, [math.expm1(turn) if effect.ratio else turn for turn in turns]


def _claimed(read: _Read, equal: float, band: tuple[float, float], sign: int) -> Said:
    if _within(read.equal, *band):  # with paired runs even a negligible effect can be significant
        told = "an effect too small to count" if _beyond(read.shown, equal, sign) else "no effect"
        return "against", f"{told}: {_spanned(band)}"
    if _beyond(read.support, equal, sign):
        return "for", "as claimed"
    reverse = _beyond(read.counter, equal, -sign)
    return ("against", "the opposite direction") if reverse else ("open", "consistent with no difference")


def _denied(read: _Read, equal: float, band: tuple[float, float], sign: int) -> Said:
    if _beyond(read.equal, band[sign > 0], -sign):
        return "for", "the effect is absent or within the tolerance, as claimed"
    there = _beyond(read.counter, equal, sign)
    return (
        ("against", "the effect is there, contrary to the claim")
        if there
        else ("open", "the effect may or may not be there")
    )


def _no_difference(read: _Read, _: float, band: tuple[float, float], __: int) -> Said:
    if _within(read.equal, *band):
        return "for", f"no difference: {_spanned(band)}"
    if _beyond(read.counter, band[1], 1) or _beyond(read.counter, band[0], -1):
        return "against", f"a difference: not {_spanned(band)}"
    return "open", f"may or may not be {_spanned(band)}"


def _beyond(found: Estimate, bound: float, side: int) -> bool:
    """Whether an interval is wholly beyond a bound, on one side."""
    end = found.low if side > 0 else found.high
    return end is not None and (end - bound) * side > 0


def _spanned(band: tuple[float, float]) -> str:
    return f"within {_number(band[0])} to {_number(band[1])}"


def _near(claim: Claim, effect: Effect, family: Family) -> tuple[Ask, list[float]]:
    target = claim.published[effect.label]
    least, most = target if isinstance(target, tuple) else (target, target)
    unit = abs(least) if claim.arguments.get("relative") else 1.0
    found = effect.estimate(family.equality)

    def says(tolerance: float) -> Said:
        low, high = least - tolerance * unit, most + tolerance * unit
        state: State = "for" if _within(found, low, high) else "against" if _outside(found, low, high) else "open"
        words = {"for": "agrees with", "against": "differs from", "open": "may or may not agree with"}[state]
        span = f"{_number(least)} to {_number(most)}" if least != most else _number(least)
        return state, f"{words} {span}, ± {_number(tolerance * unit)}"

    ends = [end for end in (found.low, found.high) if end is not None]
    return says, [max(least - end, end - most, 0.0) / unit for end in ends if unit]


def _follows(_: Claim, effect: Effect, family: Family) -> tuple[Ask, list[float]]:
    found = effect.estimate(family.equality)

    def says(tolerance: float) -> Said:
        low, high = _band(1.0, tolerance)
        if _within(found, low, high):
            return "for", "follows it"
        if _outside(found, low, high) and not _like_another_seed(effect):
            return "against", "deviates from it"
        spread = float(np.std(effect.values, ddof=1)) if len(effect.values) > 1 else 0.0
        return "open", f"may or may not follow it; our own seeds differ by a factor of {math.exp(spread):.2f}"

    return says, [math.expm1(abs(math.log(end))) for end in (found.low, found.high) if end]


def _often(claim: Claim, effect: Effect, family: Family) -> tuple[Ask, list[float]]:
    share, hits, n = float(claim.arguments["at_least"]), round(sum(effect.values)), len(effect.values)
    if share == 1:  # no sample can prove it, and one counterexample refutes it
        state: State = "for" if hits == n else "against"
    else:
        support, counter = effect.estimate(family.level("for")), effect.estimate(family.level("against"))
        state = "for" if _beyond(support, share, 1) else "against" if _beyond(counter, share, -1) else "open"
    words = {"for": "over", "against": "under", "open": "consistent with"}[state]
    seen = f"{hits} of {n}, " if effect.exact else ""
    return lambda _: (state, f"{seen}{words} the share asked for, {share:.0%}"), []


Rule = Callable[[Claim, Effect, Family], tuple[Ask, list[float]]]  # what a row says; the tolerances where it may turn
_RULES: Mapping[str, Rule] = {
    "direction": _direction,
    "value": _near,
    "identity": _near,
    "share": _often,
    "curve": _follows,
}


def _like_another_seed(effect: Effect) -> bool:
    """Whether 1 lies in the 95 % prediction interval of one more seed's ratio."""
    values = np.asarray(effect.values)
    n = len(values)
    if n < 2:
        return False
    reach = float(scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1)) * float(values.std(ddof=1)) * math.sqrt(1 + 1 / n)
    return abs(float(values.mean())) <= reach


def _band(centre: float, reach: float, ratio: bool = True) -> tuple[float, float]:
    return (centre / (1 + reach), centre * (1 + reach)) if ratio else (centre - reach, centre + reach)


def _within(found: Estimate, low: float, high: float) -> bool:
    return found.low is not None and found.high is not None and low <= found.low and found.high <= high


def _outside(found: Estimate, low: float, high: float) -> bool:
    return found.low is not None and found.high is not None and (found.low > high or found.high < low)


# --- together --------------------------------------------------------------------------------------------------------


def asked(claim: Claim, label: str) -> bool:
    """Whether a claim is about a row."""
    wanted = claim.arguments.get("rows")
    return wanted is None or label in wanted


def _why_open(claim: Claim, effect: Effect, ground: Ground) -> str:
    """Why a row cannot be judged, whatever its number; empty if it can."""
    if not effect.values:
        return effect.note or NOTHING
    if len(effect.values) == 1 and not (effect.exact or effect.share):
        return "one pair of runs: no interval" if claim.rule == "direction" else "one run: no interval"
    if lacks_images(claim, effect):
        first = f"the paper's first data point ({claim.least_images:,})"
        return f"its runs saw {effect.images:,} images, fewer than at {first}"
    if lacks_protocol(claim, effect, ground):
        return "not run under the paper's whole protocol, which the comparison with a published number needs"
    return ""


def lacks_images(claim: Claim, effect: Effect) -> bool:
    """Whether the runs of a row ended before the paper's first data point."""
    return effect.images is not None and effect.images < claim.least_images


def lacks_protocol(claim: Claim, effect: Effect, ground: Ground) -> bool:
    """Whether a row would have to be run under the paper's whole protocol, and was not."""
    wanted = claim.rule == "value" or claim.arguments.get("protocol")
    return bool(wanted) and ground.scale != "paper" and not effect.protocol


def absent_rows(claim: Claim, rows: Sequence[Effect] | Sequence[Row]) -> list[str]:
    """The rows that a claim is about and that are not there."""
    labels = [row.label for row in rows]
    return [label for label in claim.arguments.get("rows") or [] if label not in labels]


def _remarked(why: str, effect: Effect) -> str:
    """A reason with the row's note and the number of pairs without a value."""
    note = effect.note if effect.values else ""
    return "; ".join(filter(None, [why, note, statistics.told_lost(effect)]))


def _together(claim: Claim, rows: Sequence[Row], ground: Ground, family: Family, head: str, level: str) -> Verdict:
    """The verdict of all rows together, as far as scale, data and missing runs allow."""
    judged, absent = [row for row in rows if row.judged], absent_rows(claim, rows)
    ground = replace(ground, missing=(*ground.missing, *absent))
    # A row without a number but with a reason is open; without a reason its runs are missing.
    if not ground.runs or not any(row.estimate.value is not None or row.why != NOTHING for row in judged):
        return or_stand_in(not_run(claim, ground.scale, ground.missing), ground)
    state = family.together([row.state for row in judged], complete=not absent)
    reasons = [_reasons(judged), level]
    if ground.awaited:
        state = "open"
        reasons.insert(0, f"open until all planned runs are done; not done: {some(ground.awaited)}")
    if ground.diverged:
        reasons.append(f"{ground.diverged} of {len(ground.runs)} runs diverged and count as the worst")
    if ground.missing:
        reasons.append(f"missing: {some(ground.missing)}")
    ours = ": ".join(filter(None, [head, _listed(judged)]))
    why, kind = "; ".join(filter(None, reasons)), _KINDS[state]
    if ground.scale == "smoke":
        would = "" if kind == "inconclusive" else f" (it points to {kind})"
        kind, why = "inconclusive", f"smoke scale only shows that it runs{would}; {why}"
    elif ground.scale != "paper" and claim.rule == "direction" and kind != "inconclusive":
        why = f"{why}; about the direction only, at {ground.scale} scale"
    other = ground.stands_in(claim)
    if other:
        why = f"on {other} instead of {' and '.join(claim.data)} it would be {kind}: {why}"
        kind = "stand-in data"
    return Verdict(claim, kind, ours, why, tuple(rows))


def or_stand_in(verdict: Verdict, ground: Ground) -> Verdict:
    """Mark a verdict without runs as stand-in data if there are runs on other data."""
    other = ground.stands_in(verdict.claim)
    if not other:
        return verdict
    return replace(verdict, kind="stand-in data", why=f"on {other}, with nothing to judge: {verdict.why}")


# --- words -----------------------------------------------------------------------------------------------------------


def _head(claim: Claim, effects: Sequence[Effect]) -> str:
    """The name of the numbers, and which side of no difference favours the claim."""
    what = next((effect.what for effect in effects if effect.what), "")
    if claim.rule != "direction" or not what:
        return what
    sign = int(claim.arguments["sign"]) * (-1 if claim.arguments.get("negated") else 1)
    equal = effects[0].equality
    side = "a yes" if claim.kind == "question" else "the claim"
    return f"{what} ({'over' if sign > 0 else 'under' if sign < 0 else 'near'} {equal:g} favours {side})"


def _holds(together: Callable[[float], State], tolerance: float, turns: Iterable[float]) -> tuple[float, float]:
    """The widest range of tolerances around the claim's own over which the verdict is the same."""
    here, low, high = together(tolerance), 0.0, math.inf
    tick = 1e-9
    for turn in sorted({turn for turn in turns if turn >= tolerance}):
        if together(turn * (1 + tick) + tick * tick) != here:
            high = turn
            break
    for turn in sorted({turn for turn in turns if turn <= tolerance}, reverse=True):
        if together(max(0.0, turn * (1 - tick) - tick * tick)) != here:
            low = turn
            break
    return low, high


def _range(claim: Claim, low: float, high: float, ratio: bool) -> str:
    """A range of tolerances in words."""
    share = ratio or claim.arguments.get("relative")

    def told(end: float) -> str:
        return f"{100 * end:.2g} %" if share else f"{end:.2g} {claim.unit}".rstrip()

    if low == 0 and math.isinf(high):
        return "whatever the tolerance"
    if math.isinf(high):
        return f"for tolerances from {told(low)} up"
    return f"for tolerances up to {told(high)}" if low == 0 else f"for tolerances from {told(low)} to {told(high)}"


def _listed(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.label}: {row.estimate}" if row.label else str(row.estimate) for row in rows)


def _reasons(rows: Sequence[Row]) -> str:
    """Each reason once, with its rows."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        labels.setdefault(row.why, []).append(row.label)
    if len(labels) == 1:
        return next(iter(labels))
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in labels.items())


def some(names: Sequence[str], most: int = 6) -> str:
    """The first names, and the number of the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
