"""NormProp 3.1-3.4: Gaussian moments, the layer's Jacobian, Proposition 1, pooling; then trained networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import matplotlib.figure
import numpy as np
import pandas as pd

from backforward_suite.report import statistics, style
from backforward_suite.report.experiments._experiment import (
    Cell,
    Data,
    Drawing,
    Effects,
    Experiment,
    Part,
    Sample,
    layout,
)
from backforward_suite.report.experiments._figures import panels
from backforward_suite.report.experiments._measures import Measure, Runs, done
from backforward_suite.report.experiments._tables import INTERVALS, table
from backforward_suite.report.finding import Table
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect, how_often

NORMS = ("none", "batch", "prop")
MOMENTS = {"mean": "mean", "std": "standard deviation"}
DIAGNOSTICS = ("gaussianity/distance_median", "proposition1/pairs", "proposition1/incoherent_pairs")
SLACK = 1e-9  # of a bound that is met with equality, for rounding
FACTORS = {"none": "J = 1", "paper": "J = 1.21", "exact": "exact J"}
COLUMNS = ["part", "quantity", "value"]


# --- untrained layers: reading the study -----------------------------------------------------------------------------


def _trained(run: Run) -> bool:
    return bool(done([run])) and run.choice("norm") in NORMS and len(run.diagnostics) > 0


def _study_cells(runs: Runs) -> list[Cell]:
    return [Cell({}, "", {"study": [run]}) for run in done(runs) if set(COLUMNS) <= set(run.study)][:1]


def _study(cells: Sequence[Cell]) -> pd.DataFrame:
    return cells[0].arms["study"][0].study if cells else pd.DataFrame({column: [] for column in COLUMNS})


def _rows(study: pd.DataFrame, **where: Any) -> pd.DataFrame:
    for key, wanted in where.items():
        study = study[study[key] == wanted] if key in study else study.iloc[:0]
    return study


def _one(study: pd.DataFrame, **where: Any) -> float | None:
    values = _rows(study, **where)["value"]
    return float(values.iloc[0]) if len(values) and math.isfinite(values.iloc[0]) else None


def _widest(study: pd.DataFrame) -> float:
    return float(study["width"].max()) if "width" in study and study["width"].notna().any() else 0.0


def _exact(label: str, value: float | None) -> Effect:
    """A number without sampling, or from so many draws that its error is far below the tolerance."""
    return Effect(label, () if value is None else (value,), exact=True)


def _moments(activation: str, suffix: str, study: pd.DataFrame) -> list[Effect]:
    where = {"part": "moments", "activation": activation, "method": "quadrature"}
    return [_exact(f"{name}{suffix}", _one(study, quantity=key, **where)) for key, name in MOMENTS.items()]


def _diagonal(study: pd.DataFrame) -> list[Effect]:
    """With unit rows the expectation is the same at every width: each width and kind of rows is a sample of it."""
    found = _rows(study, part="jacobian", quantity="diagonal", activation="relu", jacobian_factor="none")["value"]
    values = tuple(map(float, found))
    return [Effect("mean eigenvalue", values), Effect("its root", tuple(map(math.sqrt, values)))]


def _extremes(study: pd.DataFrame) -> list[Effect]:
    widest = _widest(study)
    where = {"part": "jacobian", "activation": "relu", "jacobian_factor": "none", "width": widest, "weights": "random"}
    what = f"eigenvalues of E[J J^T] in closed form, random weights, {widest:.0f} units, white input"
    ends = {"least": "exact_eigenvalue_min", "largest": "exact_eigenvalue_max"}
    return [
        replace(_exact(f"{end} eigenvalue", _one(study, quantity=key, **where)), what=what) for end, key in ends.items()
    ]


def _chain(factor: str, study: pd.DataFrame) -> list[Effect]:
    """Mean and standard deviation after one layer and after the last, at the largest width."""
    widest = _widest(study)
    rows = _rows(study, part="chain", activation="relu", jacobian_factor=factor, width=widest)
    return [
        replace(
            _exact(f"{name}, {layer} layer{'' if layer == 1 else 's'}", _one(rows, quantity=key, layer=layer)),
            what=f"outputs of ReLU layers of {widest:.0f} units, white input",
        )
        for layer in (1, 12)
        for key, name in MOMENTS.items()
    ]


def _pooled(study: pd.DataFrame) -> list[Effect]:
    """The worst of both poolings and filter sizes, on images and with the printed factor."""
    rows = _rows(study, part="pooling", input="data", jacobian_factor="paper")
    wide = rows.pivot(index="quantity", columns=["pooling", "filter"], values="value") if len(rows) else rows
    shift: float | None = None
    ratio: float | None = None
    if "none" in wide:
        after = wide[[kind for kind in wide.columns.levels[0] if kind != "none"]]
        shifts = [after[at]["mean"] - wide["none", at[1]]["mean"] for at in after]
        ratios = [after[at]["std"] / wide["none", at[1]]["std"] for at in after]
        shift, ratio = max(shifts, key=abs, default=None), max(ratios, key=lambda x: abs(x - 1), default=None)
    return [_exact("shift of the mean", shift), _exact("ratio of standard deviations", ratio)]


def _bounds(study: pd.DataFrame) -> pd.DataFrame:
    """A row for each weight matrix, with its bounds, whether they hold, and whether the printed one is imaginary."""
    rows = _rows(study, part="proposition1")
    if rows.empty:
        return pd.DataFrame()
    keys = ["rows", "columns", "length", "weights", "cosine"]
    named = rows.assign(cosine=rows["cosine"].astype("float64").fillna(-1.0))  # pandas groups by no missing key
    cases = named.pivot(index=keys, columns="quantity", values="value").reset_index()
    # All m rows of a case have one length, so that the content of the root is known: where it is 0, only rounding made
    # it negative, and the bound is 0.
    m, alpha = cases["rows"], cases["length"] ** 2
    content = m * alpha * (1 - alpha) + (m * (m - 1) * cases["coherence"] * alpha) ** 2
    printed, mended = cases["printed_bound"], cases["mended_bound"]
    printed = printed.mask(printed.isna() & (content > -SLACK), 0.0)
    kept = cases["distance"] <= printed + SLACK * (1 + mended)  # an imaginary bound is kept by none
    return cases.assign(printed_bound=printed, kept=kept, imaginary=printed.isna(),
                        mended=cases["distance"] <= mended * (1 + SLACK) + SLACK)  # fmt: skip


def _bound_kept(study: pd.DataFrame) -> list[Effect]:
    """The matrices are hand-picked, not a sample."""
    cases = _bounds(study)
    return (
        [replace(how_often("weight matrices", int(cases["kept"].sum()), len(cases)), exact=True)] if len(cases) else []
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def _named(value: Any) -> str:
    words = {**FACTORS, **MOMENTS, "monte_carlo": "Monte Carlo", "data": "images"}
    return words.get(value, str(value).removesuffix(".0")) if isinstance(value, str) else f"{value:g}"


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero


def _spread(
    title: str, note: str, rows: pd.DataFrame, index: Sequence[str], columns: Sequence[str], digits: int
) -> Table:
    """A study's long rows as a table: a row for each value of some columns, a column for each value of others."""
    if rows.empty:
        return table(title, [], note)
    wide = rows.pivot_table(index=list(index), columns=list(columns), values="value", sort=False)
    cells = [
        dict(zip(index, map(_named, where if isinstance(where, tuple) else (where,)), strict=True))
        | {", ".join(map(_named, key)): _cell(value, digits) for key, value in row.items()}
        for where, row in wide.iterrows()
    ]
    return table(title, cells, note)


def _layers_table(study: pd.DataFrame) -> Table:
    rows, widest = [], _widest(study)
    chain = _rows(study, part="chain", activation="relu", width=widest)
    jacobian = _rows(study, part="jacobian", activation="relu", width=widest, weights="random")
    last = chain["layer"].max() if len(chain) else 0
    for factor in dict.fromkeys(chain.get("jacobian_factor", ())):
        cells = {"factor": FACTORS.get(str(factor), str(factor))}
        for layer in dict.fromkeys((1.0, float(last))):
            mean, std = (_one(chain, quantity=key, jacobian_factor=factor, layer=layer) for key in ("mean", "std"))
            cells[f"mean, std after {layer:.0f}"] = "" if mean is None or std is None else f"{mean:+.3f}, {std:.3f}"
        for quantity in ("diagonal", "exact_eigenvalue_min", "exact_eigenvalue_max", "singular_median", "singular_max"):
            value = _one(jacobian, quantity=quantity, jacobian_factor=factor)
            cells[quantity.replace("_", " ").replace("exact ", "")] = _cell(value, 3)
        rows.append(cells)
    note = (
        f"ReLU, width {widest:.0f}, random weights. Diagonal: sampled; eigenvalues: of E[J J^T] in closed form; "
        "singular values: of J at one input."
    )
    return table("NormProp layers on white input", rows, note)


def _bounds_table(study: pd.DataFrame) -> Table:
    cases = _bounds(study)
    rows = [
        {
            "rows of W": str(weights) + (f", cosine {cosine:g}" if cosine >= 0 else ""),
            "length": f"{length:g}",
            "matrices": len(group),
            "printed bound holds": group["kept"].sum(),
            "printed bound imaginary": group["imaginary"].sum(),
            "corrected bound holds": group["mended"].sum(),
        }
        for (weights, cosine, length), group in (cases.groupby(["weights", "cosine", "length"]) if len(cases) else ())
    ]
    note = (
        "Matrices of several sizes. The proof writes ||W_i||^2 instead of ||W_i||^4 and has one factor m(m-1) too "
        "many; corrected bound: mu sqrt(sum over pairs of ||W_i||^2 ||W_j||^2)."
    )
    return table("Proposition 1", rows, note)


def _study_tables(cells: Sequence[Cell]) -> list[Table]:
    study = _study(cells)
    pooling = _rows(study, part="pooling")
    pooling = pooling[pooling["quantity"].isin(["mean", "std"])]
    when = {"none": "before", "max": "after max pooling", "average": "after average pooling"}
    return [
        _spread(
            "Gaussian moments and the factor J",
            "Of the activation of N(0, 1). Library: what layers use, a closed form if there is one; Monte Carlo: a "
            "million draws.",
            _rows(study, part="moments"), ["activation"], ["quantity", "method"], 5,
        ),
        _layers_table(study),
        _bounds_table(study),
        _spread(
            "Before and after pooling",
            "Mean and standard deviation of a NormProp layer's output, over channels, positions and images. "
            "Neighbouring pixels are independent in white input and similar in images.",
            pooling.replace({"pooling": when}), ["input", "filter", "jacobian_factor"], ["pooling", "quantity"], 3,
        ),
    ]  # fmt: skip


def _notes(cells: Sequence[Cell]) -> list[str]:
    return [
        "Moments and Jacobians are those of untrained layers on white Gaussian input. The paper's singular value is "
        "the square root of the mean eigenvalue of E[J J^T]; the singular values of J at one input scatter widely, "
        "since ReLU switches off about half of the units. E[J J^T] has a closed form: for unit rows at cosine r its "
        "entries are r (1/4 + asin(r) / (2 pi)) divided by the variance of a rectified normal, so that orthogonal rows "
        "give a multiple of the identity.",
    ] if cells else []  # fmt: skip


# --- trained networks ------------------------------------------------------------------------------------------------


def _at(run: Run, measure: str, first: bool = False) -> pd.Series[float]:
    """A measure after the last epoch (or before the first), by layer."""
    rows = run.diagnostics[run.diagnostics["measure"] == measure]
    epoch = rows["epoch"].min() if first else rows["epoch"].max()
    return rows[rows["epoch"] == epoch].set_index("layer")["value"].astype("float64")


def _distance(run: Run) -> float | None:
    """Median over hidden layers of the distance from normal of the median unit's pre-activations.

    Not the mean: NIN pads one of its 1 x 1 convolutions, so that most of what that layer sees is zeros.
    """
    by_layer = _at(run, DIAGNOSTICS[0]).iloc[:-1]  # the head has no activation behind it
    middle = float(by_layer.median()) if len(by_layer) else math.nan
    return middle if math.isfinite(middle) else None


def _incoherent(run: Run, first: bool = False) -> float | None:
    """Share of the pairs of filters, each pair within its layer, that are near to orthogonal."""
    pairs = float(_at(run, DIAGNOSTICS[1], first).sum())
    return float(_at(run, DIAGNOSTICS[2], first).sum()) / pairs if pairs else None


DISTANCE = Measure("distance of pre-activations from normal", _distance)
INCOHERENT = Measure("share of pairs of filters that are nearly orthogonal", _incoherent)
RANDOM = Measure("the same of random filters", partial(_incoherent, first=True))


def _than_random(cells: Sequence[Cell]) -> list[Effect]:
    """Trained filters against those of the same network before its first update."""
    return [
        statistics.paired(
            statistics.by_seed(runs, INCOHERENT.read), statistics.by_seed(runs, RANDOM.read), style.look(norm).label
        )
        for cell in cells
        for norm, runs in cell.arms.items()
    ]


def _trained_table(cells: Sequence[Cell]) -> list[Table]:
    rows = [
        {"norm": style.look(norm).label, "seeds": len(runs)}
        | {measure.name: measure.mean(runs) for measure in (DISTANCE, INCOHERENT, RANDOM)}
        for cell in cells
        for norm, runs in cell.arms.items()
    ]
    note = (
        "After training. Distance: largest gap between the distribution functions of a unit's standardised "
        "pre-activations and of a normal one, median over units, then over hidden layers. Nearly orthogonal: |cosine| "
        f"under 0.3. {INTERVALS}"
    )
    return [table("Trained networks", rows, note)]


# --- figures ---------------------------------------------------------------------------------------------------------


def _draw_chain(data: Data) -> matplotlib.figure.Figure:
    study = _study(data.cells)
    figure, axes = panels(2)
    names = ["J none", "J paper", "prop"]
    looks = style.looks(names, dict(zip(names, FACTORS.values(), strict=True))).values()
    chain = _rows(study, part="chain", activation="relu", width=_widest(study))
    for panel, (quantity, name), wanted in zip(axes, MOMENTS.items(), (0.0, 1.0), strict=True):
        panel.axhline(wanted, color="0.35", linewidth=0.8)
        for factor, look in zip(FACTORS, looks, strict=True):
            rows = _rows(chain, quantity=quantity, jacobian_factor=factor).sort_values("layer")
            if len(rows):
                panel.plot(rows["layer"], rows["value"], marker=look.marker, label=look.label, **look.line)
        panel.set(xlabel="layer", ylabel=name)
    return figure


def _draw_bounds(data: Data) -> matplotlib.figure.Figure:
    figure, (axes,) = panels(1)
    cases = _bounds(_study(data.cells))
    floor = 1e-3  # orthogonal rows have a distance of zero, which a logarithmic axis cannot show
    for name, look in (("printed_bound", style.SPARE[2]), ("mended_bound", style.look("batch"))):
        bound = np.maximum(cases[name].fillna(floor), floor)
        axes.plot(
            bound,
            np.maximum(cases["distance"], floor),
            label=name.replace("_", " ").replace("mended", "corrected"),
            **look.points,
        )
    top = float(max(cases["printed_bound"].max(), cases["distance"].max()))
    axes.plot([floor, top], [floor, top], color="0.35", linewidth=0.9)
    axes.set(xlabel="bound", ylabel="||Sigma - diag(alpha)||", xscale="log", yscale="log")
    return figure


def _draw_gaussian(data: Data) -> matplotlib.figure.Figure:
    figure, (axes,) = panels(1)
    layers: list[str] = []
    for norm, runs in data.cells[0].arms.items():
        frame = pd.DataFrame([_at(run, DIAGNOSTICS[0]) for run in runs])
        layers = layers or list(map(str, frame.columns))
        estimates = [statistics.mean(frame[layer][np.isfinite(frame[layer])]) for layer in layers]
        style.points(axes, style.look(norm), range(len(layers)), estimates)
    axes.set_xticks(
        range(len(layers)), [layer.removeprefix("model.").removesuffix(".conv") for layer in layers], rotation=45
    )
    axes.set_ylabel("distance from normal")
    axes.set_ylim(bottom=0)
    return figure


def _of(rows: Callable[[pd.DataFrame], list[Effect]]) -> Callable[[Sequence[Cell]], list[Effect]]:
    return lambda cells: rows(_study(cells))


EXPERIMENTS = (
    Experiment(
        "np_moments",
        "Do the moments, the Jacobian, the bounds and the assumptions that NormProp rests on hold?",
        Part(
            _study_cells,
            Effects("by quadrature", _of(partial(_moments, "relu", "")), "remark_1"),
            Effects("by quadrature", _of(partial(_moments, "prelu", ", a = 0.25")), "remark_2"),
            Effects(
                "mean over layers of 64, 256 and 1,024 units, with random and with orthogonal rows",
                _of(_diagonal),
                "jacobian",
            ),
            Effects("", _of(_extremes), "isometry"),
            Effects("", _of(partial(_chain, "none")), "keeps_normal"),
            Effects("", _of(partial(_chain, "paper")), "keeps_normal_factor"),
            Effects("the worst of max and average pooling and of both filter sizes, images", _of(_pooled), "pooling"),
            Effects(
                "share of hand-picked weight matrices whose covariance is within the bound",
                _of(_bound_kept),
                "proposition_1",
            ),
            Drawing(
                "chain",
                "Mean and standard deviation, layer after layer",
                "ReLU layers on white input, over all units and inputs. Lines: the values that the layer should "
                "keep. The curves of the printed factor (1.21) and the exact one (1.2112) coincide.",
                _draw_chain,
                lambda data: len(_rows(_study(data.cells), part="chain", activation="relu")) > 0,
            ),
            Drawing(
                "proposition1",
                "Proposition 1: distance from the diagonal, against its bounds",
                "Above the line a bound is violated. Cases with an imaginary printed bound are at the left edge.",
                _draw_bounds,
                lambda data: len(_bounds(_study(data.cells))) > 0,
            ),
            tables=_study_tables,
            notes=_notes,
            where=lambda run: not _trained(run),
        ),
        Part(
            layout("norm"),
            Sample(DISTANCE, ("prop",), "gaussian"),
            Effects(f"{INCOHERENT.name}, trained - random", _than_random, "incoherent"),
            Drawing(
                "gaussian",
                "Distance of pre-activations from a normal distribution, by layer",
                "Median over units after training, mean over seeds with 95 % intervals. NIN pads conv8, a 1 x 1 "
                "convolution, so that most of its output is constant.",
                _draw_gaussian,
            ),
            tables=_trained_table,
            where=_trained,
        ),
        diagnostics=DIAGNOSTICS,
    ),
)
