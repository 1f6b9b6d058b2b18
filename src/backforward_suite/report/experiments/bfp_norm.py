"""How normalisation behaves without covariate shift: {SGD, Backforward} x {no norm, BatchNorm, NormProp}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib.figure
import pandas as pd

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.finding import Figure, Finding, Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Chosen, Effect
from backforward_suite.report.verdicts import Ground

QUESTION = "Does Backforward remove covariate shift, and does normalisation still help where it has?"
APPLIED, INDUCED = "shift/applied_relative", "shift/induced_relative"
DIAGNOSTICS = (APPLIED, INDUCED)
METHODS, NORMS = ("sgd", "bfp"), ("none", "batch", "prop")
NETWORKS = {"mlp": "MLP", "nin": "NIN"}

Arms = Mapping[str, Chosen]  # by arm, such as "bfp + batch": its runs at the learning rate that validation chose


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Compare the arms, each at its own learning rate, and look at each layer's shift."""
    of, ground = common.by_word(claims), Ground.of(runs, scale)
    there = common.done(runs)
    networks = {name: _chosen(members) for name, members in common.arms(there, "model").items()}
    without = [run for run in there if run.choice("method") == "bfp" and run.choice("norm") == "none"]
    judged = [
        verdicts.identity(of["removes_shift"], _applied(of["removes_shift"], without), ground),
        verdicts.direction(of["replaces_norm"], _differences(networks, "bfp + none", "sgd + batch"), ground),
        verdicts.direction(of["norm_adds_nothing"], _differences(networks, "bfp + batch", "bfp + none"), ground),
    ]
    tables = [
        _arm_table(networks),
        _pair_table(networks),
        *(_shift_table(name, arms, kind) for name, arms in networks.items() for kind in (INDUCED, APPLIED)),
    ]
    figures = [
        Figure(
            "bfp_norm_accuracy",
            "Test accuracy by update rule and normalisation",
            "Each arm at the learning rate that its validation accuracy chose; mean over seeds with 95 % intervals.",
            partial(_draw_accuracy, networks),
        ),
        Figure(
            "bfp_norm_shift",
            "Applied shift of each layer, as a share of its gradient",
            "How far the gradient that a layer steps along is from the one that it faces once the layers below have "
            "moved. Median over the epochs, mean over seeds; 0 at the first layer, and everywhere under exact "
            f"Backforward (drawn at {FLOOR:g} where it is less).",
            partial(_draw_shift, networks),
        ),
    ]
    return common.finding("bfp_norm", QUESTION, runs, claims, scale, judged, tables, figures)


FLOOR = 1e-8  # single precision


def _chosen(runs: Sequence[Run]) -> dict[str, Chosen]:
    found = {}
    for method in METHODS:
        for norm in NORMS:
            members = [run for run in runs if run.choice("method") == method and run.choice("norm") == norm]
            best = statistics.choose(members, "lr")
            if best is not None:
                found[f"{method}{style.RULES_AND_NORMS}{norm}"] = best
    return found


def _label(network: str) -> str:
    return NETWORKS.get(network, network)


def _differences(networks: Mapping[str, Arms], ours: str, theirs: str) -> list[Effect]:
    return [
        common.points(arms[ours].runs, arms[theirs].runs, "accuracy/test", _label(name))
        for name, arms in networks.items()
        if ours in arms and theirs in arms
    ]


# --- the shift -------------------------------------------------------------------------------------------------------


def shifts(run: Run, measure: str) -> pd.Series[float]:
    """By layer, in forward order: the median over the times at which the first update of a batch was looked at."""
    rows = run.diagnostics
    rows = rows[(rows["measure"] == measure) & (rows["update"] == 1)]
    found: pd.Series[float] = rows.groupby("layer", sort=False)["value"].median()
    return found


def _applied(claim: Claim, runs: Sequence[Run]) -> list[Effect]:
    """Of each run the largest over its layers."""
    (name,) = claim.published
    values = [float(found.max()) for run in runs if len(found := shifts(run, APPLIED).dropna())]
    return [Effect(name, tuple(values), note="" if values or not runs else "no diagnostics")]


def _over_seeds(runs: Sequence[Run], measure: str) -> pd.Series[float]:
    tables = [found for run in runs if len(found := shifts(run, measure))]
    together: pd.Series[float] = pd.concat(tables, axis=1).mean(axis=1) if tables else pd.Series(dtype="float64")
    return together


# --- tables and figures ----------------------------------------------------------------------------------------------


def _arm_table(networks: Mapping[str, Arms]) -> Table:
    rows = []
    for network, arms in networks.items():
        for arm, best in arms.items():
            rows.append(
                {
                    "network": _label(network),
                    "arm": style.look(arm).label,
                    "lr": best.setting[0],
                    "chosen among": best.tried,
                    "training loss": common.mean_cell(best.runs, lambda run: run.final("loss/train")),
                    "test accuracy": common.mean_cell(best.runs, lambda run: run.final("accuracy/test"), "%", 100),
                    "seeds": len(best.runs),
                }
            )
    return common.table(
        "Each arm at its best learning rate",
        rows,
        "Chosen by validation accuracy after the last epoch, mean over seeds; the test set was read once. "
        f"{common.INTERVALS}",
    )


PAIRS = (
    ("bfp + none", "sgd + none"),
    ("bfp + batch", "sgd + batch"),
    ("bfp + prop", "sgd + prop"),
    ("bfp + none", "sgd + batch"),
    ("bfp + batch", "bfp + none"),
    ("sgd + batch", "sgd + none"),
)


def _pair_table(networks: Mapping[str, Arms]) -> Table:
    found = [
        (network, ours, theirs, common.points(arms[ours].runs, arms[theirs].runs, "accuracy/test"))
        for network, arms in networks.items()
        for ours, theirs in PAIRS
        if ours in arms and theirs in arms
    ]
    corrected = statistics.holm([effect for *_, effect in found])
    rows = [
        {
            "network": _label(network),
            "arm": style.look(ours).label,
            "less": style.look(theirs).label,
            "test accuracy, points": common.shown(effect),
            "p": common.p_text(effect.corrected_p),
        }
        for (network, ours, theirs, _), effect in zip(found, corrected, strict=True)
    ]
    return common.table(
        "Differences of test accuracy",
        rows,
        f"Paired by seed. {common.INTERVALS} {common.correction_note(len(rows))} Verdicts correct over the networks.",
    )


MEANING = {
    INDUCED: "Induced shift: what updating the layers below does to a layer's gradient.",
    APPLIED: "Applied shift: how far the gradient that a layer steps along is from the one that it then faces.",
}


def _shift_table(network: str, arms: Arms, measure: str) -> Table:
    columns = {style.look(arm).label: _over_seeds(best.runs, measure) for arm, best in arms.items()}
    frame = pd.DataFrame({name: column for name, column in columns.items() if len(column)})
    rows = [{"layer": layer} | {name: _cell(value) for name, value in row.items()} for layer, row in frame.iterrows()]
    return common.table(
        f"{MEANING[measure].partition(':')[0]} of each layer, {_label(network)}",
        rows,
        f"{MEANING[measure]} As a share of that gradient's norm; median over epochs, mean over seeds.",
    )


def _cell(value: float) -> str | None:
    return None if pd.isna(value) else f"{value:.2g}"


def _draw_accuracy(networks: Mapping[str, Arms]) -> matplotlib.figure.Figure:
    figure, axes = style.canvas(1, max(1, len(networks)))
    looks = style.looks(NORMS)
    for panel, (network, arms) in zip(axes[0], networks.items(), strict=False):
        for k, norm in enumerate(NORMS):
            for place, method in enumerate(METHODS):
                best = arms.get(f"{method}{style.RULES_AND_NORMS}{norm}")
                if best is not None:
                    accuracy = common.estimate_of(best.runs, lambda run: run.final("accuracy/test"), "%", 100)
                    label = looks[norm].label if place == 0 else ""
                    style.interval(panel, looks[norm], place + 0.18 * (k - 1), accuracy, label=label)
        panel.set_xticks(range(len(METHODS)), [style.look(method).label for method in METHODS])
        panel.set(title=_label(network), ylabel="test accuracy, %", xlim=(-0.5, len(METHODS) - 0.5))
        panel.grid(visible=False, axis="x")
    style.legend(figure)
    return figure


def _draw_shift(networks: Mapping[str, Arms]) -> matplotlib.figure.Figure:
    figure, axes = style.canvas(1, max(1, len(networks)))
    for panel, (network, arms) in zip(axes[0], networks.items(), strict=False):
        for arm, best in arms.items():
            found, of = _over_seeds(best.runs, APPLIED), style.look(arm)
            if len(found):
                places = list(range(1, len(found) + 1))
                panel.set_xticks(places)
                panel.plot(places, found.clip(lower=FLOOR), marker=of.marker, label=of.label, **of.line)
        panel.set(yscale="log", title=_label(network), xlabel="layer", ylabel="applied shift / gradient norm")
    style.legend(figure)
    return figure
