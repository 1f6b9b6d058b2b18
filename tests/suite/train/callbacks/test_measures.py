"""Each diagnostic on a network whose numbers are known; whole runs are in test_diagnostics.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backforward.shift import layers
from backforward_suite.train.callbacks.measures import DIAGNOSTICS, Held, Measure, Scene


def test_a_tag_names_measure_layer_and_later_updates() -> None:
    assert Measure("shift/applied", 1.0).tag == "shift/applied"
    assert Measure("shift/applied", 1.0, "head").tag == "shift/applied/head"
    assert Measure("shift/applied", 1.0, "head", 2).tag == "shift/applied/head/update2"


def scene() -> Scene:
    """A layer that passes its two inputs on, on images of which one pixel is 0 or 255 and the other always 255."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.eye(2))
    x = torch.tensor([[[[0, 255]]], [[[255, 255]]]], dtype=torch.uint8)
    return Scene(network, layers(network, x.float()), Held(x, torch.tensor([0, 1])))


def measured(name: str) -> dict[str, float]:
    return {measure.name: float(measure.value) for measure in DIAGNOSTICS[name]().measure(scene())}


def test_inputs_are_those_of_the_images() -> None:
    found = measured("inputs")
    assert found["input/mean"] == pytest.approx(0.75)
    assert found["input/mean_distance"] == pytest.approx(0.75)
    assert found["input/std"] == pytest.approx(0.25)  # of units that vary by .5 and by 0


def test_the_jacobian_of_the_identity_is_the_identity() -> None:
    found = measured("jacobian")
    assert found
    assert {round(value, 6) for name, value in found.items()} <= {0.0, 1.0}
    assert 1.0 in {round(value, 6) for value in found.values()}


def test_every_diagnostic_declares_what_it_needs() -> None:
    for diagnostic in DIAGNOSTICS.values():
        assert diagnostic.needs <= {"batch", "images", "training images"}
