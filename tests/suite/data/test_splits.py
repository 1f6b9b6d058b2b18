"""Data sets by name: what is split off, that it never moves, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backforward_suite.data import DataError, DataSplits, Images, default_root, load_data, sources
from backforward_suite.data.draws import first, turns

Arrays = dict[str, NDArray[Any]]


def unique(count: int, start: int = 0) -> NDArray[np.uint8]:
    """Return images of 2 x 2 pixels, each the number ``start + i`` in its bytes."""
    return np.arange(start, start + count, dtype="<u4").view(np.uint8).reshape(count, 2, 2)


def numbers(images: Images) -> list[int]:
    return images.x.numpy().reshape(len(images), 4).copy().view("<u4")[:, 0].tolist()


def write(root: Path, name: str = "mine", **changes: Any) -> Arrays:
    """Write 100 + 20 unique images of 4 classes, 10, 20, 30 and 40 of each in training."""
    y = np.random.RandomState(0).permutation(np.repeat(np.arange(4), [10, 20, 30, 40])).astype(np.uint8)
    arrays = {"x_train": unique(100), "y_train": y, "x_test": unique(20, 100), "y_test": np.arange(20) % 4} | changes
    root.mkdir(exist_ok=True)
    np.savez(root / f"{name}.npz", **arrays)
    return arrays


def refusal(root: Path, name: str = "mine", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_data(name, root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parts_of(data: DataSplits) -> tuple[Images, Images, Images]:
    return data.train, data.validation, data.test


# ----------------------------------------------------------------------------------------------------------- draws

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(lambda labels: np.array(labels, np.int64))
exactly = settings(derandomize=True, deadline=None, max_examples=100)


@exactly
@given(LABELS)
def test_turns_number_the_images_of_each_class(labels: NDArray[np.int64]) -> None:
    turn = turns(labels)
    for label in set(labels.tolist()):
        assert sorted(turn[labels == label].tolist()) == list(range((labels == label).sum()))


@exactly
@given(LABELS, st.data())
def test_the_first_images_are_balanced_and_nested(labels: NDArray[np.int64], data: st.DataObject) -> None:
    few = data.draw(st.integers(0, len(labels)))
    many = data.draw(st.integers(few, len(labels)))
    mask = first(labels, few)
    assert mask.sum() == few
    assert not (mask & ~first(labels, many)).any()
    # A class has one image less than another, or it is used up.
    drawn, there = (np.bincount(y, minlength=5) for y in (labels[mask], labels))
    assert all(drawn[c] >= drawn.max() - 1 or drawn[c] == there[c] for c in range(5))


# ---------------------------------------------------------------------------------------------------------- splits


def test_an_own_set_holds_out_a_tenth_of_each_class(tmp_path: Path) -> None:
    arrays = write(tmp_path)
    data = load_data("mine", tmp_path)
    assert (data.name, data.classes, data.shape, data.source) == ("mine", 4, (1, 2, 2), str(tmp_path / "mine.npz"))
    assert torch.bincount(data.validation.y).tolist() == [1, 2, 3, 4]
    assert torch.bincount(data.train.y).tolist() == [9, 18, 27, 36]
    assert sorted(numbers(data.train) + numbers(data.validation)) == list(range(100))
    assert numbers(data.test) == list(range(100, 120))
    every = np.concatenate([arrays["y_train"], arrays["y_test"]])
    for images in parts_of(data):
        assert images.y.tolist() == every[numbers(images)].tolist()


def test_protocols(tmp_path: Path) -> None:
    write(tmp_path)
    holdout, paper, poster = (load_data("mine", tmp_path, protocol=name) for name in ("holdout", "paper", "poster"))
    assert numbers(paper.train) == numbers(holdout.train)
    assert numbers(poster.train) == list(range(100))
    for data in (paper, poster):
        assert data.validation is data.test
        assert numbers(data.test) == numbers(holdout.test)
    assert len({holdout.fingerprint, paper.fingerprint, poster.fingerprint}) == 3


@pytest.mark.parametrize("protocol", ["holdout", "paper", "poster"])
def test_fewer_training_images_leave_validation_and_test_alone(tmp_path: Path, protocol: str) -> None:
    write(tmp_path)
    whole, small, smaller = (load_data("mine", tmp_path, protocol=protocol, train_images=n) for n in (None, 20, 7))
    assert set(numbers(smaller.train)) < set(numbers(small.train)) < set(numbers(whole.train))
    assert torch.bincount(small.train.y).tolist() == [5, 5, 5, 5]
    assert sorted(torch.bincount(smaller.train.y).tolist()) == [1, 2, 2, 2]
    for data in (small, smaller):
        assert numbers(data.validation) == numbers(whole.validation)
        assert numbers(data.test) == numbers(whole.test)
    assert (
        load_data("mine", tmp_path, protocol=protocol, train_images=len(whole.train)).fingerprint == whole.fingerprint
    )


def test_digits() -> None:
    data = load_data("digits", Path("/nowhere"))
    assert [len(images) for images in parts_of(data)] == [1297, 250, 250]
    for images in (data.validation, data.test):
        assert torch.bincount(images.y).tolist() == [25] * 10
    assert (data.classes, data.shape, data.source) == (10, (1, 8, 8), "scikit-learn")
    assert data.train.x.min() == 0
    assert data.train.x.max() == 255
    assert len(load_data("digits", Path("/nowhere"), protocol="poster").train) == 1547
    assert data.fingerprint == FINGERPRINTS["digits"]


def test_a_size_resizes_every_part() -> None:
    small, big = (load_data("digits", Path("/nowhere"), size=size) for size in (None, 32))
    assert big.shape == (1, 32, 32)
    assert big.fingerprint == FINGERPRINTS["digits at 32"]
    for one, other in zip(parts_of(small), parts_of(big), strict=True):
        assert torch.equal(one.resize(32).x, other.x)
        assert torch.equal(one.y, other.y)
    paper = load_data("digits", Path("/nowhere"), size=32, protocol="paper")
    assert paper.validation is paper.test


def test_svhn_trains_on_train_and_extra_less_the_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small: 30 of 200 images are held out of train and 20 of 400 out of extra, the same number of each class."""
    known = replace(
        sources.KNOWN["svhn"],
        shape=(1, 2, 2),
        sizes={"train": 200, "extra": 400, "test": 50},
        held_out={"train": 30, "extra": 20},
    )
    assert sources.KNOWN["svhn"].held_out == {"train": 400 * 10, "extra": 200 * 10}
    monkeypatch.setitem(sources.KNOWN, "svhn", known)
    labels = np.random.RandomState(3).randint(0, 10, 650).astype(np.uint8)
    arrays, start = {}, 0
    for part, count in known.sizes.items():
        arrays |= {f"x_{part}": unique(count, start), f"y_{part}": labels[start : start + count]}
        start += count
    np.savez(tmp_path / "svhn.npz", **arrays)
    data = load_data("svhn", tmp_path)
    chosen = np.array(numbers(data.validation))
    assert np.bincount(labels[chosen[chosen < 200]]).tolist() == [3] * 10
    assert np.bincount(labels[chosen[chosen >= 200]]).tolist() == [2] * 10
    assert numbers(data.train) == sorted(set(range(600)) - set(chosen.tolist()))
    assert numbers(data.test) == list(range(600, 650))
    assert data.train.y.tolist() == labels[numbers(data.train)].tolist()
    assert numbers(load_data("svhn", tmp_path, protocol="poster").train) == list(range(600))
    few = load_data("svhn", tmp_path, train_images=100)
    assert np.bincount(labels[numbers(few.train)]).tolist() == [10] * 10
    assert min(numbers(few.train)) < 200 <= max(numbers(few.train))


def test_the_split_is_the_same_whatever_the_run_drew_before() -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    one = load_data("digits", Path("/nowhere"), train_images=50).fingerprint
    np.random.seed(2)
    torch.manual_seed(2)
    drawn = np.random.get_state(), torch.get_rng_state()
    assert load_data("digits", Path("/nowhere"), train_images=50).fingerprint == one
    assert np.array_equal(np.random.get_state()[1], drawn[0][1])
    assert torch.equal(torch.get_rng_state(), drawn[1])


def test_the_fingerprint_follows_the_arrays_not_the_file(tmp_path: Path) -> None:
    arrays = write(tmp_path)
    one = load_data("mine", tmp_path).fingerprint
    np.savez_compressed(tmp_path / "other.npz", **(arrays | {"y_train": arrays["y_train"].astype(np.int64)}))
    assert load_data("other", tmp_path).fingerprint == one
    for key in ("x_train", "y_train", "x_test", "y_test"):
        changed = arrays[key].copy()
        if key[0] == "x":
            changed[3, 1, 1] ^= 1
        else:
            i, j = np.flatnonzero(changed == 0)[0], np.flatnonzero(changed == 1)[0]
            changed[[i, j]] = changed[[j, i]]
        write(tmp_path, "changed", **{key: changed})
        assert load_data("changed", tmp_path).fingerprint != one


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"x_train": unique(100).astype(np.float32)}, "x_train is float32; images must be uint8, 0 to 255"),
        ({"y_train": np.zeros(100)}, "y_train is float64; labels must be integers >= 0 (uint8)"),
        ({"y_train": np.zeros((100, 1), int)}, "y_train has shape [100, 1]; it must be [100], as there are 100 images"),
        ({"y_test": np.arange(19) % 4}, "y_test has shape [19]; it must be [20], as there are 20 images"),
        ({"x_test": unique(0), "y_test": np.zeros(0, int)}, "x_test is empty, of shape [0, 1, 2, 2]"),
        ({"x_test": np.zeros((20, 3, 2), np.uint8)}, "images are [1, 2, 2] in train, [1, 3, 2] in test; they must"),
        ({"y_train": np.arange(100) % 4 - 1}, "y_train has the label -1; labels of 4 classes must be 0 to 3"),
        ({"y_train": np.arange(100) % 4 + 1}, "y_train has the label 4; labels of 4 classes must be 0 to 3"),
        (
            {"y_train": np.arange(100) % 4 * 10**12},
            "y_train has the label 3000000000000; labels of 4 classes must be 0",
        ),
        ({"y_test": np.arange(20) % 5}, "y_test has the label 4; labels of 4 classes must be 0 to 3"),
        ({"y_test": np.arange(20) % 2 * 3}, "test has no image of class 1; each of the 4 classes needs at least one"),
        ({"y_train": np.zeros(100, int)}, "all training images are of one class; there must be at least two"),
        (
            {"y_train": np.r_[0, 1, 2, np.full(97, 3)]},
            "train has only 1 images of class 0, and validation takes 1 of them",
        ),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, changes: Arrays, fault: str) -> None:
    write(tmp_path, **changes)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}/mine.npz: {fault}")


def test_another_set_under_a_known_name(tmp_path: Path) -> None:
    write(tmp_path, "mnist")
    assert refusal(tmp_path, "mnist") == (
        f"{tmp_path}/mnist.npz: train has 100 images of [1, 2, 2] (channels, height, width),"
        f" MNIST has 60000 of [1, 28, 28]; give your own data set another name (data=npz)"
    )


def test_a_known_set_without_one_of_its_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = replace(sources.KNOWN["mnist"], shape=(1, 2, 2), sizes={"train": 100, "test": 20})
    monkeypatch.setitem(sources.KNOWN, "mnist", known)
    write(tmp_path, "mnist")
    assert refusal(tmp_path, "mnist").endswith(
        "train has no image of class 4; each of the 10 classes needs at least one"
    )
    write(tmp_path, "mnist", y_train=np.arange(100) % 11)
    assert refusal(tmp_path, "mnist").endswith("y_train has the label 10; labels of 10 classes must be 0 to 9")
    write(tmp_path, "mnist", y_train=np.arange(100) % 10, y_test=np.arange(20) % 10)
    assert "only 10 images of class 0, and validation takes 500" in refusal(tmp_path, "mnist")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"protocol": "papre"}, "no data protocol 'papre': did you mean 'paper'? there are holdout, paper, poster"),
        ({"protocol": None}, "no data protocol None: there are holdout, paper, poster"),
        ({"size": 0}, "data.size=0: must be an integer >= 1, or null"),
        ({"size": 2.5}, "data.size=2.5: must be an integer >= 1, or null"),
        ({"size": True}, "data.size=True: must be an integer >= 1, or null"),
        ({"train_images": -1}, "data.train_images=-1: must be an integer >= 1, or null"),
        ({"train_images": 3}, "has 90 training images of 4 classes; must be 4 to 90"),
        ({"train_images": 91}, "has 90 training images of 4 classes; must be 4 to 90"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, options: dict[str, Any], fault: str) -> None:
    write(tmp_path)
    assert fault in refusal(tmp_path, **options)


# -------------------------------------------------------------------------------------------------- the real sets

# A split that moves makes runs incomparable: these change only on purpose.
FINGERPRINTS = {
    "digits": "a8b2894523b03256302bd16a7521a6d5ec6652e420c3667e2ed29f9af0d60294",
    "digits at 32": "1c8c4b7bfbeaf6d10a5460e2dc76010dd2a3177205c89710ea012627206347c1",
    "mnist": "45797a821bf8a3ad6942e108fe5adb7a30e351f251e15bef4add81adc23aab11",
    "cifar10": "4fba07df3746db381ef0356361b31a66ac4d555044f69ecd2bce6d2325745172",
    "cifar100": "c7f9185ae932697d578b3be1b95b538e6cf9c9cceb77303f3d86e28f83e7215d",
}
REAL = {
    "mnist": ((1, 28, 28), 10, 55_000, [5423, 6242, 5458, 5631, 5342, 4921, 5418, 5765, 5351, 5449]),
    "cifar10": ((3, 32, 32), 10, 45_000, [4500] * 10),
    "cifar100": ((3, 32, 32), 100, 45_000, [450] * 100),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_sets(name: str) -> None:
    path = default_root() / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no {path}; set BACKFORWARD_DATA to a folder with it")
    shape, classes, count, per_class = REAL[name]
    data = load_data(name, default_root())
    assert (data.shape, data.classes) == (shape, classes)
    assert [len(images) for images in parts_of(data)] == [count, 5_000, 10_000]
    assert torch.bincount(data.train.y).tolist() == per_class
    assert torch.bincount(data.validation.y).tolist() == [5_000 // classes] * classes
    assert data.fingerprint == FINGERPRINTS[name]
    few = load_data(name, default_root(), protocol="paper", train_images=1000)
    assert torch.bincount(few.train.y).tolist() == [1000 // classes] * classes
    assert few.validation is few.test
    assert len(load_data(name, default_root(), protocol="poster", train_images=1000).validation) == 10_000


def test_evaluation_on_fewer_images_keeps_the_classes_balanced() -> None:
    whole = load_data("digits", Path("/nowhere"))
    few = load_data("digits", Path("/nowhere"), evaluation_images=50)
    for part in (few.validation, few.test):
        assert torch.bincount(part.y).tolist() == [5] * 10
    assert torch.equal(few.train.x, whole.train.x)
    with pytest.raises(DataError, match=r"data.evaluation_images=251: .* has 250 test images"):
        load_data("digits", Path("/nowhere"), evaluation_images=251)
