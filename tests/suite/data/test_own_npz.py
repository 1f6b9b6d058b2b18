"""A set of one's own: the order of its axes, its validation set, its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.helpers.configs import composed

from backforward_suite.config import DataSettings, Request, fingerprint, plain
from backforward_suite.data import DataError, load_data
from backforward_suite.data.asked import load_asked

CLASSES = 4


def images(*shape: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    x = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    return x, (np.arange(shape[0]) % CLASSES).astype(np.uint8)


def save(root: Path, *shape: int, **more: Any) -> None:
    (x, y), (xt, yt) = images(80, *shape), images(40, *shape, seed=1)
    np.savez(root / "mine.npz", **{"x_train": x, "y_train": y, "x_test": xt, "y_test": yt} | more)


@pytest.mark.parametrize(
    ("shape", "layout", "read_as"),
    [
        ((16, 16), "auto", (1, 16, 16)),
        ((16, 20), "auto", (1, 16, 20)),
        ((16, 20, 3), "auto", (3, 16, 20)),
        ((16, 16, 13), "auto", (13, 16, 16)),
        ((13, 16, 16), "nchw", (13, 16, 16)),
        ((13, 16, 16), "nhwc", (16, 13, 16)),
        ((3, 16, 16), "nchw", (3, 16, 16)),
        ((16, 16, 16), "nhwc", (16, 16, 16)),
        ((4, 4, 1), "auto", (1, 4, 4)),
    ],
    ids=str,
)
def test_the_order_of_axes(tmp_path: Path, shape: tuple[int, ...], layout: Any, read_as: tuple[int, ...]) -> None:
    save(tmp_path, *shape)
    data = load_data("mine", tmp_path, layout=layout)
    assert data.shape == read_as
    x, _ = images(40, *shape, seed=1)
    expected = x if layout == "nchw" else x.reshape(*x.shape[:3], -1).transpose(0, 3, 1, 2)
    assert torch.equal(data.test.x, torch.from_numpy(expected.copy()))


@pytest.mark.parametrize(
    "shape", [(13, 16, 16), (3, 16, 16), (3, 16, 20), (16, 16, 16), (3, 3, 3), (13, 16, 20)], ids=str
)
def test_axes_that_may_be_either_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save(tmp_path, *shape)
    with pytest.raises(DataError) as caught:
        load_data("mine", tmp_path, layout="auto")
    assert f"x_train has shape {[80, *shape]}" in str(caught.value)
    assert f"give data.layout=nchw ({shape[0]} channels) or data.layout=nhwc ({shape[2]}" in str(caught.value)


@pytest.mark.parametrize("shape", [(256,), (2, 3, 16, 16)], ids=str)
def test_what_are_no_images_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save(tmp_path, *shape)
    with pytest.raises(DataError, match=r"images are \[N, H, W\]"):
        load_data("mine", tmp_path)


def test_its_validation_set_is_the_validation_set(tmp_path: Path) -> None:
    x, y = images(24, 8, 8, seed=2)
    save(tmp_path, 8, 8, x_val=x, y_val=y)
    data = load_data("mine", tmp_path)
    assert torch.equal(data.validation.x, torch.from_numpy(x[:, None]))
    assert (len(data.train), len(data.test)) == (80, 40)
    few = load_data("mine", tmp_path, train_images=20, evaluation_images=8)
    assert (len(few.train), len(few.validation), len(few.test)) == (20, 8, 8)


def test_protocols_with_a_validation_set(tmp_path: Path) -> None:
    x, y = images(24, 8, 8, seed=2)
    save(tmp_path, 8, 8, x_val=x, y_val=y)
    paper, poster = (load_data("mine", tmp_path, protocol=protocol) for protocol in ("paper", "poster"))
    assert (len(paper.train), len(poster.train)) == (80, 104)
    assert torch.equal(paper.validation.x, paper.test.x)


def test_half_a_validation_set_and_arrays_of_no_use_are_refused(tmp_path: Path) -> None:
    x, y = images(24, 8, 8, seed=2)
    save(tmp_path, 8, 8, x_val=x)
    with pytest.raises(DataError, match="has no y_val"):
        load_data("mine", tmp_path)
    save(tmp_path, 8, 8, x_valid=x, y_valid=y)
    with pytest.raises(
        DataError, match=r"x_valid, y_valid, which would not be used: .* and x_val, y_val for a validation"
    ):
        load_data("mine", tmp_path)
    save(tmp_path, 8, 8, classes=np.array(["a", "b"]))  # no images, no labels
    assert len(load_data("mine", tmp_path).train) == 72


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_a_known_name_is_not_ones_own(tmp_path: Path, name: str) -> None:
    save(tmp_path, 8, 8)
    (tmp_path / "mine.npz").rename(tmp_path / f"{name}.npz")
    asked = Request.of(composed("data=npz", f"data.name={name}", f"data.root={tmp_path}")).settings.data
    with pytest.raises(DataError, match=f"data=npz data.name={name}: .* is a data set of its own, data={name}"):
        load_asked(asked)


def test_the_layout_is_of_the_settings_where_it_says_something(tmp_path: Path) -> None:
    own = plain(composed("data=npz", "data.name=mine"))
    named = plain(composed("data=npz", "data.name=mine", "data.layout=nchw"))
    before = {**own, "data": {key: value for key, value in own["data"].items() if key != "layout"}}
    assert fingerprint(own) == fingerprint(before)  # results from before there was the key stay valid
    assert fingerprint(named) != fingerprint(own)
    assert DataSettings.model_validate(plain(composed())["data"]).layout is None
