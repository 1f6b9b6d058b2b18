"""One step at learning rate 1 on four images: does it learn them?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib.figure
import numpy as np
import pandas as pd

from backforward_suite.report import statistics, style, verdicts
from backforward_suite.report.claims import Claim
from backforward_suite.report.experiments._experiment import Experiment, Found, Own
from backforward_suite.report.experiments._figures import panels
from backforward_suite.report.experiments._measures import Runs, done
from backforward_suite.report.experiments._tables import table
from backforward_suite.report.finding import Estimate, Figure, Table
from backforward_suite.report.ground import Ground
from backforward_suite.report.reading import Run

# The setting of the published runs, which the paper does not name; the others are shown beside.
PUBLISHED = ("he", "channel")
FLOOR = 1e-8  # where curves are cut: in single precision a loss under 6e-8 comes out as 0
GUESS = math.log(10)
METHODS = ("sgd", "bfp", "bfp_poster", "sgd_repeat")
INITS = {"default": "PyTorch's initial weights", "he": "He's initial weights"}
INPUTS = {"channel": "standardised inputs", "global": "inputs standardised by pixel", "none": "raw pixels"}

Setting = tuple[str, str]  # initial weights, data norm
Losses = Mapping[str, pd.DataFrame]  # by method: index draw, a column a width; infinite where undefined
Counts = dict[str, tuple[int, int]]  # by width, how often of how many


def examine(runs: Runs, claims: Mapping[str, Claim], scale: str) -> Found:
    """Judge the claims by the loss after the step, over many fresh networks."""
    deep = [run for run in done(runs) if run.setting("model.depth", 1)]
    single = by_setting([run for run in done(runs) if run not in deep]).get(PUBLISHED, {})
    ground, settings = Ground.of(runs, scale), by_setting(deep)
    toy = settings.get(PUBLISHED, {})
    below = float(claims["learns_batch"].arguments["loss_below"])
    learnt = f"share of networks whose loss after the step is under {below:g}"
    one = next(iter(counts(single.get("sgd"), below).values()), None)  # it has no hidden width
    measured: Mapping[str, tuple[Counts, str]] = {
        "single_layer": ({"single layer": one} if one else {}, learnt),
        "learns_batch": (counts(toy.get("bfp"), below), learnt),
        "below_sgd": (wins(toy), "share of networks whose loss is lower than after SGD's step"),
        "sgd_fails": (
            counts(toy.get("sgd"), GUESS, above=True),
            "share of networks whose loss is then above a guess's",
        ),
    }
    judged = [verdicts.share(claims[word], found, ground, what=what) for word, (found, what) in measured.items()]
    figures = [
        Figure(
            "bfp_one_step_widths",
            "Loss on four images after one step at lr 1, by hidden width",
            "Median over fresh networks with its 95 % interval, 0 drawn at 1e-8. The first panel is the published "
            "runs' setting, which is judged at width 256. How far losses scatter: the next figure.",
            partial(_draw_widths, settings),
        ),
        Figure(
            "bfp_one_step_distribution",
            "How the loss after one step is distributed",
            "Share of fresh networks whose loss after the step is at most so much (0 is drawn at 1e-8), in the "
            f"published runs' setting. Dotted line: {below:g}, read as learnt; grey line: a guess among ten classes.",
            partial(_draw_distribution, toy, below),
        ),
    ]
    return Found(judged, [_table(settings, below)], figures if settings else [], _tail(toy))


def by_setting(runs: Sequence[Run]) -> dict[Setting, Losses]:
    """Losses after the step, by setting and rule."""
    found: dict[Setting, dict[str, pd.DataFrame]] = {}
    for run in runs:
        frame = run.study
        if not {"width", "draw", "loss_after"} <= set(frame.columns):
            continue
        losses = frame.pivot_table(index="draw", columns="width", values="loss_after", dropna=False)
        key = (str(run.setting("model.init", "")), str(run.setting("data_norm", "")))
        found.setdefault(key, {})[run.choice("method")] = losses.fillna(math.inf)
    order = sorted(found, key=lambda key: (key != PUBLISHED, key))
    return {key: found[key] for key in order}


def counts(losses: pd.DataFrame | None, bound: float, above: bool = False) -> Counts:
    """How many networks end under a bound (or above it), by width."""
    if losses is None:
        return {}
    hits = losses > bound if above else losses < bound
    return {f"width {width}": (int(hits[width].sum()), len(losses)) for width in losses.columns}


def wins(of_method: Losses) -> Counts:
    """In how many networks Backforward ends below SGD; equal losses, such as two of exactly 0, are not below."""
    ours, theirs = _pairs(of_method)
    return {f"width {width}": (int((ours[width] < theirs[width]).sum()), len(ours)) for width in ours.columns}


def ties(of_method: Losses) -> Counts:
    """In how many networks both end at a loss of exactly 0."""
    ours, theirs = _pairs(of_method)
    both = (ours == 0) & (theirs == 0)
    return {f"width {width}": (int(both[width].sum()), len(ours)) for width in ours.columns}


def _pairs(of_method: Losses) -> tuple[pd.DataFrame, pd.DataFrame]:
    if not {"bfp", "sgd"} <= set(of_method):
        return pd.DataFrame(), pd.DataFrame()
    ours, theirs = of_method["bfp"].align(of_method["sgd"], join="inner")
    return ours, theirs


def _table(settings: Mapping[Setting, Losses], below: float) -> Table:
    rows = []
    for (init, inputs), of_method in settings.items():
        won, tied = wins(of_method), ties(of_method)
        for method in [method for method in METHODS if method in of_method]:
            losses, learnt = of_method[method], counts(of_method[method], below)
            for width in losses.columns:
                values, name = losses[width].to_numpy(), f"width {width}"
                ours = method == "bfp" and name in won
                rows.append(
                    {
                        "initial weights": INITS.get(init, init),
                        "inputs": INPUTS.get(inputs, inputs),
                        "rule": style.look(method).label,
                        "width": width,
                        "median": _quantile(values, 0.5),
                        "10 %": _plain(values, 0.1),
                        "90 %": _plain(values, 0.9),
                        f"loss under {below:g}": statistics.share(*learnt[name]),
                        "below SGD": statistics.share(*won[name]) if ours else None,
                        "both exactly 0": f"{tied[name][0]} of {tied[name][1]}" if ours else None,
                    }
                )
    return table(
        "Loss after one step",
        rows,
        "Quantiles over fresh networks, each with four images of its own; the same for every rule. Median: 95 % "
        "interval of order statistics; shares: Wilson's 95 % interval. First: the setting of the published runs.",
    )


def _quantile(values: Sequence[float], q: float) -> str:
    found = statistics.quantile(values, q)
    return "infinite" if found.value is None else str(found)


def _plain(values: Sequence[float], q: float) -> str:
    value = float(np.quantile(values, q, method="inverted_cdf"))
    return f"{value:.2g}" if math.isfinite(value) else "infinite"


def _tail(toy: Losses) -> list[str]:
    """What a median hides, and how often nothing can be told apart."""
    if not {"bfp", "sgd"} <= set(toy):
        return []
    width = 256 if 256 in toy["bfp"].columns else toy["bfp"].columns[-1]
    of_rule = {method: toy[method][width].to_numpy() for method in ("bfp", "sgd") if width in toy[method]}
    told = [
        f"{style.look(method).label} median {_plain(values, 0.5)}, 90th percentile {_plain(values, 0.9)}"
        for method, values in of_rule.items()
    ]
    both, n = ties(toy).get(f"width {width}", (0, 0))
    return [
        f"Loss after the step at width {width}, in the published runs' setting: {'; '.join(told)}. In {both} of {n} "
        "networks both rules end at a loss of exactly 0, which counts for neither."
    ]


# --- figures ---------------------------------------------------------------------------------------------------------


def _draw_widths(settings: Mapping[Setting, Losses]) -> matplotlib.figure.Figure:
    figure, axes = panels(len(settings), sharey=True)
    for panel, ((init, inputs), of_method) in zip(axes, settings.items(), strict=True):
        widths: list[float] = []
        for method in [method for method in METHODS if method in of_method]:
            losses, of = of_method[method].clip(lower=FLOOR), style.look(method)
            widths = [float(width) for width in losses.columns]
            medians: list[Estimate | None] = [statistics.quantile(losses[width], 0.5) for width in losses.columns]
            style.points(panel, of, widths, medians)
        panel.set(yscale="log", title=f"{INITS.get(init, init)},\n{INPUTS.get(inputs, inputs)}", xlabel="hidden width")
        style.at_values(panel, widths)
    for panel in axes[::2]:
        panel.set_ylabel("loss after the step (nats)")
    style.legend(figure)
    return figure


def _draw_distribution(toy: Losses, below: float) -> matplotlib.figure.Figure:
    widths = sorted({width for losses in toy.values() for width in losses.columns})
    figure, axes = panels(max(1, len(widths)), sharex=True, sharey=True)
    for panel, width in zip(axes, widths, strict=False):
        panel.axvline(below, color="0.3", linewidth=0.9, linestyle=":")
        panel.axvline(GUESS, color="0.75", linewidth=0.9)
        for method in [method for method in METHODS if method in toy and width in toy[method]]:
            values, of = np.sort(toy[method][width].to_numpy()), style.look(method)
            shares = np.arange(1, len(values) + 1) / len(values)
            there = np.isfinite(values)
            drawn = np.maximum(values[there], FLOOR)
            panel.plot(drawn, shares[there], marker=of.marker, markevery=0.1, label=of.label, **of.line)
        panel.set(xscale="log", title=f"hidden width {width}", ylim=(0, 1))
    for panel in axes[::2]:
        panel.set_ylabel("share of networks")
    for panel in axes[-2:]:
        panel.set_xlabel("loss after the step (nats)")
    style.legend(figure)
    return figure


EXPERIMENT = Experiment(
    "bfp_one_step",
    "Does one step of Backforward at learning rate 1 learn a batch of four images?",
    Own(examine),
)
