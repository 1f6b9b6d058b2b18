from __future__ import annotations

import pytest
import torch

from backforward.models import MLP


def test_default_is_784_256_10():
    model = MLP((1, 28, 28), 10)
    assert [tuple(p.shape) for p in model.parameters()] == [(256, 784), (256,), (10, 256), (10,)]
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize("norm", ["none", "batch", "prop"])
@pytest.mark.parametrize("depth", [0, 1, 8])
def test_any_depth(norm: str, depth: int):
    model = MLP((3, 4, 4), 5, hidden=7, depth=depth, norm=norm, dropout=0.5, activation="tanh")
    assert model(torch.rand(4, 3, 4, 4)).shape == (4, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "layer"}, "unknown norm 'layer': there are none, batch, prop"),
        ({"activation": "rellu"}, "unknown activation 'rellu': there are relu, "),
        ({"init": "xavier"}, "unknown init 'xavier': there are he, glorot, lecun, default"),
        ({"depth": -1}, "depth must be at least 0, got -1"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
    ],
)
def test_refuses_bad_settings_in_one_line(settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match="^" + message) as error:
        MLP((1, 8, 8), 10, **settings)
    assert "\n" not in str(error.value)
