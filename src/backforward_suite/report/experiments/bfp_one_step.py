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
from backforward_suite.report.experiments import _common as common
from backforward_suite.report.finding import Estimate, Figure, Finding, Table
from backforward_suite.report.reading import Run
from backforward_suite.report.verdicts import Ground

QUESTION = "Does one step of Backforward at learning rate 1 learn a batch of four images?"
# The paper's toy: PyTorch's own initial weights and standardised inputs. The other settings are shown beside.
OF_THE_PAPER = ("default", "channel")
FLOOR = 1e-8  # where curves are cut: in single precision a loss under 6e-8 comes out as 0
METHODS = ("sgd", "bfp", "bfp_poster", "sgd_repeat")
INITS = {"default": "PyTorch's initial weights", "he": "He's initial weights"}
INPUTS = {"channel": "standardised inputs", "global": "inputs standardised by pixel", "none": "raw pixels"}

Setting = tuple[str, str]  # initial weights, data norm
Losses = Mapping[str, pd.DataFrame]  # by method: index draw, a column a width; infinite where undefined


def examine(runs: Sequence[Run], claims: Sequence[Claim], scale: str) -> Finding:
    """Judge the claims by the loss after the step, over many fresh networks."""
    of, ground = common.by_word(claims), Ground.of(runs, scale)
    settings = _by_setting(common.done(runs))
    toy = settings.get(OF_THE_PAPER, {})
    below = float(of["learns_batch"].arguments["loss_below"])
    learnt = _counts(toy.get("bfp"), below) if "bfp" in toy else {}
    judged = [
        verdicts.share(of["learns_batch"], learnt, ground),
        verdicts.share(of["below_sgd"], _wins(toy), ground),
    ]
    tables = [_table(settings, below)]
    figures = [
        Figure(
            "bfp_one_step_widths",
            "Loss on four images after one step at lr 1, by hidden width",
            "Median over fresh networks with its 95 % interval; thin lines: 10th and 90th percentile; 0 is drawn at "
            "1e-8. The claim is about the first panel.",
            partial(_draw_widths, settings),
        ),
        Figure(
            "bfp_one_step_distribution",
            "How the loss after one step is distributed",
            "Share of fresh networks whose loss after the step is at most so much (0 is drawn at 1e-8), for "
            "PyTorch's initial weights and "
            f"standardised inputs. Dotted line: {below:g}, read as learnt; grey line: a guess among ten classes.",
            partial(_draw_distribution, toy, below),
        ),
    ]
    notes = _tail(toy)
    return common.finding("bfp_one_step", QUESTION, runs, claims, scale, judged, tables, figures, notes)


def _by_setting(runs: Sequence[Run]) -> dict[Setting, Losses]:
    found: dict[Setting, dict[str, pd.DataFrame]] = {}
    for run in runs:
        frame = run.study
        if not {"width", "draw", "loss_after"} <= set(frame.columns):
            continue
        losses = frame.pivot_table(index="draw", columns="width", values="loss_after", dropna=False)
        key = (str(run.setting("model.init", "")), str(run.setting("data_norm", "")))
        found.setdefault(key, {})[run.choice("method")] = losses.fillna(math.inf)
    order = sorted(found, key=lambda key: (key != OF_THE_PAPER, key))
    return {key: found[key] for key in order}


def _counts(losses: pd.DataFrame | None, below: float) -> dict[str, tuple[int, int]]:
    if losses is None:
        return {}
    return {f"width {width}": (int((losses[width] < below).sum()), len(losses)) for width in losses.columns}


def _wins(of_method: Losses) -> dict[str, tuple[int, int]]:
    if not {"bfp", "sgd"} <= set(of_method):
        return {}
    ours, theirs = of_method["bfp"].align(of_method["sgd"], join="inner")
    return {f"width {width}": (int((ours[width] < theirs[width]).sum()), len(ours)) for width in ours.columns}


def _table(settings: Mapping[Setting, Losses], below: float) -> Table:
    rows = []
    for (init, inputs), of_method in settings.items():
        wins = _wins(of_method)
        for method in METHODS:
            losses = of_method.get(method)
            for width in [] if losses is None else losses.columns:
                assert losses is not None
                values = losses[width].to_numpy()
                hits, n = _counts(losses, below)[f"width {width}"]
                row: dict[str, object] = {
                    "initial weights": init,
                    "inputs": inputs,
                    "rule": style.look(method).label,
                    "width": width,
                    "median": _quantile(values, 0.5),
                    "10 %": _plain(values, 0.1),
                    "90 %": _plain(values, 0.9),
                    f"loss under {below:g}": statistics.share(hits, n),
                }
                if method == "bfp" and wins:
                    row["below SGD"] = statistics.share(*wins[f"width {width}"])
                rows.append(row)
    return common.table(
        "Loss after one step",
        rows,
        "Quantiles over fresh networks, each with four images of its own; the same for every rule. Median: 95 % "
        "interval between order statistics. Shares: Wilson's 95 % interval. A loss that is no number counts as "
        "infinite.",
    )


def _quantile(values: Sequence[float], q: float) -> str:
    found = statistics.quantile(values, q)
    return "infinite" if found.value is None else str(found)


def _plain(values: Sequence[float], q: float) -> str:
    value = float(np.quantile(values, q, method="inverted_cdf"))
    return f"{value:.2g}" if math.isfinite(value) else "infinite"


def _tail(toy: Losses) -> list[str]:
    """What a median hides."""
    if not {"bfp", "sgd"} <= set(toy):
        return []
    width = 256 if 256 in toy["bfp"].columns else toy["bfp"].columns[-1]
    of_rule = {method: toy[method][width].to_numpy() for method in ("bfp", "sgd") if width in toy[method]}
    told = [
        f"{style.look(method).label} median {_plain(values, 0.5)}, 90th percentile {_plain(values, 0.9)}"
        for method, values in of_rule.items()
    ]
    return [f"Loss after the step at width {width}, the paper's setting: {'; '.join(told)}."]


# --- figures ---------------------------------------------------------------------------------------------------------


def _draw_widths(settings: Mapping[Setting, Losses]) -> matplotlib.figure.Figure:
    figure, panels = common.panels(len(settings), sharey=True)
    for panel, ((init, inputs), of_method) in zip(panels, settings.items(), strict=True):
        widths: list[float] = []
        for method in [method for method in METHODS if method in of_method]:
            losses, of = of_method[method].clip(lower=FLOOR), style.look(method)
            widths = [float(width) for width in losses.columns]
            medians: list[Estimate | None] = [statistics.quantile(losses[width], 0.5) for width in losses.columns]
            style.points(panel, of, widths, medians)
            for q in (0.1, 0.9):
                ends = [float(np.quantile(losses[width], q, method="inverted_cdf")) for width in losses.columns]
                drawn = [end if math.isfinite(end) else math.nan for end in ends]
                panel.plot(widths, drawn, **{**of.line, "linewidth": 0.8})
        panel.set(yscale="log", title=f"{INITS.get(init, init)},\n{INPUTS.get(inputs, inputs)}", xlabel="hidden width")
        style.at_values(panel, widths)
    for panel in panels[::2]:
        panel.set_ylabel("loss after the step (nats)")
    style.legend(figure)
    return figure


def _draw_distribution(toy: Losses, below: float) -> matplotlib.figure.Figure:
    widths = sorted({width for losses in toy.values() for width in losses.columns})
    figure, panels = common.panels(len(widths), sharex=True, sharey=True)
    for panel, width in zip(panels, widths, strict=True):
        panel.axvline(below, color="0.3", linewidth=0.9, linestyle=":")
        panel.axvline(math.log(10), color="0.75", linewidth=0.9)
        for method in [method for method in METHODS if method in toy and width in toy[method]]:
            values, of = np.sort(toy[method][width].to_numpy()), style.look(method)
            shares = np.arange(1, len(values) + 1) / len(values)
            there = np.isfinite(values)
            panel.plot(
                np.maximum(values[there], FLOOR),
                shares[there],
                marker=of.marker,
                markevery=0.1,
                label=of.label,
                **of.line,
            )
        panel.set(xscale="log", title=f"hidden width {width}", ylim=(0, 1))
    for panel in panels[::2]:
        panel.set_ylabel("share of networks")
    for panel in panels[-2:]:
        panel.set_xlabel("loss after the step (nats)")
    style.legend(figure)
    return figure
