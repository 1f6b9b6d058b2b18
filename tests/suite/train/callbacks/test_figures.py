from __future__ import annotations

import torch

from backforward.probes import Spectrum, UnitMoments
from backforward_suite.train.callbacks import figures


def test_inputs_show_a_row_for_each_layer() -> None:
    moments = {
        name: UnitMoments(torch.linspace(-1, 1, 9) + shift, torch.ones(9)) for shift, name in enumerate(("one", "two"))
    }
    means, stds = figures.inputs(moments).axes
    assert [label.get_text() for label in means.get_yticklabels()] == ["one", "two"]
    medians = [line.get_xdata()[0] for line in means.lines if line.get_marker() == "o"]
    assert [round(float(median), 6) for median in medians] == [0.0, 1.0]
    assert means.yaxis_inverted()  # the first layer on top
    assert stds.get_xlabel() == "std of a unit's input"


def test_spectra_are_means_over_samples() -> None:
    samples = [
        Spectrum(torch.tensor(values), torch.ones(3)) for values in ([3.0, 1.0], [1.0, 1.0, 0.5])
    ]  # one at the border
    axes = figures.spectra({"layer": samples}).axes[0]
    [line, _] = axes.lines
    assert list(line.get_ydata()) == [2.0, 1.0]
    assert list(line.get_xdata()) == [0.25, 0.75]
    assert line.get_label() == "layer"
