"""Figures of diagnostics, readable in grey: lines differ in shade and dash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from backforward.probes import Spectrum, UnitMoments

STYLE: Any = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 100,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "lines.linewidth": 1.4,
    "legend.frameon": False,
}
DASHES = ("-", "--", "-.", ":")


def inputs(moments: Mapping[str, UnitMoments]) -> Figure:
    """Draw mean and standard deviation of each layer's inputs over units: median, quartiles, 5 % and 95 % quantile."""
    with rc_context(STYLE):
        figure = Figure(layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        names = list(moments)
        for axis, quantity, wanted in ((axes[0], "mean", 0), (axes[1], "std", 1)):
            axis.axvline(wanted, color="0.5", linewidth=0.8, linestyle="--")
            for row, name in enumerate(names):
                values = getattr(moments[name], quantity).cpu().numpy()
                low, quarter, middle, three_quarters, high = np.nanpercentile(values, [5, 25, 50, 75, 95])
                axis.plot([low, high], [row, row], color="0.6")
                axis.plot([quarter, three_quarters], [row, row], color="0.25", linewidth=4, solid_capstyle="butt")
                axis.plot(middle, row, marker="o", color="white", markeredgecolor="black", markersize=5)
            axis.set_xlabel(f"{quantity} of a unit's input")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        return figure


def spectra(found: Mapping[str, Sequence[Spectrum]]) -> Figure:
    """Draw the singular values of each layer's Jacobian, largest first, means over samples, by their relative rank."""
    with rc_context(STYLE):
        figure = Figure(layout="constrained")
        axis = figure.subplots()
        shades = np.linspace(0, 0.65, len(found))
        for k, (name, samples) in enumerate(found.items()):
            # Samples of a convolution at the border may depend on fewer inputs.
            count = min(len(sample.singular) for sample in samples)
            values = np.mean([sample.singular[:count].cpu().numpy() for sample in samples], axis=0)
            share = (np.arange(count) + 0.5) / count
            axis.plot(share, values, color=str(shades[k]), linestyle=DASHES[k % len(DASHES)], label=name)
        axis.axhline(1, color="0.5", linewidth=0.8)
        axis.set(xlabel="rank, as a share of all", ylabel="singular value", xlim=(0, 1))
        axis.set_ylim(bottom=0)
        axis.legend()
        return figure
