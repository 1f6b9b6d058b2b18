"""What would settle an open claim, and its price, estimated from the times of the runs at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from backforward_suite.report.claims import Claim
from backforward_suite.report.finding import Verdict
from backforward_suite.report.ground import Ground
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect
from backforward_suite.report.verdicts import absent_rows, asked, judge, lacks_images, lacks_protocol

TIMES = (2, 4, 8, 16, 32, 64)  # as many seeds as there are


def how(claim: Claim, effects: Sequence[Effect], ground: Ground, verdict: Verdict) -> str:
    """What to run, and what that costs, in one line; empty for a decided claim.

    Args:
        claim: The claim.
        effects: The rows that the verdict rests on.
        ground: The runs behind them.
        verdict: What they say.
    """
    make, rows = f"`make reproduce ONLY={claim.experiment} SCALE=", [e for e in effects if asked(claim, e.label)]
    if verdict.kind not in ("inconclusive", "not run") or ground.scale == "smoke":
        return ""
    also = "".join(f"runs for {label}, and " for label in absent_rows(claim, effects))
    unrun = any(not effect.values and not effect.note for effect in rows)
    judgeable = [effect for effect in rows if not lacks_images(claim, effect)]
    if verdict.kind == "not run" or unrun or ground.missing or ground.awaited or (also and judgeable == rows):
        return f"the runs that are missing: {make}{ground.scale}`, which first prints an estimate of their time"
    if judgeable != rows:
        price = _price(ground, lambda run: claim.least_images / max(1, run.images))
        return f"{also}runs of at least {claim.least_images:,} images each, before which it is not judged: {price}"
    reached = all(effect.values for effect in rows)
    if any(lacks_protocol(claim, effect, ground) for effect in rows) or (claim.paper_images and not reached):
        price = _price(ground, lambda run: claim.paper_images / max(1, run.images) / run.width**2)
        narrow = ", if time grows with the square of the width" if any(run.width < 1 for run in ground.runs) else ""
        return f"the paper's whole protocol, {make}paper`: {price}{narrow}"
    if reached:
        return _more_seeds(claim, effects, ground)
    return "longer runs, or other learning rates, so that every row has a number; the price is not known"


def _more_seeds(claim: Claim, effects: Sequence[Effect], ground: Ground) -> str:
    """How many seeds decide if they scatter like those at hand: values are repeated until the rule decides."""
    for times in TIMES:
        more = [replace(effect, values=effect.values * times) for effect in effects]
        if judge(claim, more, ground).kind != "inconclusive":
            return f"{times} times as many seeds, if they scatter alike: {_price(ground, lambda _: times - 1)}"  # noqa: B023
    return f"more than {TIMES[-1]} times as many seeds, as an estimate lies next to where the verdict turns"


def _price(ground: Ground, times: Callable[[Run], float]) -> str:
    """The core-hours of the runs at hand, each multiplied by a factor."""
    hours = sum(times(run) * run.core_seconds for run in ground.runs) / 3600
    return f"about {f'{hours:.2g}' if hours < 100 else f'{round(hours, -1):,.0f}'} core-hours on this hardware"
