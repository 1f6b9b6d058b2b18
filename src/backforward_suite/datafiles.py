"""The files of a data set under a root, both for reading them and for asking whether they have changed."""

from __future__ import annotations

from pathlib import Path

# The files that torchvision keeps under the root.
TORCHVISION = {
    "mnist": ("MNIST",),
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "svhn": ("train_32x32.mat", "extra_32x32.mat", "test_32x32.mat"),
}
BUNDLED = "digits"  # comes with scikit-learn

Stamp = list[str | int]  # path, size in bytes, time of the last change in nanoseconds


def stamps(name: str, root: Path) -> list[Stamp]:
    """The stamps of the files that a data set would be read from now; empty if there are none."""
    if name == BUNDLED:
        return []
    npz = root / f"{name}.npz"
    places = [npz] if npz.exists() else [root / file for file in TORCHVISION.get(name, ())]
    files = [path for place in places for path in ([place] if not place.is_dir() else sorted(place.rglob("*")))]
    return [_stamp(path) for path in files if path.is_file()]


def is_lacking(name: str, root: Path) -> bool:
    """Whether a data set is missing under a root but can be downloaded to it."""
    return name in TORCHVISION and not stamps(name, root)


def _stamp(path: Path) -> Stamp:
    seen = path.stat()
    return [str(path.absolute()), seen.st_size, seen.st_mtime_ns]
