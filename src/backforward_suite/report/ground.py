"""What a verdict stands on: the runs, and the rows that are judged together.

**Correction.** "All rows speak for it" is an intersection-union test: each row has to pass at 95 %, so that nothing is
to be corrected. "One row speaks against it" is a union: each of m rows is read at Bonferroni's level, 1 - .05 / m.
`any` is the reverse; `most` lies between (k of m rows, each at level 1 - .05 / (m - k + 1)). Equality ("within the
tolerance", "the effect is not there") is always read at level 1 - .05 / m. Rows that the claim is not about, or that
cannot be judged, do not count into m.
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

    def of_data(self, claim: Claim) -> Ground:
        """Less the runs on data that the claim is not about.

        Where all are, they stand in for its own, unless another claim of the experiment is about them.
        """
        if not claim.data:
            return self
        theirs = {data for other in claims_of(claim.experiment).values() for data in other.data}
        beside = any(run.data in theirs for run in self.runs)
        own = tuple(run for run in self.runs if run.data in claim.data)
        return replace(self, runs=own if own or beside else self.runs)

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
class Family:
    """The rows that a claim is about: how many must say the same, and at which level each is read.

    Attributes:
        rows: How many of them can be judged.
        over: `all`, `most` or `any` must speak for the claim.
    """

    rows: int
    over: str = "all"

    def level(self, state: State) -> float:
        """At which a row's interval is read, where it would count for (or against) the claim."""
        return self._corrected(self.rows - _needed(self.over, self.rows, state) + 1)

    @property
    def equality(self) -> float:
        """At which it is read where it would count as no difference."""
        return self._corrected(self.rows)

    def _corrected(self, comparisons: int) -> float:
        return 1 - (1 - LEVEL) / max(1, comparisons)

    def together(self, states: Sequence[State], complete: bool = True) -> State:
        """What the rows say together; where rows are missing, not what all of them would have to say."""
        asks_all = {"all": "for", "any": "against"}.get(self.over)
        states_: tuple[State, State] = ("against", "for")
        for state in states_:
            enough = states and states.count(state) >= _needed(self.over, len(states), state)
            if enough and (complete or state != asks_all):
                return state
        return "open"

    def told(self) -> str:
        """At which level rows were read, in words; empty where there is nothing to correct."""
        if self.rows < 2:
            return ""
        widest, most = 100 * self.equality, 100 * self.level("for")
        what = {"all": "against the claim or as equal", "any": "for the claim or as equal"}.get(self.over, "as equal")
        beside = f", at {most:.3g} % otherwise" if self.over == "most" and most > 100 * LEVEL else ""
        return f"read at {widest:.3g} % where a row counts {what}{beside} (Bonferroni over {self.rows} rows)"


def _needed(over: str, rows: int, state: State) -> int:
    """How many rows must say so for all of them together to say so."""
    most = rows // 2 + 1
    return {"all": (rows, 1), "most": (most, most), "any": (1, rows)}[over][state == "against"]
