"""What an experiment is made of: rows, arms, measures, and the claims that their comparison answers.

    Experiment(
        "bfp_batch_size",
        "Does Backforward converge faster than SGD?",
        Part(
            layout("method", {"lr": "lr {:g}", "batch_size": "batch {:g}"}),  # arms; rows and their labels
            Compare(EPOCHS, "bfp", "sgd", "faster"),                          # judges the claim `faster`
            Compare(LOSS, "bfp", "sgd"),                                      # only shown
            Drawing("epochs", "Epochs to a loss", "Caption.", over("batch_size", "batch size", "epochs")),
            means=(LOSS, TEST),
        ),
    )

A `Part` sorts runs into a row for each setting and pairs the runs of two arms by seed. From that follow a verdict for
each claim that it names, a table of the comparisons, a table of what each arm reached, and the figures. `Sample` takes
the numbers themselves, for claims about a value; `Effects` takes rows from a function, for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import matplotlib.figure

from backforward_suite.report import settle, statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments._measures import Measure, Runs, done, images
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
        row: The row's value of each setting that tells rows apart.
        label: The row's name; empty if there is only one row.
        arms: The runs of each arm, one a seed.
        tried: For each arm, the number of settings that validation data chose from; empty if nothing was chosen.
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
    where: Callable[[Run], bool] = lambda _: True,
) -> Layout:
    """Sort runs into rows and arms.

    Args:
        arms: The group or setting that tells arms apart, or a function that names a run's arm (None: skip the run).
        rows: For each group or setting that tells rows apart, how to label its values: a format, a name for each value
            (in the order of the rows; other values are skipped), or a function of the run.
        chosen: A setting that validation accuracy chooses, for each row and arm.
        where: Selects the runs; the default takes all.
    """
    words_of = rows or {}

    def cells(runs: Runs) -> list[Cell]:
        found: dict[tuple[Any, ...], dict[str, list[Run]]] = {}
        labels: dict[tuple[Any, ...], str] = {}
        for run in done(runs):
            values = tuple(words(run) if callable(words) else setting(run, key) for key, words in words_of.items())
            arm = setting(run, arms) if isinstance(arms, str) else arms(run)
            if arm is not None and where(run) and all(map(_is_known, values, words_of.values())):
                labels[values] = ", ".join(filter(None, map(_label, values, words_of.values())))
                found.setdefault(values, {}).setdefault(str(arm), []).append(run)
        places = sorted(found, key=lambda values: list(map(_place, values, words_of.values())))
        return [_cell(dict(zip(words_of, at, strict=True)), labels[at], found[at], chosen) for at in places]

    return cells


def _cell(row: Mapping[str, Any], label: str, arms: Mapping[str, list[Run]], chosen: str) -> Cell:
    ordered = {arm: arms[arm] for arm in sorted(arms, key=_arm_place)}
    if not chosen:
        return Cell(row, label, ordered)
    best = {arm: found for arm, runs in ordered.items() if (found := statistics.choose(runs, chosen)) is not None}
    return Cell(
        row, label, {arm: found.runs for arm, found in best.items()}, {arm: found.tried for arm, found in best.items()}
    )


def setting(run: Run, key: str) -> Any:
    """The choice of a group, or the value of a setting."""
    return run.choice(key) or run.setting(key)


def _is_known(value: Any, words: Words) -> bool:
    return not isinstance(words, Mapping) or value in words


def _place(value: Any, words: Words) -> list[Any]:
    return [list(words).index(value)] if isinstance(words, Mapping) else natural(str(value))


def _label(value: Any, words: Words) -> str:
    if callable(words):
        return str(value)
    return words[value] if isinstance(words, Mapping) else words.format(value)


def _arm_place(arm: str) -> tuple[Any, ...]:
    known = list(style.LOOKS)
    return (0, known.index(arm)) if arm in known else (1, *natural(arm))


def called(arm: str, names: Mapping[str, str]) -> str:
    """The name of an arm on the page."""
    try:
        return names.get(arm) or style.look(arm).label
    except KeyError:
        return arm


def _without_runs(arms: Iterable[str], cells: Sequence[Cell], names: Mapping[str, str]) -> list[str]:
    there = {arm for cell in cells for arm, runs in cell.arms.items() if runs}
    return [called(arm, names) for arm in arms if arm not in there]


# --- comparisons -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compare:
    """One arm against another, row by row.

    Attributes:
        measure: The number to compare.
        ours: The arm, or several arms, or a function that selects them; each is compared with `theirs`.
        theirs: The other arm.
        answers: The words of the claims and questions that these rows judge, separated by spaces.
    """

    measure: Measure
    ours: str | tuple[str, ...] | Callable[[str], bool]
    theirs: str
    answers: str = ""

    def heading(self, names: Mapping[str, str]) -> str:
        """The column's heading."""
        one = called(self.ours, names) if isinstance(self.ours, str) else "each"
        name, points = self.measure.name, self.measure.points
        if points and points not in name:
            name = f"{name.removesuffix(', %')}, {points}"
        return f"{name}, {one} {'/' if self.measure.ratio else '-'} {called(self.theirs, names)}"

    def _arms(self, cells: Iterable[Cell]) -> list[str]:
        if isinstance(self.ours, str | tuple):
            return [self.ours] if isinstance(self.ours, str) else list(self.ours)
        others = {arm for cell in cells for arm in cell.arms if arm != self.theirs}
        return sorted(filter(self.ours, others), key=_arm_place)

    def effects(self, cells: Sequence[Cell], names: Mapping[str, str]) -> list[Effect]:
        """A row for each cell, and for each arm if there are several."""
        what, several, rows = self.heading(names), not isinstance(self.ours, str), []
        for cell in cells:
            for arm in self._arms(cells):
                ours, theirs = cell.arms.get(arm, []), cell.arms.get(self.theirs, [])
                label = ", ".join(filter(None, [cell.label, called(arm, names) if several else ""]))
                if ours or theirs:
                    rows.append(replace(self.measure.compare(ours, theirs, label), what=what))
        return rows

    def lacking(self, cells: Sequence[Cell], names: Mapping[str, str]) -> list[str]:
        """The arms without any run."""
        return _without_runs([*self._arms(cells), self.theirs], cells, names)


@dataclass(frozen=True)
class Sample:
    """The numbers themselves, for claims about a value: a row for each cell and arm.

    Attributes:
        measure: The number.
        ours: The arms; empty for all.
        answers: As in `Compare`.
        protocol: Whether a run followed the paper's whole protocol, as far as it matters to this number.
    """

    measure: Measure
    ours: tuple[str, ...] = ()
    answers: str = ""
    protocol: Callable[[Run], bool] = lambda _: False

    def heading(self, _: Mapping[str, str]) -> str:
        """The name of the numbers."""
        return self.measure.name

    def effects(self, cells: Sequence[Cell], names: Mapping[str, str]) -> list[Effect]:
        """A row for each cell and arm, labelled with both."""
        rows = []
        for cell in cells:
            for arm, runs in cell.arms.items():
                if runs and (not self.ours or arm in self.ours):
                    found = self.measure.sample(runs, ", ".join(filter(None, [cell.label, called(arm, names)])))
                    rows.append(replace(found, what=self.measure.name, protocol=all(map(self.protocol, runs))))
        return rows

    def lacking(self, cells: Sequence[Cell], names: Mapping[str, str]) -> list[str]:
        """The arms without any run."""
        return _without_runs(self.ours, cells, names)


@dataclass(frozen=True)
class Effects:
    """Rows that a function makes.

    Attributes:
        what: The name of the numbers; empty if the rows have their own.
        of: Makes the rows from the cells.
        answers: As in `Compare`.
    """

    what: str
    of: Callable[[Sequence[Cell]], Sequence[Effect]]
    answers: str = ""

    def heading(self, _: Mapping[str, str]) -> str:
        """The name of the numbers."""
        return self.what

    def effects(self, cells: Sequence[Cell], _: Mapping[str, str]) -> list[Effect]:
        """The rows; by default they rest on the images that all runs of the part saw."""
        seen = images(run for cell in cells for runs in cell.arms.values() for run in runs)
        return [
            replace(effect, what=self.what or effect.what, images=seen if effect.images is None else effect.images)
            for effect in self.of(cells)
        ]

    def lacking(self, _: Sequence[Cell], __: Mapping[str, str]) -> list[str]:
        """Unknown."""
        return []


Source = Compare | Sample | Effects


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What a drawing may draw.

    Attributes:
        cells: The rows and arms of the part.
        effects: The rows of each source.
        names: Names of arms that differ from the usual ones.
        claims: The first claim that each source judges.
    """

    cells: Sequence[Cell]
    effects: Sequence[Sequence[Effect]]
    names: Mapping[str, str]
    claims: Sequence[Claim | None]

    def looks(self, arms: Iterable[str] = ()) -> dict[str, style.Look]:
        """The looks of these arms; by default of the arms of all cells."""
        every = list(arms) or list(dict.fromkeys(arm for cell in self.cells for arm in cell.arms))
        return style.looks(every, {arm: called(arm, self.names) for arm in every})


@dataclass(frozen=True)
class Drawing:
    """A figure: the end of its name, its title and caption, the function that draws it, and when there is one."""

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


class Part:
    """Arms compared in rows; see the module's docstring.

    Args:
        layout: Sorts runs into rows and arms.
        items: The comparisons and the figures.
        title: Of the table of comparisons; without a title there is no such table.
        means: The columns of the table of arms.
        names: Names of arms that differ from the usual ones.
        note: Below the table of comparisons.
        tables: Makes further tables from the cells.
        notes: Makes further notes from the cells.
        where: Selects the runs that the verdicts rest on; the default takes all.
    """

    def __init__(
        self,
        layout: Layout,
        *items: Source | Drawing,
        title: str = "",
        means: tuple[Measure, ...] = (),
        names: Mapping[str, str] | None = None,
        note: str = "",
        tables: Callable[[Sequence[Cell]], Sequence[Table]] = lambda _: (),
        notes: Callable[[Sequence[Cell]], Sequence[str]] = lambda _: (),
        where: Callable[[Run], bool] = lambda _: True,
    ) -> None:
        self.layout, self.title, self.means, self.note, self.names = layout, title, means, note, names or {}
        self.tables, self.notes, self.where = tables, notes, where
        self.sources = [item for item in items if not isinstance(item, Drawing)]
        self.drawings = [item for item in items if isinstance(item, Drawing)]

    def found(self, experiment: str, runs: Runs, claims: Mapping[str, Claim], scale: str) -> Found:
        """Judge and tabulate, and prepare the figures."""
        runs = [run for run in runs if self.where(run)]
        cells = self.layout(runs)
        effects = [source.effects(cells, self.names) for source in self.sources]
        judges = [[claims[word] for word in source.answers.split() if word in claims] for source in self.sources]
        judged = []
        for source, rows, of_source in zip(self.sources, effects, judges, strict=True):
            ground = Ground.of(runs, scale, source.lacking(cells, self.names))
            for claim in of_source:
                number = claim.rule in ("value", "identity")
                about = [row for row in rows if row.label in claim.published] if number else rows
                found = verdicts.judge(claim, about, on_data := ground.of_data(claim))
                judged.append(replace(found, settle=settle.how(claim, about, on_data, found)))
        data = Data(cells, effects, self.names, [next(iter(of_source), None) for of_source in judges])
        figures = [Figure(f"{experiment}_{drawing.name}", drawing.title, drawing.caption, partial(drawing.draw, data))
                   for drawing in self.drawings if drawing.when(data)]  # fmt: skip
        tables = [*self._comparisons(data), *self._arms(cells), *self.tables(cells)]
        return Found(judged, tables, figures, self.notes(cells))

    def _comparisons(self, data: Data) -> list[Table]:
        rows: dict[str, dict[str, object]] = {}
        for source, effects, claim in zip(self.sources, data.effects, data.claims, strict=True):
            if isinstance(source, Sample):
                continue  # the table of arms shows them
            for effect in effects:
                row = rows.setdefault(effect.label, {})
                row[source.heading(self.names)] = shown(effect)
                if claim is not None and effect.label in claim.published:
                    row["published"] = f"{claim.published[effect.label]:g}"
        if not rows or not self.title:
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


# --- the experiment --------------------------------------------------------------------------------------------------


class Experiment:
    """What an experiment asks, and the parts that answer it.

    Args:
        name: That of its config in `conf/experiment`.
        question: One sentence.
        parts: In reading order.
        diagnostics: The measures of `diagnostics.csv` that it reads; the committed results keep them.
        notes: Further notes for the reader.
    """

    def __init__(
        self, name: str, question: str, *parts: Part, diagnostics: tuple[str, ...] = (), notes: tuple[str, ...] = ()
    ) -> None:
        self.name, self.question, self.parts = name, question, parts
        self.diagnostics, self.notes = diagnostics, notes

    def examine(self, runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
        """Judge the experiment's claims by its runs, some or all of which may be missing."""
        of = {claim.word: claim for claim in claims}
        parts = [part.found(self.name, runs, of, scale) for part in self.parts]
        made = {verdict.claim.word: verdict for part in parts for verdict in part.verdicts}
        ground, ended = Ground.of(runs, scale), done(runs)
        judged = [
            made.get(word) or verdicts.or_stand_in(verdicts.not_run(claim, scale), ground.of_data(claim))
            for word, claim in of.items()
        ]
        missing = [f"Missing: {each}." for each in ground.missing]
        if ground.awaited:
            missing.append(f"{len(ground.awaited)} of the planned runs are not done: {verdicts.some(ground.awaited)}.")
        trained = [run for run in ended if len(run.metrics)]  # not a study
        told = [*self.notes, *(note for part in parts for note in part.notes)]
        if not ended:
            told = [
                f"Nothing has been run. `make reproduce ONLY={self.name} SCALE={scale}` runs it. If its data are "
                "missing, the command says what to do; with `STAND_IN=1` it runs on scikit-learn's digits, marked as "
                "stand-in data."
            ]
        return Finding(
            experiment=self.name,
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
