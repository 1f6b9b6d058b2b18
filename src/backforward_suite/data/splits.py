"""Data sets by name, split for training, validation and test."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from backforward_suite.data.draws import first, turns
from backforward_suite.data.errors import DataError
from backforward_suite.data.images import Images
from backforward_suite.data.sources import KNOWN, Known, Layout, Parts, read
from backforward_suite.datafiles import Stamp

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images [N, C, H, W], labels [N]

PROTOCOLS = ("holdout", "paper", "poster")
_BLOCK = 4096  # images copied at a time


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set, split.

    Attributes:
        name: Its name.
        classes: Number of classes; labels are 0 to ``classes - 1``.
        shape: ``(C, H, W)`` of an image.
        train: The training set.
        validation: The set on which settings are chosen (the test set under ``protocol="paper"`` and ``"poster"``).
        test: The test set.
        fingerprint: SHA-256 of the images and labels of all three, in hexadecimal.
        source: The path that was read, or ``scikit-learn``.
        files: Path, size and modification time of each file, as they were before reading; empty if not recorded.
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    train: Images
    validation: Images
    test: Images
    fingerprint: str
    source: str
    files: list[Stamp] = field(default_factory=list)


def load_data(
    name: str,
    root: Path,
    *,
    protocol: str = "holdout",
    size: int | None = None,
    train_images: int | None = None,
    evaluation_images: int | None = None,
    layout: Layout | None = None,
) -> DataSplits:
    """Return a data set, split. Every draw is class-balanced, the same in every version, and independent of the run.

    | name | train / validation / test |
    |---|---|
    | digits | 1,297 / 250 / 250 |
    | mnist | 55,000 / 5,000 / 10,000 |
    | cifar10, cifar100 | 45,000 / 5,000 / 10,000 |
    | svhn | 598,388 / 6,000 / 26,032: train and extra, less 400 and 200 of each class |
    | any other | ``<root>/<name>.npz``; validation is its ``x_val``, else a tenth of each class |

    Args:
        name: One of these names.
        root: The folder of data sets (see :func:`default_root`).
        protocol: ``holdout`` holds out validation images; ``paper`` trains on the same images but validates on the test
            set, as in the figures of Normalization Propagation (Arpit et al., ICML 2016); ``poster`` trains on all
            training images and validates on the test set, as in the published runs of Backforward Propagation (Stoica &
            Simionescu, 2023).
        size: Height and width to resize the images to; None: unchanged.
        train_images: Number of training images, the first of a fixed class-balanced order; None: all.
        evaluation_images: Number of validation images, and of test images, likewise.
        layout: Of the images in your own npz file: channels last (``nhwc``), first (``nchw``), or ``auto``: last,
            unless that is in doubt. If given, the name must be that of such a file.

    Raises:
        DataError: The data set cannot be loaded, is damaged, or does not fit these arguments.
    """
    if protocol not in PROTOCOLS:
        close = difflib.get_close_matches(str(protocol), PROTOCOLS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(f"no data protocol {protocol!r}: {hint}there are {', '.join(PROTOCOLS)}")
    for key, value in (("size", size), ("train_images", train_images), ("evaluation_images", evaluation_images)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise DataError(f"data.{key}={value!r}: must be an integer >= 1, or null")
    found, source = read(name, Path(root), layout)
    known = KNOWN.get(name)
    parts, classes = _checked(source, found, known)
    trained_on = {part: y for part, (_, y) in parts.items() if part != "test"}
    if "val" in parts:
        validated = {part: np.full(len(y), part == "val") for part, y in trained_on.items()}
    else:
        validated = {part: _hold_out(source, part, y, classes, known) for part, y in trained_on.items()}
    used = {part: np.ones_like(mask) if protocol == "poster" else ~mask for part, mask in validated.items()}
    if train_images is not None:
        _keep_first(source, parts, used, "train_images", train_images, classes)
    tested = {"test": np.ones(len(parts["test"][1]), bool)}
    if evaluation_images is not None:
        _keep_first(source, parts, tested, "evaluation_images", evaluation_images, classes)
        _keep_first(source, parts, validated, "evaluation_images", evaluation_images, classes)

    train = _gather(parts, used, size)
    test = _gather(parts, tested, size)
    validation = _gather(parts, validated, size) if protocol == "holdout" else test
    channels, height, width = test.x.shape[1:]
    return DataSplits(
        name=name,
        classes=classes,
        shape=(channels, height, width),
        train=train,
        validation=validation,
        test=test,
        fingerprint=_fingerprint(train, validation, test),
        source=source,
    )


def _checked(source: str, found: Parts, known: Known | None) -> tuple[dict[str, Part], int]:
    """Return the parts with int64 labels, and the number of classes; raise DataError if anything is wrong."""
    for part, (x, y) in found.items():
        if x.dtype != np.uint8:
            raise DataError(f"{source}: x_{part} is {x.dtype}; images must be uint8, 0 to 255")
        if y.dtype.kind not in "ui":
            raise DataError(f"{source}: y_{part} is {y.dtype}; labels must be integers >= 0 (uint8)")
        if y.shape != x.shape[:1]:
            raise DataError(
                f"{source}: y_{part} has shape {list(y.shape)}; it must be [{len(x)}], as there are {len(x)} images"
            )
        if not x.size:
            raise DataError(f"{source}: x_{part} is empty, of shape {list(x.shape)}")
        if known and x.shape != (known.sizes[part], *known.shape):
            raise DataError(
                f"{source}: {part} has {len(x)} images of {list(x.shape[1:])} (channels, height, width),"
                f" {known.title} has {known.sizes[part]} of {list(known.shape)};"
                f" give your own data set another name (data=npz)"
            )
    shape = found["train"][0].shape[1:]
    classes = known.classes if known else len(np.unique(found["train"][1]))
    if classes < 2:
        raise DataError(f"{source}: all training images are of one class; there must be at least two")
    for part, (x, y) in found.items():
        if x.shape[1:] != shape:
            raise DataError(
                f"{source}: images are {list(shape)} in train, {list(x.shape[1:])} in {part}; they must have one shape"
            )
        labels = np.unique(y)
        if labels[0] < 0 or labels[-1] >= classes:
            wrong = labels[0] if labels[0] < 0 else labels[-1]
            raise DataError(
                f"{source}: y_{part} has the label {wrong}; labels of {classes} classes must be 0 to {classes - 1}"
            )
        if len(labels) < classes:
            empty = min(set(range(classes)) - set(labels.tolist()))
            raise DataError(
                f"{source}: {part} has no image of class {empty}; each of the {classes} classes needs at least one"
            )
    return {part: (x, y.astype(np.int64)) for part, (x, y) in found.items()}, classes


def _hold_out(source: str, part: str, y: NDArray[np.int64], classes: int, known: Known | None) -> NDArray[np.bool_]:
    """Draw the validation images of a training part: return the mask, ``[N]``."""
    counts = np.bincount(y, minlength=classes)
    quota = np.full(classes, known.held_out[part] // classes) if known else np.maximum(1, counts // 10)
    if (short := np.flatnonzero(counts <= quota)).size:
        raise DataError(
            f"{source}: {part} has only {counts[short[0]]} images of class {short[0]},"
            f" and validation takes {quota[short[0]]} of them"
        )
    return turns(y) < quota[y]


def _keep_first(
    source: str, parts: dict[str, Part], used: dict[str, NDArray[np.bool_]], key: str, count: int, classes: int
) -> None:
    """Narrow the masks ``used`` to the first ``count`` images of a class-balanced order over their parts."""
    total = sum(int(mask.sum()) for mask in used.values())
    if not classes <= count <= total:
        what = "training" if key == "train_images" else "test" if "test" in used else "validation"
        raise DataError(
            f"data.{key}={count}: {source} has {total:,} {what} images of {classes} classes;"
            f" must be {classes} to {total}"
        )
    kept = first(np.concatenate([parts[part][1][mask] for part, mask in used.items()]), count)
    for mask in used.values():
        inside = np.flatnonzero(mask)
        mask[inside], kept = kept[: len(inside)], kept[len(inside) :]


def _gather(parts: dict[str, Part], masks: dict[str, NDArray[np.bool_]], size: int | None) -> Images:
    """Copy the chosen images of all parts, in order, into one array; resize them if asked."""
    chosen = {part: np.flatnonzero(mask) for part, mask in masks.items()}
    x = np.empty((sum(map(len, chosen.values())), *parts["test"][0].shape[1:]), np.uint8)
    start = 0
    for part, index in chosen.items():
        for block in np.split(index, range(_BLOCK, len(index), _BLOCK)):  # a mapped file is read in blocks
            x[start : start + len(block)] = parts[part][0][block]
            start += len(block)
    y = np.concatenate([parts[part][1][index] for part, index in chosen.items()])
    images = Images(torch.from_numpy(x), torch.from_numpy(y))
    return images if size is None else images.resize(size)


def _fingerprint(*splits: Images) -> str:
    digest = hashlib.sha256()
    for images in splits:
        digest.update(repr(tuple(images.x.shape)).encode())
        digest.update(images.x.numpy().data)
        digest.update(images.y.numpy().astype("<i8").data)
    return digest.hexdigest()
