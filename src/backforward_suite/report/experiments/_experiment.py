"""One way to say what an experiment compares: rows, arms, a measure, and the claims that it answers.

    EXPERIMENT = Experiment(
        "bfp_batch_size",
        "Does Backforward converge faster than SGD?",
        Part(
            layout("method", {"lr": "lr {:g}", "batch_size": "batch {:g}"}),       # arms; rows: how a value is called
            Compare(EPOCHS, "bfp", "sgd", "faster"),                               # judges the claim `faster`
            Compare(LOSS, "bfp", "sgd"),                                           # shown beside
            means=(LOSS, TEST),
            drawings=(Drawing("batch_size", "Epochs to a loss", "What to see.", over("batch_size")),),
        ),
    )

A `Part` gives, without further words, a row for each setting, runs of an arm paired by seed, a verdict for each claim
that it names (by the rule in `claims.yaml`), a table of the comparisons, a table of what the arms reached, and the
figures. `Sample` takes numbers themselves, for claims about a value; `Effects` is for rows that are no comparison of
two arms. What has nothing in common with this is a function of its own: `Own`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import matplotlib.figure

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments._measures import Measure, Runs, done, images, largest_lr
from backforward_suite.report.experiments._tables import INTERVALS, hardware, setting_of, shown, table
from backforward_suite.report.finding import Figure, Finding, Table, Verdict
from backforward_suite.report.ground import Ground
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect
from backforward_suite.runs.files import natural

Words = str | Mapping[Any, str] | Callable[[Run], str]


# --- rows and arms ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """The runs of one row.

    Attributes:
        row: By setting, its value in this row.
        label: What the row is called; empty where it is the only one.
        arms: By arm, its runs, one a seed.
        tried: By arm, among how many settings validation data chose; empty where nothing was chosen.
    """

    row: Mapping[str, Any]
    label: str
    arms: Mapping[str, Runs]
    tried: Mapping[str, int] = field(default_factory=dict)


Layout = Callable[[Runs], list[Cell]]


def layout(
    arms: str | Callable[[Run], str | None],
    rows: Mapping[str, Words] | None = None,
    *,
    chosen: str = "",
    where: Callable[[Run], bool] | None = None,
) -> Layout:
    """Sort runs into rows and arms.

    Args:
        arms: The group or setting that tells arms apart, or a function that names a run's arm (None: it has none).
        rows: By the group or setting that tells rows apart, how its values are called: a format, a name for each value
            (in the order of the rows; other values are left out), or a function of the run.
        chosen: A setting that validation accuracy chooses, for each row and arm.
        where: Which runs take part; else all.
    """
    return partial(_cells, arms, rows or {}, chosen, where)


def _cells(
    arms: str | Callable[[Run], str | None],
    rows: Mapping[str, Words],
    chosen: str,
    where: Callable[[Run], bool] | None,
    runs: Runs,
) -> list[Cell]:
    found: dict[tuple[Any, ...], dict[str, list[Run]]] = {}
    labels: dict[tuple[Any, ...], str] = {}
    for run in done(runs):
        values = tuple(setting(run, key) if not callable(words) else words(run) for key, words in rows.items())
        arm = setting(run, arms) if isinstance(arms, str) else arms(run)
        named = list(zip(values, rows.values(), strict=True))
        left_out = any(isinstance(words, Mapping) and value not in words for value, words in named)
        if arm is None or left_out or (where is not None and not where(run)):
            continue
        told = [_called(value, words) for value, words in named]
        labels[values] = ", ".join(word for word in told if word)
        found.setdefault(values, {}).setdefault(str(arm), []).append(run)

    def place(values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return [_place(value, words) for value, words in zip(values, rows.values(), strict=True)]

    return [_cell(dict(zip(rows, at, strict=True)), labels[at], found[at], chosen) for at in sorted(found, key=place)]


def _cell(row: Mapping[str, Any], label: str, arms: Mapping[str, list[Run]], chosen: str) -> Cell:
    ordered = {arm: arms[arm] for arm in sorted(arms, key=_arm_place)}
    if not chosen:
        return Cell(row, label, ordered)
    best = {arm: statistics.choose(runs, chosen) for arm, runs in ordered.items()}
    tried = {arm: found.tried for arm, found in best.items() if found is not None}
    return Cell(row, label, {arm: list(found.runs) for arm, found in best.items() if found is not None}, tried)


def setting(run: Run, key: str) -> Any:
    """The choice of a group, or a setting; a whole number, where a float is one."""
    return run.choice(key) or run.setting(key)


def _called(value: Any, words: Words) -> str:
    if callable(words):
        return str(value)
    return words[value] if isinstance(words, Mapping) else words.format(value)


def _place(value: Any, words: Words) -> tuple[Any, ...]:
    return (list(words).index(value),) if isinstance(words, Mapping) else tuple(natural(str(value)))


def _arm_place(arm: str) -> tuple[Any, ...]:
    known = list(style.LOOKS)
    return (0, known.index(arm)) if arm in known else (1, *natural(arm))


# --- comparisons -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compare:
    """One arm against another, row by row.

    Attributes:
        measure: What is compared.
        ours: The arm, or several, each against `theirs`, or which of the others.
        theirs: The arm that it is compared with.
        answers: The words of the claims and questions that these rows judge, separated by blanks.
    """

    measure: Measure
    ours: str | tuple[str, ...] | Callable[[str], bool]
    theirs: str
    answers: str = ""

    def heading(self, names: Mapping[str, str]) -> str:
        """What the numbers are."""
        one = called(self.ours, names) if isinstance(self.ours, str) else "each"
        name, points = self.measure.name, self.measure.points
        if points and points not in name:
            name = f"{name.removesuffix(', %')}, {points}"
        return f"{name}, {one} {'/' if self.measure.ratio else '-'} {called(self.theirs, names)}"

    def arms(self, cells: Iterable[Cell]) -> list[str]:
        """The arms that are compared with `theirs`."""
        if isinstance(self.ours, str | tuple):
            return [self.ours] if isinstance(self.ours, str) else list(self.ours)
        others = dict.fromkeys(arm for cell in cells for arm in cell.arms if arm != self.theirs)
        return sorted(filter(self.ours, others), key=_arm_place)

    def effects(self, cells: Sequence[Cell], names: Mapping[str, str]) -> list[Effect]:
        """A row for each cell, and for each arm where there are several."""
        arms, what = self.arms(cells), self.heading(names)
        rows = []
        for cell in cells:
            for arm in arms:
                ours, theirs = cell.arms.get(arm, []), cell.arms.get(self.theirs, [])
                one = isinstance(self.ours, str)
                label = ", ".join(filter(None, [cell.label, "" if one else called(arm, names)]))
                if ours or theirs:
                    rows.append(replace(self.measure.compare(ours, theirs, label), what=what))
        return rows

    def lacking(self, cells: Sequence[Cell], names: Mapping[str, str]) -> list[str]:
        """Arms of which there are no runs at all."""
        there = {arm for cell in cells for arm, runs in cell.arms.items() if runs}
        return [called(arm, names) for arm in [*self.arms(cells), self.theirs] if arm not in there]


@dataclass(frozen=True)
class Sample:
    """Numbers themselves, for claims about a value: a row for each cell and arm.

    Attributes:
        measure: What they are.
        ours: The arms; empty: all.
        answers: As in `Compare`.
        protocol: Whether a run followed the paper's whole protocol as far as this number goes.
    """

    measure: Measure
    ours: tuple[str, ...] = ()
    answers: str = ""
    protocol: Callable[[Run], bool] = lambda _: False

    def heading(self, _: Mapping[str, str]) -> str:
        """What the numbers are."""
        return self.measure.name

    def effects(self, cells: Sequence[Cell], names: Mapping[str, str]) -> list[Effect]:
        """A row for each cell and arm, called by both."""
        rows = []
        for cell in cells:
            for arm, runs in cell.arms.items():
                if runs and (not self.ours or arm in self.ours):
                    label = ", ".join(filter(None, [cell.label, called(arm, names)]))
                    found = self.measure.sample(runs, label)
                    rows.append(replace(found, what=self.measure.name, protocol=all(map(self.protocol, runs))))
        return rows

    def lacking(self, cells: Sequence[Cell], names: Mapping[str, str]) -> list[str]:
        """Arms of which there are no runs at all."""
        there = {arm for cell in cells for arm, runs in cell.arms.items() if runs}
        return [called(arm, names) for arm in self.ours if arm not in there]


@dataclass(frozen=True)
class Effects:
    """Rows of any other kind.

    Attributes:
        what: What the numbers are.
        of: Makes them of the cells.
        answers: As in `Compare`.
    """

    what: str
    of: Callable[[Sequence[Cell]], Sequence[Effect]]
    answers: str = ""

    def heading(self, _: Mapping[str, str]) -> str:
        """What the numbers are."""
        return self.what

    def effects(self, cells: Sequence[Cell], _: Mapping[str, str]) -> list[Effect]:
        """The rows, which rest on all runs if they do not say how many images theirs saw."""
        seen = images(run for cell in cells for runs in cell.arms.values() for run in runs)
        return [
            replace(effect, what=self.what, images=seen if effect.images is None else effect.images)
            for effect in self.of(cells)
        ]

    def lacking(self, _: Sequence[Cell], __: Mapping[str, str]) -> list[str]:
        """Nothing that could be named."""
        return []


Source = Compare | Sample | Effects


def called(arm: str, names: Mapping[str, str]) -> str:
    """What an arm is called."""
    try:
        return names.get(arm) or style.look(arm).label
    except KeyError:
        return arm


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What a drawing may draw.

    Attributes:
        cells: The rows and arms of its part.
        effects: Of each source of its part, in their order.
        names: What arms are called.
        claims: Those of the experiment, by word.
        answers: Of each source, the words that it judges.
    """

    cells: Sequence[Cell]
    effects: Sequence[Sequence[Effect]]
    names: Mapping[str, str]
    claims: Mapping[str, Claim]
    answers: Sequence[tuple[str, ...]]

    def claim(self, source: int = 0) -> Claim | None:
        """The first claim that a source judges."""
        return next((self.claims[word] for word in self.answers[source] if word in self.claims), None)

    def looks(self, arms: Iterable[str] = ()) -> dict[str, style.Look]:
        """How the arms look; those of all cells, unless they are given."""
        every = list(arms) or list(dict.fromkeys(arm for cell in self.cells for arm in cell.arms))
        return style.looks(every, {arm: called(arm, self.names) for arm in every})


@dataclass(frozen=True)
class Drawing:
    """A figure to be: the end of its name, title, what to see in it, what draws it, and whether there is anything."""

    name: str
    title: str
    caption: str
    draw: Callable[[Data], matplotlib.figure.Figure]
    when: Callable[[Data], bool] = lambda data: bool(data.cells)


@dataclass(frozen=True)
class Found:
    """What one part found."""

    verdicts: Sequence[Verdict] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """Arms compared in rows; see the module's docstring.

    Attributes:
        layout: Sorts runs into rows and arms.
        sources: What is compared.
        title: Of the table of comparisons.
        means: What the table of arms shows.
        drawings: The figures.
        names: What arms are called, where that is not their usual name.
        note: Below the table of comparisons.
        tables: Makes further tables of the cells.
    """

    layout: Layout
    sources: tuple[Source, ...]
    title: str = "Comparisons"
    means: tuple[Measure, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    tables: Callable[[Sequence[Cell]], Sequence[Table]] = lambda _: ()

    def found(self, experiment: str, runs: Runs, claims: Mapping[str, Claim], scale: str) -> Found:
        """Judge, tabulate, and make the figures ready to be drawn."""
        cells = self.layout(runs)
        effects = [source.effects(cells, self.names) for source in self.sources]
        answers = [tuple(source.answers.split()) for source in self.sources]
        judged = [
            self._verdict(claims[word], source, rows, cells, runs, scale)
            for source, rows, words in zip(self.sources, effects, answers, strict=True)
            for word in words
            if word in claims
        ]
        data = Data(cells, effects, self.names, claims, answers)
        figures = [Figure(f"{experiment}_{drawing.name}", drawing.title, drawing.caption, partial(drawing.draw, data))
                   for drawing in self.drawings if drawing.when(data)]  # fmt: skip
        return Found(judged, [*self._comparisons(data), *self._arms(cells), *self.tables(cells)], figures)

    def _verdict(
        self, claim: Claim, source: Source, rows: Sequence[Effect], cells: Sequence[Cell], runs: Runs, scale: str
    ) -> Verdict:
        ground = Ground.of(runs, scale, source.lacking(cells, self.names)).of_data(claim)
        if claim.rule in ("value", "identity"):
            rows = [row for row in rows if row.label in claim.published]
        return verdicts.judge(claim, rows, ground)

    def _comparisons(self, data: Data) -> list[Table]:
        rows: dict[str, dict[str, object]] = {}
        for number, (source, effects) in enumerate(zip(self.sources, data.effects, strict=True)):
            heading, claim = source.heading(self.names), data.claim(number)
            if isinstance(source, Sample):
                continue  # the table of arms has them
            for effect in effects:
                row = rows.setdefault(effect.label, {})
                row[heading] = shown(effect)
                if claim is not None and effect.label in claim.published:
                    row["published"] = f"{claim.published[effect.label]:g}"
        if not rows:
            return []
        return [table(self.title, [{"": label} | row for label, row in rows.items()], f"{self.note} {INTERVALS}")]

    def _arms(self, cells: Sequence[Cell]) -> list[Table]:
        rows = []
        for cell in cells if self.means else ():
            for arm, runs in cell.arms.items():
                row: dict[str, object] = {"": cell.label} if any(each.label for each in cells) else {}
                row["arm"] = called(arm, self.names)
                if cell.tried:
                    lrs = dict.fromkeys(f"{run.setting('lr'):g}" for run in runs)
                    row["lr, chosen on validation data"] = f"{', '.join(lrs)} of {cell.tried.get(arm, 0)}"
                diverged = sum(run.status == "diverged" for run in runs)
                row["seeds"] = f"{len(runs)}" + (f", {diverged} diverged" if diverged else "")
                rows.append(row | {measure.name: measure.mean(runs) for measure in self.means})
        return [table("What each arm reached", rows, INTERVALS)] if rows else []


@dataclass(frozen=True)
class Own:
    """A part that is like no other: its function takes runs, claims by word, and the scale."""

    function: Callable[[Runs, Mapping[str, Claim], str], Found]

    def found(self, _: str, runs: Runs, claims: Mapping[str, Claim], scale: str) -> Found:
        """What the function finds."""
        return self.function(runs, claims, scale)


# --- the experiment --------------------------------------------------------------------------------------------------


class Experiment:
    """What an experiment asks, and the parts that answer it.

    Args:
        name: That of its module and of its config in `conf/experiment`.
        question: In one sentence.
        parts: In reading order.
        diagnostics: The measures of `diagnostics.csv` that it reads; they are kept among the committed results.
        notes: What else a reader must know.
    """

    def __init__(
        self,
        name: str,
        question: str,
        *parts: Part | Own,
        diagnostics: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self.name, self.question, self.parts = name, question, parts
        self.diagnostics, self.notes = diagnostics, notes

    def examine(self, runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
        """Judge the experiment's claims by its runs, of which some or all may be missing."""
        name = self.name
        of = {claim.word: claim for claim in claims}
        parts = [part.found(name, runs, of, scale) for part in self.parts]
        made = {verdict.claim.word: verdict for part in parts for verdict in part.verdicts}
        ground, ended = Ground.of(runs, scale), done(runs)
        judged = [
            made.get(word) or verdicts.or_stand_in(verdicts.not_run(claim, scale), ground.of_data(claim))
            for word, claim in of.items()
        ]
        missing = [f"Not there: {each}." for each in ground.missing]
        if ground.awaited:
            missing.append(f"{len(ground.awaited)} of the planned runs are not done: {verdicts.some(ground.awaited)}.")
        trained = [run for run in ended if len(run.metrics)]  # not a study
        told = [*self.notes, *(note for part in parts for note in part.notes)]
        if not ended:
            told = [
                f"Nothing has been run. `make reproduce ONLY={name} SCALE={scale}` runs it; where its data cannot be "
                "had, that says what to do, and with `STAND_IN=1` it runs on scikit-learn's digits, marked as "
                "stand-ins."
            ]
        return Finding(
            experiment=name,
            question=self.question,
            verdicts=tuple(judged),
            tables=tuple(each for part in parts for each in part.tables if not each.frame.empty) if ended else (),
            figures=tuple(each for part in parts for each in part.figures) if ended else (),
            runs=tuple(runs),
            scale=scale,
            hardware=hardware(ended),
            notes=(*([setting_of(trained)] if trained else []), *told, *missing),
            stand_in=any(verdict.kind == "stand-in data" for verdict in judged),
        )


def limits(cells: Sequence[Cell], names: Mapping[str, str] | None = None) -> list[Table]:
    """By arm and seed, the largest learning rate up to which all of the grid train."""
    rows = [
        {
            "arm": called(arm, names or {}),
            "largest learning rate that trains, by seed": ", ".join(
                "none" if lr is None else f"{lr:g}" for lr in largest_lr(runs).values()
            ),
            "diverged": f"{sum(run.status == 'diverged' for run in runs)} of {len(runs)} runs",
        }
        for cell in cells
        for arm, runs in cell.arms.items()
    ]
    note = (
        "Trains: finished with a training loss below that of a guess, and so at all smaller rates of the grid. A limit "
        "lies between that rate and the next; ratios are those of the middles, in logarithms."
    )
    return [table("Where training ends", rows, note)]
