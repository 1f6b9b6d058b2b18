"""The runs that a verdict rests on, and the rows that are judged together.

**Correction.** "All rows speak for the claim" is an intersection-union test: each row has to pass at 95 %, without any
correction. "One row speaks against it" is a union: each of m rows is tested at Bonferroni's level, 1 - .05 / m. `any`
is the reverse; `most` is between (k of m rows, each at level 1 - .05 / (m - k + 1)). Equality ("within the tolerance",
"the effect is absent") is always tested at level 1 - .05 / m. Rows that the claim is not about, or that cannot be
judged, do not count in m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from backforward_suite.report.claims import Claim, claims_of
from backforward_suite.report.finding import State
from backforward_suite.report.reading import Run, planned_and_not_done
from backforward_suite.report.statistics import LEVEL
from backforward_suite.runs.files import DONE


@dataclass(frozen=True)
class Ground:
    """The runs that a verdict rests on.

    Attributes:
        scale: `smoke`, `small`, `medium` or `paper`.
        runs: Finished and diverged runs.
        missing: What should exist and does not, such as an arm or a failed run.
        awaited: Names of planned runs that are not done. Until they are, the verdict stays open: on part of a sweep it
            would depend on the moment.
    """

    scale: str
    runs: tuple[Run, ...]
    missing: tuple[str, ...] = ()
    awaited: tuple[str, ...] = ()

    @classmethod
    def of(cls, runs: Sequence[Run], scale: str, missing: Sequence[str] = ()) -> Ground:
        """From runs of any status; failed ones count as missing."""
        failed = tuple(f"{run.name} (failed: {run.result.get('cause', 'no cause')})" for run in runs if not _done(run))
        there = tuple(run for run in runs if _done(run))
        return cls(scale, there, (*missing, *failed), planned_and_not_done(runs))

    def of_data(self, claim: Claim) -> Ground:
        """Without the runs on data that the claim is not about.

        If no others are left, those stand in, unless another claim of the experiment is about their data.
        """
        if not claim.data:
            return self
        theirs = {data for other in claims_of(claim.experiment).values() for data in other.data}
        of_others = any(run.data in theirs for run in self.runs)
        own = tuple(run for run in self.runs if run.data in claim.data)
        return replace(self, runs=own if own or of_others else self.runs)

    def stands_in(self, claim: Claim) -> str:
        """Name of the data set that stands in for the claim's own; empty if none does."""
        other = {run.data for run in self.runs if claim.data and run.data not in claim.data}
        return ", ".join(sorted(other))

    @property
    def diverged(self) -> int:
        """The number of diverged runs."""
        return sum(run.status == "diverged" for run in self.runs)


def _done(run: Run) -> bool:
    return run.status in DONE


@dataclass(frozen=True)
class Family:
    """The rows that a claim is about: how many must agree, and the level of each one's interval.

    Attributes:
        rows: The number of rows that can be judged.
        over: Whether `all`, `most` or `any` must speak for the claim.
    """

    rows: int
    over: str = "all"

    def level(self, state: State) -> float:
        """The level of a row's interval in the test for (or against) the claim."""
        return self._corrected(self.rows - _needed(self.over, self.rows, state) + 1)

    @property
    def equality(self) -> float:
        """The level of a row's interval in the test of equality."""
        return self._corrected(self.rows)

    def _corrected(self, comparisons: int) -> float:
        return 1 - (1 - LEVEL) / max(1, comparisons)

    def together(self, states: Sequence[State], complete: bool = True) -> State:
        """What the rows say together; if rows are missing, nothing that needs all of them."""
        asks_all = {"all": "for", "any": "against"}.get(self.over)
        states_: tuple[State, State] = ("against", "for")
        for state in states_:
            enough = states and states.count(state) >= _needed(self.over, len(states), state)
            if enough and (complete or state != asks_all):
                return state
        return "open"

    def told(self) -> str:
        """The corrected levels, in words; empty if there is only one row."""
        if self.rows < 2:
            return ""
        widest, most = 100 * self.equality, 100 * self.level("for")
        what = {"all": "against the claim or as equal", "any": "for the claim or as equal"}.get(self.over, "as equal")
        rest = f", and otherwise by its {most:.3g} % interval" if self.over == "most" and most > 100 * LEVEL else ""
        return f"a row counts {what} by its {widest:.3g} % interval{rest} (Bonferroni over {self.rows} rows)"


def _needed(over: str, rows: int, state: State) -> int:
    """The number of rows that must agree."""
    most = rows // 2 + 1
    return {"all": (rows, 1), "most": (most, most), "any": (1, rows)}[over][state == "against"]
