"""NormProp, Table 1: test errors of NormProp, BatchNorm and no normalisation on the same network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.figure

from backforward_suite.report import style, verdicts
from backforward_suite.report.claims import Claim, claims_of
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.experiments import _normprop as family
from backforward_suite.report.finding import Figure, Finding, Table, Verdict
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

QUESTION = "Is NormProp's test error below BatchNorm's on the data sets of Table 1, and on MNIST?"
PUBLISHED_ROWS = tuple(claims_of("np_table")["below_batchnorm"].published)
Arms = Mapping[str, Mapping[str, Sequence[Run]]]  # by row of the table, by norm: runs at the chosen learning rate


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare test errors, each norm at the learning rate that its validation accuracy chose, data set by data set."""
    table = _arms(runs)
    differences = {row: _difference(row, arms) for row, arms in table.items()}
    judged_differences = [effect for row, effect in differences.items() if row in PUBLISHED_ROWS or _stands_in(row)]
    beside = [effect for effect in differences.values() if effect not in judged_differences]
    errors = {
        f"{row} {norm}": family.sample(arms[norm], family.test_error, f"{row} {norm}", "%")
        for row, arms in table.items()
        for norm in ("prop", "batch")
    }

    def judge(claim: Claim) -> Verdict:
        rows = [row for row in PUBLISHED_ROWS if row in {_row_of(label) for label in claim.published}]
        ground = verdicts.Ground.of(
            [run for run in runs if _row(run) in rows or _stands_in(_row(run))],
            scale,
            [row for row in rows if row not in table],
        )
        if claim.word == "below_batchnorm":
            return verdicts.direction(claim, judged_differences, ground)
        return verdicts.value(claim, [errors[label] for label in claim.published if label in errors], ground)

    words = common.by_word(claims)
    published = {
        label: number for claim in claims if claim.rule == "value" for label, number in claim.published.items()
    }
    lacking = [row for row in PUBLISHED_ROWS if row not in table]
    return common.finding(
        "np_table", QUESTION, runs, claims, scale,
        [judge(claim) for claim in claims],
        tables=[
            _errors(table, published),
            common.effects_table(
                "NormProp's test error less BatchNorm's, points", judged_differences, "data set",
                "Below 0: NormProp is better. Differences of the same seed.",
            ),
            common.effects_table("The same where Table 1 has no row", beside, "data set"),
        ],
        figures=[
            Figure(
                "np_table_errors",
                "Test errors beside those of Table 1",
                "Bars: ours with 95 % intervals over seeds; hollow markers: published, on all images, at full width.",
                lambda: _draw_errors(table, published),
            ),
            Figure(
                "np_table_differences",
                "NormProp's test error less BatchNorm's",
                "95 % intervals, not corrected as the verdicts are. Left of zero NormProp is better; hollow markers: "
                "published.",
                lambda: _draw_differences(differences, words),
            ),
        ],
        notes=[f"not run: {', '.join(lacking)} (of Table 1)"] if lacking else [],
    )  # fmt: skip


def _row(run: Run) -> str:
    return f"{run.data} flip" if run.setting("data.augment") == "flip" else run.data


def _row_of(label: str) -> str:
    """The row that a published number stands in: `cifar10 flip` of `cifar10 flip prop`, and of itself."""
    return label if label in PUBLISHED_ROWS else label.rpartition(" ")[0]


def _stands_in(row: str) -> bool:
    return row.startswith("digits")


def _arms(runs: Sequence[Run]) -> Arms:
    by_row: dict[str, list[Run]] = {}
    for run in common.done(runs):
        by_row.setdefault(_row(run), []).append(run)
    order = [*PUBLISHED_ROWS, *sorted(by_row.keys() - set(PUBLISHED_ROWS))]
    return {
        row: {norm: family.chosen(common.done(by_row[row], norm=norm)) for norm in family.NORMS}
        for row in order
        if row in by_row
    }


def _difference(row: str, arms: Mapping[str, Sequence[Run]]) -> Effect:
    return common.effect(arms["prop"], arms["batch"], family.test_error, row, unit="points")


def _errors(table: Arms, published: Mapping[str, float]) -> Table:
    rows = []
    for row, arms in table.items():
        cells: dict[str, object] = {"data set": row}
        for norm in reversed(family.NORMS):
            number = published.get(f"{row} {norm}")
            label = style.look(norm).label
            cells[label] = common.estimate_of(arms[norm], family.test_error)
            cells[f"lr of {label}"] = ", ".join(map(str, family.values(arms[norm], "lr")))
            if norm != "none":
                cells[f"{label}, published"] = "" if number is None else f"{number:.2f}"
        rows.append(cells)
    note = "Test error, %, mean over seeds with 95 % interval, at the learning rate that validation accuracy chose."
    return common.table("Test errors", rows, note)


def _draw_errors(table: Arms, published: Mapping[str, float]) -> matplotlib.figure.Figure:
    figure, panels = style.canvas(panel=(4.8, 3.0))
    looks = style.looks(family.NORMS)
    estimates = {
        norm: [common.estimate_of(arms[norm], family.test_error) for arms in table.values()] for norm in family.NORMS
    }
    numbers = {norm: [published.get(f"{row} {norm}") for row in table] for norm in family.NORMS}
    labels = [row.replace(" ", "\n") for row in table]
    style.bars(panels[0, 0], labels, estimates, looks, published_values=numbers)
    panels[0, 0].set(ylabel="test error, %", ylim=(0, min(105, panels[0, 0].get_ylim()[1])))
    style.legend(figure)
    return figure


def _draw_differences(differences: Mapping[str, Effect], claims: Mapping[str, Claim]) -> matplotlib.figure.Figure:
    figure, panels = style.canvas(panel=(4.4, 0.7 + 0.42 * len(differences)))
    axes, look = panels[0, 0], style.look("prop")
    claim = claims.get("below_batchnorm")
    rows = [(row, effect.estimate()) for row, effect in differences.items()]
    style.forest(axes, rows, look, tolerance=claim.tolerance if claim else None, form="{:+.2f}")
    for place, (row, _) in enumerate(rows):
        if claim is not None and row in claim.published:
            style.published(axes, look, [claim.published[row]], [place + 0.28])
    axes.set_xlabel("difference of test errors, points")
    style.legend(figure)
    return figure
