"""One style for all figures: safe for colour-blind readers, readable in grey, the same bytes from the same runs.

An arm looks the same in every figure. Colours are those of Okabe and Ito; arms also differ in dash and marker. Our own
numbers are lines and filled markers with intervals, published ones are hollow markers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from backforward_suite.report.finding import Estimate

BLACK, GREY = "#000000", "#6b6b6b"
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.35",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.91",
    "grid.linewidth": 0.7,
    "xtick.color": "0.35",
    "ytick.color": "0.35",
    "xtick.labelcolor": "0.1",
    "ytick.labelcolor": "0.1",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.8,  # long enough to show dashes
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "svg.hashsalt": "backforward",  # otherwise ids are random
    "svg.fonttype": "path",  # independent of installed fonts
    "path.simplify": True,
}
PANEL = (2.8, 2.3)  # inches, of one panel: two are readable on a phone
STAMP_SIZE = 6.5  # points

Dash = str | tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class Look:
    """How an arm is drawn."""

    label: str
    colour: str
    dash: Dash
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`, without markers."""
        return {"color": self.colour, "linestyle": self.dash}

    @property
    def points(self) -> dict[str, Any]:
        """Arguments of a filled marker, for our numbers."""
        return {"color": self.colour, "marker": self.marker, "linestyle": "none"}

    @property
    def hollow(self) -> dict[str, Any]:
        """Arguments of a hollow marker, for published numbers."""
        return {**self.points, "markerfacecolor": "white", "markeredgecolor": self.colour, "markeredgewidth": 1.3}


LOOKS: dict[str, Look] = {
    # update rules
    "sgd": Look("SGD", BLACK, "-", "o"),
    "bfp": Look("BFP", VERMILLION, "-", "s"),
    "bfp_poster": Look("published loop", BLUE, "--", "^"),
    "sgd_2lr": Look("SGD at twice the lr", GREEN, "-.", "v"),
    "sgd_repeat": Look("SGD, two steps a batch", PURPLE, ":", "D"),
    "bfp_warmup": Look("BFP first, then SGD", ORANGE, (0, (5, 1)), "P"),
    "bfp_finetune": Look("SGD first, then BFP", SKY, (0, (3, 1, 1, 1, 1, 1)), "X"),
    "bfp_naive": Look("BFP, naive engine", VERMILLION, ":", "s"),
    # norms
    "none": Look("no norm", GREY, ":", "o"),
    "batch": Look("BatchNorm", BLUE, "--", "s"),
    "prop": Look("NormProp", VERMILLION, "-", "^"),
}
# For arms without a look of their own, in this order.
SPARE = (
    Look("", GREEN, "-", "D"),
    Look("", PURPLE, "--", "v"),
    Look("", ORANGE, "-.", "P"),
    Look("", SKY, ":", "X"),
    Look("", BLUE, (0, (5, 1)), "<"),
    Look("", GREY, (0, (1, 1)), ">"),
)
RULES_AND_NORMS = " + "  # between a rule and a norm: "bfp + batch"


def look(arm: str) -> Look:
    """The look of a known arm, or of a rule with a norm (`bfp + batch`): the norm's colour, the rule's dash.

    Raises:
        KeyError: It has none; use `looks`.
    """
    if arm in LOOKS:
        return LOOKS[arm]
    rule, _, norm = arm.partition(RULES_AND_NORMS)
    by_rule, by_norm = LOOKS[rule], LOOKS[norm]
    dash = "-" if rule == "sgd" else "--" if rule == "bfp" else by_rule.dash
    # Distinct without colour: SGD has the norm's own marker, Backforward another for each norm.
    marker = {"none": "D", "batch": "P", "prop": "v"}[norm] if rule == "bfp" else by_norm.marker
    return Look(f"{by_rule.label}, {by_norm.label}", by_norm.colour, dash, marker)


def looks(arms: Sequence[str], labels: Mapping[str, str] | None = None) -> dict[str, Look]:
    """The look of each arm; unknown arms get spare looks in order.

    Args:
        arms: Names of arms, each once.
        labels: Names in the legend that differ from the usual ones, by arm.
    """
    spare = iter(SPARE * (1 + len(arms) // len(SPARE)))
    found = {}
    for arm in arms:
        try:
            found[arm] = look(arm)
        except KeyError:
            found[arm] = replace(next(spare), label=arm)
    return {arm: replace(of, label=(labels or {}).get(arm, of.label)) for arm, of in found.items()}


def sequence(values: Sequence[Any], form: str = "{}") -> dict[Any, Look]:
    """Looks for ordered values (batch sizes, depths): from dark to light, each with a marker and a dash."""
    dashes, markers = ("-", "--", "-.", ":"), "osD^vPX"
    shades = colormaps["cividis"](np.linspace(0, 0.85, max(1, len(values))))
    return {
        value: Look(form.format(value), to_hex(shades[k]), dashes[k % len(dashes)], markers[k % len(markers)])
        for k, value in enumerate(values)
    }


# --- canvas ----------------------------------------------------------------------------------------------------------


@contextmanager
def applied() -> Iterator[None]:
    """A context in which figures have the style; draw and save within it."""
    with rc_context(STYLE):
        yield


def canvas(
    rows: int = 1,
    columns: int = 1,
    *,
    panel: tuple[float, float] = PANEL,
    sharex: bool | Literal["none", "all", "row", "col"] = False,
    sharey: bool | Literal["none", "all", "row", "col"] = False,
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """A figure and its axes as an array `[rows, columns]`.

    Args:
        rows: Panels below each other.
        columns: Panels side by side; more than two do not fit on a phone.
        panel: Width and height of one panel, inches. A single column is half as wide again.
        sharex: As in matplotlib.
        sharey: As in matplotlib.
    """
    width, height = panel
    width = width * 1.5 if columns == 1 else width * columns
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)


def legend(figure: Figure) -> None:
    """One legend above all panels, with each label once, in as many columns as fit."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    for columns in range(min(4, len(found)), 0, -1):
        made = figure.legend(
            list(found.values()), list(found), loc="outside upper left", ncols=columns, columnspacing=1.4
        )
        if columns == 1 or made.get_window_extent().width <= 0.98 * figure.bbox.width:
            return
        made.remove()


def at_values(axes: Axes, values: Sequence[float], form: str = "{:g}") -> None:
    """A logarithmic horizontal axis with ticks at exactly the values of a sweep."""
    axes.set_xscale("log")
    ticks = sorted(set(values))
    axes.set_xticks(ticks, [form.format(value) for value in ticks])
    axes.set_xticks([], minor=True)


def log_ticks(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers at 1, 2 and 5 times the powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def few_ticks(axes: Axes) -> None:
    """A logarithmic horizontal axis with at most four labels, at powers of ten."""
    axes.xaxis.set_major_locator(LogLocator(base=10, numticks=4))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def stamp(figure: Figure, text: str) -> None:
    """Write scale and hardware below a figure, so that it is never shown without them."""
    height = figure.get_figheight()
    strip = 1.9 * STAMP_SIZE / 72 / height
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, strip, 1, 1 - strip))  # type: ignore[call-arg]
    figure.text(0.995, 0.25 * strip, text, ha="right", va="bottom", fontsize=STAMP_SIZE, color="0.4")


def encode(figure: Figure, kind: Literal["svg", "png"]) -> bytes:
    """The file of a figure without date or version, so that the same figure gives the same bytes."""
    file = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(file, format=kind, metadata=metadata)
    return _canonical(file.getvalue()) if kind == "svg" else file.getvalue()


def _canonical(svg: bytes) -> bytes:
    """The same bytes although the last bit of a coordinate may differ, with the machine or with earlier figures.

    Paths are rounded, and the ids that matplotlib hashes from unrounded floats are numbered.
    """

    def rounded(number: re.Match[bytes]) -> bytes:
        # Layouts favour short fractions: without the offset many of them would lie where rounding turns.
        return f"{float(number[0]) + 1e-5:.3f}".rstrip("0").rstrip(".").encode()

    svg = re.sub(rb'(?<= d=")[^"]+', lambda path: re.sub(rb"-?\d+\.\d+", rounded, path[0]), svg)
    hashed = re.findall(rb'id="([a-z][0-9a-f]{10})"', svg)
    # A reference may precede its target; the order of definitions is always the same.
    numbers = {old: b"i%d" % number for number, old in enumerate(dict.fromkeys(hashed), start=1)}
    return re.sub(rb'(id="|#)([a-z][0-9a-f]{10})\b', lambda found: found[1] + numbers.get(found[2], found[2]), svg)


def epochs(axes: Axes) -> None:
    """A horizontal axis of epochs, with integer ticks."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


# --- what is drawn ---------------------------------------------------------------------------------------------------


def band(axes: Axes, of: Look, frame: pd.DataFrame, markers: int = 12) -> None:
    """A curve with its interval.

    Args:
        axes: Where.
        of: The arm's look.
        frame: Index: the horizontal axis. Columns `value`, `low`, `high`; missing intervals are not drawn.
        markers: The largest number of markers on the curve.
    """
    frame = frame.dropna(subset=["value"])
    if frame.empty:
        return
    every = max(1, -(-len(frame) // markers))
    axes.plot(frame.index, frame["value"], marker=of.marker, markevery=every, label=of.label, **of.line)
    axes.fill_between(frame.index, frame["low"], frame["high"], color=of.colour, alpha=0.16, linewidth=0)


def published(axes: Axes, of: Look, x: Sequence[float], y: Sequence[float], label: str = "published") -> None:
    """Published numbers: hollow markers without a line, in the arm's colour."""
    axes.plot(x, y, label=label, zorder=3, **of.hollow)


def interval(axes: Axes, of: Look, at: float, estimate: Estimate, *, upright: bool = True, label: str = "") -> None:
    """One estimate with its interval, as a marker with whiskers; nothing if it has no value."""
    if estimate.value is None:
        return
    low, high = (_length(estimate.value, end) for end in (estimate.low, estimate.high))
    arguments: dict[str, Any] = {"capsize": 2.5, "elinewidth": 1.2, "label": label or "_nolegend_", **of.points}
    if upright:
        axes.errorbar([at], [estimate.value], yerr=[[low], [high]], **arguments)
    else:
        axes.errorbar([estimate.value], [at], xerr=[[low], [high]], **arguments)


def _length(value: float, end: float | None) -> float:
    return 0.0 if end is None else abs(value - end)


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def points(axes: Axes, of: Look, x: Sequence[float], estimates: Sequence[Estimate | None], line: bool = True) -> None:
    """Estimates over a number (lr, batch size), with whiskers, joined by a line with gaps at missing ones."""
    there = [(at, estimate) for at, estimate in zip(x, estimates, strict=True) if _value(estimate) is not None]
    if not there:
        return
    arguments = of.line if line else of.points
    values = [np.nan if (value := _value(estimate)) is None else value for estimate in estimates]
    axes.plot(x, values, **{**arguments, "marker": of.marker}, label=of.label)
    for at, estimate in there:
        assert estimate is not None
        interval(axes, of, at, estimate)


def forest(
    axes: Axes,
    rows: Sequence[tuple[str, Estimate | None]],
    look_of: Sequence[Look] | Look,
    *,
    zero: float | None = 0.0,
    tolerance: float | None = None,
    form: str = "{:+.3g}",
) -> None:
    """Paired differences, one below the other, around a line of no difference.

    Args:
        axes: Where.
        rows: Label and estimate; the plot says if an estimate is missing.
        look_of: The look of all rows, or of each.
        zero: The value of no difference; None draws no line.
        tolerance: Half the width of the region that counts as no difference.
        form: The format of the value beside each row.
    """
    if zero is not None:
        axes.axvline(zero, color="0.35", linewidth=0.9)
        if tolerance:
            axes.axvspan(zero - tolerance, zero + tolerance, color="0.93", zorder=0)
    for row, (_, estimate) in enumerate(rows):
        of = look_of if isinstance(look_of, Look) else look_of[row]
        if estimate is None or estimate.value is None:
            axes.annotate("not measured", (0.02, row), xycoords=("axes fraction", "data"), va="center", color="0.45")
            continue
        interval(axes, of, row, estimate, upright=False)
        text = form.format(estimate.value)
        axes.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8, color="0.25")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def mark_published(axes: Axes, value: float, text: str) -> None:
    """A published number that belongs to no single point: a thin dashed line with its name."""
    axes.axhline(value, color="0.45", linewidth=0.9, linestyle=(0, (6, 3)))
    axes.annotate(
        text,
        (0.99, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color="0.3",
    )
