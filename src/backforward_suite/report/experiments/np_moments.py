"""NormProp 3.1-3.4: Gaussian moments, the layer's Jacobian, Proposition 1, pooling; then trained networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib.figure
import numpy as np
import pandas as pd

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments._experiment import Experiment, Found, Own
from backforward_suite.report.experiments._measures import Measure, Runs, done
from backforward_suite.report.experiments._tables import INTERVALS, table
from backforward_suite.report.finding import Figure, Table
from backforward_suite.report.ground import Ground
from backforward_suite.report.reading import Run
from backforward_suite.report.statistics import Effect

NORMS = ("none", "batch", "prop")
MOMENTS = {"mean": "mean", "std": "standard deviation"}
DIAGNOSTICS = ("gaussianity/distance_median", "proposition1/pairs", "proposition1/incoherent_pairs")
SLACK = 1e-9  # of a bound that is met with equality, for rounding
FACTORS = {"none": "J = 1", "paper": "J = 1.21", "exact": "exact J"}


def examine(runs: Runs, claims: Mapping[str, Claim], scale: str) -> Found:
    """Judge the mathematics by a study of untrained layers, the assumptions by trained networks."""
    ended = done(runs)
    studies = [run for run in ended if {"part", "quantity", "value"} <= set(run.study)]
    study = studies[0].study if studies else pd.DataFrame({"part": [], "quantity": [], "value": []})
    trained = {norm: [run for run in ended if run.choice("norm") == norm and len(run.diagnostics)] for norm in NORMS}
    networks = Ground.of([run for members in trained.values() for run in members], scale)
    mathematics = Ground.of([run for run in runs if run not in networks.runs], scale)
    # Of unit rows the expectation is the same at every width; each width and kind of rows is a sample of it.
    diagonals = _rows(study, part="jacobian", quantity="diagonal", activation="relu", jacobian_factor="none")["value"]
    eigenvalues = tuple(float(value) for value in diagonals)
    layer = f"{_widest(study):.0f} units, white input"
    measured: Mapping[str, tuple[str, Sequence[Effect], Ground]] = {
        "remark_1": ("by quadrature", _moments_of(study, "relu", ""), mathematics),
        "remark_2": ("by quadrature", _moments_of(study, "prelu", ", a = 0.25"), mathematics),
        "jacobian": (
            "mean over layers of 64, 256 and 1,024 units, with random and with orthogonal rows",
            [
                Effect("mean eigenvalue", eigenvalues),
                Effect("its root", tuple(math.sqrt(value) for value in eigenvalues)),
            ],
            mathematics,
        ),
        "isometry": (f"eigenvalues of E[J J^T] in closed form, random weights, {layer}", _extremes(study), mathematics),
        "keeps_normal": (f"outputs of ReLU layers of {layer}", _chain(study, "none"), mathematics),
        "keeps_normal_factor": (f"outputs of ReLU layers of {layer}", _chain(study, "paper"), mathematics),
        "pooling": (
            "the worst of max and average pooling and of both filter sizes, images",
            _worst(study),
            mathematics,
        ),
        "gaussian": (DISTANCE.name, [DISTANCE.sample(trained["prop"], style.look("prop").label)], networks),
        "incoherent": (
            f"{INCOHERENT.name}, trained - random",
            [
                INCOHERENT.compare(members, [_untrained(run) for run in members], style.look(norm).label)
                for norm, members in trained.items()
                if members
            ],
            networks,
        ),
    }
    judged = [
        verdicts.judge(claims[word], [replace(row, what=what) for row in rows], ground)
        for word, (what, rows, ground) in measured.items()
    ]
    judged.append(
        verdicts.share(
            claims["proposition_1"], _bound_kept(study, "printed_bound"), mathematics,
            what="share of hand-picked weight matrices whose covariance is within the bound", sampled=False,
        )
    )  # fmt: skip
    tables = [_moments_table(study), _layers_table(study), _bounds_table(study), _pooling_table(study),
              _trained_table(trained)]  # fmt: skip
    notes = [
        "Moments and Jacobians are of untrained layers on white Gaussian input. The paper's singular value is the root "
        "of the mean eigenvalue of E[J J^T]; those of J at one input scatter widely, since ReLU stops about half of "
        "the units. E[J J^T] itself is known in closed form: with unit rows at cosine r its entries are "
        "r (1/4 + asin(r) / (2 pi)) over the variance of a rectified normal, "
        "so that orthogonal rows give a multiple of the identity.",
    ]
    return Found(judged, tables, _figures(study, trained), notes if len(study) else [])


Where = dict[str, Any]


# --- reading ---------------------------------------------------------------------------------------------------------


def _rows(study: pd.DataFrame, **where: Any) -> pd.DataFrame:
    rows = study
    for key, wanted in where.items():
        rows = rows[rows[key] == wanted] if key in rows else rows.iloc[:0]
    return rows


def _one(study: pd.DataFrame, **where: Any) -> float | None:
    rows = _rows(study, **where)
    return float(rows["value"].iloc[0]) if len(rows) and math.isfinite(rows["value"].iloc[0]) else None


def _moment(study: pd.DataFrame, activation: str, quantity: str, method: str = "quadrature") -> float | None:
    return _one(study, part="moments", activation=activation, quantity=quantity, method=method)


def _exact(label: str, value: float | None) -> Effect:
    """A number without sampling, or one of so many draws that its error is far below the tolerance."""
    return Effect(label, () if value is None else (value,), exact=True)


def _moments_of(study: pd.DataFrame, activation: str, suffix: str) -> list[Effect]:
    return [_exact(f"{name}{suffix}", _moment(study, activation, key)) for key, name in MOMENTS.items()]


def _extremes(study: pd.DataFrame) -> list[Effect]:
    where = {"activation": "relu", "jacobian_factor": "none", "width": _widest(study), "weights": "random"}
    ends = {"least": "exact_eigenvalue_min", "largest": "exact_eigenvalue_max"}
    return [
        _exact(f"{end} eigenvalue", _one(study, part="jacobian", quantity=key, **where)) for end, key in ends.items()
    ]


def _worst(study: pd.DataFrame) -> list[Effect]:
    pooled = _pooled(study)
    shift = max((shift for shift, _ in pooled), key=abs, default=None)
    ratio = max((ratio for _, ratio in pooled), key=lambda ratio: abs(ratio - 1), default=None)
    return [_exact("shift of the mean", shift), _exact("ratio of standard deviations", ratio)]


def _chain(study: pd.DataFrame, factor: str) -> list[Effect]:
    """Mean and standard deviation after one layer and after the last, which the widest layers are nearest to."""
    chain = {"part": "chain", "activation": "relu", "jacobian_factor": factor, "width": _widest(study)}
    return [
        _exact(
            f"{name}, {layer} {'layer' if layer == 1 else 'layers'}", _one(study, quantity=key, layer=layer, **chain)
        )
        for layer in (1, 12)
        for key, name in MOMENTS.items()
    ]


def _widest(study: pd.DataFrame) -> float:
    return float(study["width"].max()) if "width" in study and study["width"].notna().any() else 0.0


def _pooled(study: pd.DataFrame) -> list[tuple[float, float]]:
    """By pooling and filter size, on images and with the printed factor: shift of the mean, ratio of the std."""
    rows = _rows(study, part="pooling", input="data", jacobian_factor="paper")
    rows = rows[rows["quantity"].isin(["mean", "std"])]
    if rows.empty or "none" not in set(rows["pooling"]):
        return []
    mean, std = (
        rows[rows["quantity"] == quantity].pivot(index="pooling", columns="filter", values="value")
        for quantity in ("mean", "std")
    )
    return [
        (float(mean.loc[kind, size] - mean.loc["none", size]), float(std.loc[kind, size] / std.loc["none", size]))
        for kind in mean.index
        if kind != "none"
        for size in mean.columns
    ]


def _bounds(study: pd.DataFrame) -> pd.DataFrame:
    rows = _rows(study, part="proposition1")
    if rows.empty:
        return pd.DataFrame()
    keys = ["rows", "columns", "length", "weights", "cosine"]
    named = rows.assign(cosine=rows["cosine"].astype("float64").fillna(-1.0))  # a key that is not there is no group
    cases = named.pivot(index=keys, columns="quantity", values="value").reset_index()
    # All m rows of a case are of one length, so that the root's content is known: where it is 0, rounding alone made
    # it negative, and the bound is 0.
    m, alpha = cases["rows"], cases["length"] ** 2
    content = m * alpha * (1 - alpha) + (m * (m - 1) * cases["coherence"] * alpha) ** 2
    rounded = cases["printed_bound"].isna() & (content > -SLACK)
    return cases.assign(printed_bound=cases["printed_bound"].mask(rounded, 0.0))


def _bound_kept(study: pd.DataFrame, bound: str) -> dict[str, tuple[int, int]]:
    cases = _bounds(study)
    if cases.empty:
        return {}
    kept = cases["distance"] <= cases[bound] + SLACK * (1 + cases["mended_bound"])  # an imaginary bound is kept by none
    return {"weight matrices": (int(kept.sum()), len(cases))}


def _at(run: Run, measure: str, first: bool = False) -> pd.Series[float]:
    """A measure after the last epoch (or before the first), by layer."""
    rows = run.diagnostics[run.diagnostics["measure"] == measure]
    epoch = rows["epoch"].min() if first else rows["epoch"].max()
    return rows[rows["epoch"] == epoch].set_index("layer")["value"].astype("float64")


def _distance(run: Run) -> float | None:
    """Median over hidden layers of the distance from normal of the median unit's pre-activations.

    Not the mean, since NIN pads one of its 1 x 1 convolutions: most of what that layer sees is zeros.
    """
    by_layer = _at(run, "gaussianity/distance_median").iloc[:-1]  # the head has no activation behind it
    middle = float(by_layer.median()) if len(by_layer) else math.nan
    return middle if math.isfinite(middle) else None


def _incoherent(run: Run, first: bool = False) -> float | None:
    """Share of the pairs of filters, each pair within its layer, that are near to orthogonal."""
    pairs = float(_at(run, "proposition1/pairs", first).sum())
    return float(_at(run, "proposition1/incoherent_pairs", first).sum()) / pairs if pairs else None


def _untrained(run: Run) -> Run:
    """The same network before its first update: its filters are random ones."""
    rows = run.diagnostics
    return Run(run.folder, run.result, {"metrics": run.metrics, "diagnostics": rows[rows["epoch"] == 0]})


DISTANCE = Measure("distance of pre-activations from normal", _distance)
INCOHERENT = Measure("share of pairs of filters near to orthogonal", _incoherent)
RANDOM = Measure("the same of random filters", lambda run: _incoherent(run, first=True))


def _named(value: Any) -> str:
    """A value of a study's column, in words."""
    words = {**FACTORS, **MOMENTS, "monte_carlo": "Monte Carlo", "data": "images"}
    return words.get(value, str(value).removesuffix(".0")) if isinstance(value, str) else f"{value:g}"


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero


# --- tables ----------------------------------------------------------------------------------------------------------


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


def _moments_table(study: pd.DataFrame) -> Table:
    note = (
        "Of the activation of N(0, 1). Library: what layers use, in closed form where there is one; Monte Carlo: a "
        "million draws."
    )
    rows = _rows(study, part="moments")
    return _spread("Gaussian moments and the factor J", note, rows, ["activation"], ["quantity", "method"], 5)


def _layers_table(study: pd.DataFrame) -> Table:
    rows, widest = [], _widest(study)
    chain = _rows(study, part="chain", activation="relu", width=widest)
    last = chain["layer"].max() if len(chain) else 0
    for factor in dict.fromkeys(chain.get("jacobian_factor", ())):
        cells = {"factor": FACTORS.get(str(factor), str(factor))}
        for layer in dict.fromkeys((1.0, float(last))):
            mean, std = (_one(chain, quantity=key, jacobian_factor=factor, layer=layer) for key in ("mean", "std"))
            cells[f"mean, std after {layer:.0f}"] = "" if mean is None or std is None else f"{mean:+.3f}, {std:.3f}"
        for quantity in ("diagonal", "exact_eigenvalue_min", "exact_eigenvalue_max", "singular_median", "singular_max"):
            value = _one(study, part="jacobian", quantity=quantity, activation="relu", jacobian_factor=factor,
                         width=widest, weights="random")  # fmt: skip
            cells[quantity.replace("_", " ").replace("exact ", "")] = _cell(value, 3)
        rows.append(cells)
    note = (
        f"ReLU, width {widest:.0f}, random weights. Diagonal: sampled; eigenvalues: of E[J J^T] in closed "
        "form; singular values: of J at one input."
    )
    return table("NormProp layers on white input", rows, note)


def _bounds_table(study: pd.DataFrame) -> Table:
    cases = _bounds(study)
    rows = []
    for (weights, cosine, length), group in cases.groupby(["weights", "cosine", "length"]) if len(cases) else ():
        kept = group["distance"] <= group["printed_bound"] + SLACK * (1 + group["mended_bound"])
        mended = group["distance"] <= group["mended_bound"] * (1 + SLACK) + SLACK
        rows.append(
            {
                "rows of W": str(weights) + (f", cosine {cosine:g}" if cosine >= 0 else ""),
                "length": f"{length:g}",
                "matrices": str(len(group)),
                "printed bound holds": str(int(kept.sum())),
                "printed bound imaginary": str(int(group["printed_bound"].isna().sum())),
                "mended bound holds": str(int(mended.sum())),
            }
        )
    note = (
        "Matrices of several sizes. The proof takes ||W_i||^2 for ||W_i||^4 and multiplies by m(m-1) once too often; "
        "mended: mu sqrt(sum over pairs of ||W_i||^2 ||W_j||^2)."
    )
    return table("Proposition 1", rows, note)


def _pooling_table(study: pd.DataFrame) -> Table:
    rows = _rows(study, part="pooling")
    rows = rows[rows["quantity"].isin(["mean", "std"])] if len(rows) else rows
    when = {"none": "before", "max": "after max pooling", "average": "after average pooling"}
    rows = rows.assign(pooling=[when.get(kind, kind) for kind in rows["pooling"]]) if len(rows) else rows
    note = (
        "Mean and standard deviation of a NormProp layer's output, over channels, positions and images. Neighbours in "
        "white input are independent, in images alike."
    )
    keys = ["input", "filter", "jacobian_factor"]
    return _spread("Before and after pooling", note, rows, keys, ["pooling", "quantity"], 3)


def _trained_table(trained: Mapping[str, Runs]) -> Table:
    rows = [
        {"norm": style.look(norm).label, "seeds": len(runs)}
        | {measure.name: measure.mean(runs) for measure in (DISTANCE, INCOHERENT, RANDOM)}
        for norm, runs in trained.items()
        if runs
    ]
    note = (
        "After training. Distance: largest gap between the distribution functions of a unit's standardised "
        "pre-activations and of a normal one, median over units, then over hidden layers. Near to orthogonal: |cosine| "
        f"under 0.3. {INTERVALS}"
    )
    return table("Trained networks", rows, note)


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(study: pd.DataFrame, trained: Mapping[str, Runs]) -> list[Figure]:
    figures = []
    if len(_rows(study, part="chain", activation="relu")):
        figures.append(
            Figure(
                "np_moments_chain",
                "Mean and standard deviation, layer after layer",
                "ReLU layers on white input, over all units and inputs. Lines: what the layer is meant to keep. The "
                "printed factor (1.21) and the exact one (1.2112) cannot be told apart here.",
                lambda: _draw_chain(study),
            )
        )
    if len(_bounds(study)):
        figures.append(
            Figure(
                "np_moments_proposition1",
                "Proposition 1: what is off the diagonal, against its bounds",
                "Above the line a bound is broken. Cases whose printed bound is imaginary stand at the left edge.",
                lambda: _draw_bounds(study),
            )
        )
    if any(trained.values()):
        figures.append(
            Figure(
                "np_moments_gaussian",
                "Distance of pre-activations from a normal distribution, by layer",
                "Median over units after training, mean over seeds with 95 % intervals. NIN pads conv8, a 1 x 1 "
                "convolution, so that most of what it gives is a constant.",
                lambda: _draw_gaussian(trained),
            )
        )
    return figures


def _draw_chain(study: pd.DataFrame) -> matplotlib.figure.Figure:
    figure, panels = style.canvas(1, 2)
    names = ["J none", "J paper", "prop"]
    looks = dict(
        zip(FACTORS, style.looks(names, dict(zip(names, FACTORS.values(), strict=True))).values(), strict=True)
    )
    chain = _rows(study, part="chain", activation="relu", width=_widest(study))
    for axes, quantity, wanted in zip(panels[0], ("mean", "std"), (0.0, 1.0), strict=True):
        axes.axhline(wanted, color="0.35", linewidth=0.8)
        for factor, look in looks.items():
            rows = _rows(chain, quantity=quantity, jacobian_factor=factor).sort_values("layer")
            if len(rows):
                axes.plot(rows["layer"], rows["value"], marker=look.marker, label=look.label, **look.line)
        axes.set(xlabel="layer", ylabel={"mean": "mean", "std": "standard deviation"}[quantity])
    style.legend(figure)
    return figure


def _draw_bounds(study: pd.DataFrame) -> matplotlib.figure.Figure:
    figure, panels = style.canvas()
    axes, cases = panels[0, 0], _bounds(study)
    floor = 1e-3  # orthogonal rows have a distance of zero, which a logarithmic axis cannot show
    for name, look in (("printed_bound", style.SPARE[2]), ("mended_bound", style.look("batch"))):
        label = name.replace("_", " ")
        bound = np.maximum(cases[name].fillna(floor), floor)
        axes.plot(bound, np.maximum(cases["distance"], floor), label=label, **look.points)
    top = float(max(cases["printed_bound"].max(), cases["distance"].max()))
    axes.plot([floor, top], [floor, top], color="0.35", linewidth=0.9)
    axes.set(xlabel="bound", ylabel="||Sigma - diag(alpha)||", xscale="log", yscale="log")
    style.legend(figure)
    return figure


def _draw_gaussian(trained: Mapping[str, Runs]) -> matplotlib.figure.Figure:
    figure, panels = style.canvas()
    axes = panels[0, 0]
    layers: list[str] = []
    for norm, runs in trained.items():
        by_run = [_at(run, "gaussianity/distance_median") for run in runs]
        layers = layers or [str(layer) for layer in (by_run[0].index if by_run else ())]
        estimates = [
            statistics.mean(float(values[layer]) for values in by_run if math.isfinite(values.get(layer, math.nan)))
            for layer in layers
        ]
        style.points(axes, style.look(norm), range(len(layers)), estimates)
    axes.set_xticks(
        range(len(layers)), [layer.removeprefix("model.").removesuffix(".conv") for layer in layers], rotation=45
    )
    axes.set_ylabel("distance from normal")
    axes.set_ylim(bottom=0)
    style.legend(figure)
    return figure


EXPERIMENT = Experiment(
    "np_moments",
    "Do the moments, the Jacobian and the bounds hold on which NormProp rests, and the assumptions behind them?",
    Own(examine),
    diagnostics=DIAGNOSTICS,
)
