"""What an experiment found: estimates, verdicts, tables and figures, as plain data for the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import matplotlib.figure
import pandas as pd

from backforward_suite.report.claims import Claim
from backforward_suite.report.reading import Run

Method = Literal["t", "bootstrap", "quantile", "exact"]
Kind = Literal["reproduced", "contradicted", "inconclusive", "not run", "stand-in data"]
KINDS: tuple[Kind, ...] = ("reproduced", "contradicted", "inconclusive", "not run", "stand-in data")
#: The answers to questions.
ANSWERS: dict[Kind, str] = {"reproduced": "yes", "contradicted": "no", "inconclusive": "open"}
State = Literal["for", "against", "open"]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The estimate; None if nothing could be measured.
        low: Lower end of the interval; None without one (one seed).
        high: Upper end, likewise.
        n: The number of values: seeds, pairs of runs, images.
        method: The kind of interval: Student's `t`, `bootstrap`, order statistics (`quantile`), or `exact`: Wilson's
            interval of a proportion, or the value itself if nothing was sampled.
        level: Of the interval.
        unit: As in `Claim.unit`.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: Method = "t"
    level: float = 0.95
    unit: str = ""

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"an estimate is finite or None, not {number}")

    def __str__(self) -> str:
        """Such as `0.943 [0.911, 0.975]`, rounded to the second digit of the interval's width.

        If the interval spans most of a power of ten, or belongs to a quantile, each number has two digits.
        """
        if self.value is None:
            return "-"
        unit = f" {self.unit}" if self.unit else ""
        if self.method == "exact" and self.low == self.high:
            return f"{self.value:.4g}{unit}"
        if self.method == "quantile" or (
            self.low is not None and self.high is not None and 0 < 5 * self.low < self.high
        ):
            ends = ["?" if end is None else f"{end:.2g}" for end in (self.low, self.high)]
            return f"{self.value:.2g} [{ends[0]}, {ends[1]}]{unit}"
        if self.low is None and self.high is None:
            return f"{_rounded(self.value, abs(self.value) / 10)}{unit}"
        known = [end for end in (self.low, self.high) if end is not None]
        width = max(known) - min(known) if len(known) == 2 else abs(self.value - known[0])
        low, high = ("?" if end is None else _rounded(end, width) for end in (self.low, self.high))
        return f"{_rounded(self.value, width)} [{low}, {high}]{unit}"


def _rounded(value: float, width: float) -> str:
    """To the second digit of `width`; in powers of ten where the number is huge or tiny."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    scale = width if width > 1e-9 * abs(value) else abs(value) / 100  # less is rounding
    digits = 3 if scale == 0 else max(0, 1 - math.floor(math.log10(scale)))
    return f"{value:.{min(digits, 6)}f}"


@dataclass(frozen=True)
class Row:
    """What one row of a table (a learning rate, a data set) says about a claim.

    Attributes:
        label: The row's name; empty if there is only one.
        state: Whether it speaks for the claim, against it, or neither.
        estimate: Its number, with the 95 % interval.
        why: The reason for the state.
        judged: Whether the claim is about it; otherwise it is only shown.
        corrected: The number with the interval corrected for several rows; None if there is only one.
    """

    label: str
    state: State
    estimate: Estimate
    why: str
    judged: bool = True
    corrected: Estimate | None = None


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim, or the answer to a question.

    Attributes:
        claim: The claim.
        kind: One of `KINDS`.
        ours: What was measured, in a few words and numbers.
        why: The reason; what to do if it is `not run`.
        rows: The rows that it rests on, and those that are only shown.
        settle: If it is open, what would settle it, and the price.
        holds: The tolerances for which the verdict is the same, in words; empty if there is no tolerance.
    """

    claim: Claim
    kind: Kind
    ours: str
    why: str
    rows: tuple[Row, ...] = ()
    holds: str = ""
    settle: str = ""

    @property
    def word(self) -> str:
        """Its name; the answer to a question is yes, no or open."""
        return ANSWERS.get(self.kind, self.kind) if self.claim.kind == "question" else self.kind

    def row(self, label: str = "") -> Row | None:
        """The row with a label, or None."""
        return next((row for row in self.rows if row.label == label), None)


@dataclass(frozen=True)
class Table:
    """A table for the page.

    Attributes:
        title: One line.
        frame: Cells as strings; the columns are the headings, the index is not shown.
        note: Below the table: kind of interval, definitions.
    """

    title: str
    frame: pd.DataFrame
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure for the page.

    Attributes:
        name: The name of its file without extension, unique over all experiments.
        title: One line.
        caption: What it shows, and what to look for.
        draw: Draws it with `backforward_suite.report.style`.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], matplotlib.figure.Figure]


@dataclass(frozen=True)
class Finding:
    """Everything that an experiment found.

    Attributes:
        experiment: Its name.
        question: One sentence.
        verdicts: One for each of its claims.
        tables: In reading order.
        figures: In reading order.
        runs: The runs behind it.
        scale: `smoke`, `small` or `paper`.
        hardware: The machines of the runs.
        notes: What is missing, and other remarks.
        stand_in: Whether a claim was tested on a data set that it is not about.
    """

    experiment: str
    question: str
    verdicts: tuple[Verdict, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]
    runs: tuple[Run, ...]
    scale: str
    hardware: str
    notes: tuple[str, ...] = ()
    stand_in: bool = False
