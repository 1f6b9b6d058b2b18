"""Read images: scikit-learn's digits, an npz file, torchvision's files, torchvision's download.

Arrays are views of the source, as ``[N, C, H, W]`` (an uncompressed npz file is mapped, not read), so that a split
copies each image once, and only if it is used.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import math
import os
import re
import shutil
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError

import numpy as np
from numpy.typing import NDArray

from backforward_suite.data.draws import turns
from backforward_suite.data.errors import DataError
from backforward_suite.datafiles import BUNDLED, TORCHVISION

Parts = dict[str, tuple[NDArray[Any], NDArray[Any]]]  # part -> images [N, C, H, W], labels [N]: not yet checked

Layout = Literal["auto", "nhwc", "nchw"]  # of the images of an npz file

_TIMEOUT = 30.0  # seconds without a byte until a download fails: torchvision itself waits forever


@dataclass(frozen=True)
class Known:
    """A known data set; a file with anything else under its name is refused.

    Attributes:
        title: Its name in messages.
        shape: ``[C, H, W]``.
        classes: Number of classes.
        sizes: Images in each official part.
        held_out: Validation images drawn from each part, the same number of each class.
        files: Torchvision's files under the root.
    """

    title: str
    shape: tuple[int, int, int]
    classes: int
    sizes: dict[str, int]
    held_out: dict[str, int]
    files: tuple[str, ...] = ()


KNOWN = {
    "digits": Known("digits", (1, 8, 8), 10, {"train": 1547, "test": 250}, {"train": 250}),
    "mnist": Known("MNIST", (1, 28, 28), 10, {"train": 60_000, "test": 10_000}, {"train": 5_000}, TORCHVISION["mnist"]),
    "cifar10": Known(
        "CIFAR-10", (3, 32, 32), 10, {"train": 50_000, "test": 10_000}, {"train": 5_000}, TORCHVISION["cifar10"]
    ),
    "cifar100": Known(
        "CIFAR-100", (3, 32, 32), 100, {"train": 50_000, "test": 10_000}, {"train": 5_000}, TORCHVISION["cifar100"]
    ),
    "svhn": Known(
        "SVHN",
        (3, 32, 32),
        10,
        {"train": 73_257, "extra": 531_131, "test": 26_032},
        {"train": 4_000, "extra": 2_000},
        TORCHVISION["svhn"],
    ),
}


def default_root() -> Path:
    """Return the folder of data sets: ``$BACKFORWARD_DATA``, else ``data``."""
    return Path(os.path.expanduser(os.environ.get("BACKFORWARD_DATA") or "data"))  # noqa: PTH111  (Path.expanduser raises for an unknown user)


def read(name: str, root: Path, layout: Layout | None = None) -> tuple[Parts, str]:
    """Return the parts of a data set and their source (a path, or a library's name).

    Your own data set may have a part ``val``, its validation set.

    Order: ``<root>/<name>.npz``, torchvision's files under ``root``, torchvision's download into ``root``. The first
    source found is used or, if it is damaged, refused; the others are never used instead.

    Raises:
        DataError: There is no such data set, or it cannot be read.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(f"{name!r} cannot be the name of a data set; {_names()}")
    if layout is not None and name in KNOWN:
        raise DataError(
            f"data=npz data.name={name}: {KNOWN[name].title} is a data set of its own, data={name};"
            f" give your own data set another name"
        )
    if name == BUNDLED:
        return _digits(), "scikit-learn"
    path, files = root / f"{name}.npz", KNOWN[name].files if name in KNOWN else ()
    try:
        if root.exists() and not root.is_dir():
            raise DataError(f"the data root {root} is a file; name a folder (data.root or $BACKFORWARD_DATA)")
        if path.exists():
            return _read_npz(path, KNOWN[name].sizes if name in KNOWN else None, layout or "auto"), str(path)
        if name not in KNOWN:
            raise _unknown(name, path)
        if there := [file for file in files if (root / file).exists()]:
            # Where some are missing, another process may be moving them here.
            with contextlib.nullcontext() if len(there) == len(files) else _locked(root):
                return _read_torchvision(name, root), str(root / files[0])
        return _download(name, root), str(root / files[0])
    except OSError as error:  # a root or file without permission
        raise DataError(f"cannot read {name} under {root}: {error.strerror or error}") from error


def _names() -> str:
    return f"there are {', '.join(KNOWN)}, and any <root>/<name>.npz of your own (data=npz data.name=<name>)"


def _unknown(name: str, path: Path) -> DataError:
    close = difflib.get_close_matches(name.lower(), KNOWN, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return DataError(f"no data set {name!r}: {hint}there is no {path}; {_names()}")


def _digits() -> Parts:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels, 0 to 16. There is no official test set; draw one."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    table = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if table.exists():  # 5 ms; importing sklearn.datasets takes 900 ms in each run of a sweep
        rows = np.loadtxt(table, delimiter=",")
        pixels, y = rows[:, :-1], rows[:, -1].astype(np.int64)
    else:
        pixels, y = import_module("sklearn.datasets").load_digits(return_X_y=True)
    x = np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    test = turns(y) < KNOWN["digits"].sizes["test"] // 10
    return {"train": (x[~test], y[~test]), "test": (x[test], y[test])}


# ------------------------------------------------------------------------------------------------------------- npz


def _read_npz(path: Path, official: Iterable[str] | None, layout: Layout) -> Parts:
    """Map the arrays ``x_<part>`` and ``y_<part>`` of an npz file; compare checksums, unpickle nothing."""
    parts = list(official or ("train", "test"))
    wanted: list[str] = []
    if not (path.is_file() or path.is_dir()):  # reading a pipe would never end
        raise DataError(f"{path} is no regular file; write one with numpy.savez")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if official is None and {"x_val", "y_val"} & members.keys():
                parts.insert(1, "val")
            wanted = [f"{letter}_{part}" for part in parts for letter in "xy"]
            if unused := [key for key in members if re.match("[xy]_", key) and key not in wanted]:
                own = "" if official is None else "; give your own data set another name (data=npz)"
                more = own or ("" if "val" in parts else ", and x_val, y_val for a validation set")
                raise DataError(
                    f"{path} has {', '.join(unused)}, which would not be used: it takes {', '.join(wanted)}{more}"
                )
            if missing := [key for key in wanted if key not in members]:
                raise DataError(
                    f"{path} has no {', '.join(missing)}: it needs {', '.join(wanted)}, it has {', '.join(members)}"
                )
            arrays = {key: _read_member(path, archive, members[key]) for key in wanted}
    except MemoryError as error:
        size = sum(members[key].file_size for key in wanted)
        raise DataError(
            f"{path} unpacks to {size:,} bytes, which do not fit into memory; give a smaller one"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged or no npz file ({error}); write it again with numpy.savez") from error
    return {part: (_channels_first(path, part, arrays[f"x_{part}"], layout), arrays[f"y_{part}"]) for part in parts}


def _channels_first(path: Path, part: str, x: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """View images ``[N, H, W]``, ``[N, H, W, C]`` or (``layout="nchw"``) ``[N, C, H, W]`` as ``[N, C, H, W]``."""
    shape = f"{path}: x_{part} has shape {list(x.shape)}"
    if x.ndim == 3 and layout != "nchw":
        return x[:, None]
    if x.ndim != 4:
        raise DataError(f"{shape}; images are [N, H, W] or [N, H, W, C], or with data.layout=nchw [N, C, H, W]")
    if layout == "nchw":
        return x
    _, height, width, channels = x.shape
    # No doubt with one to four channels, or if the images are square only with channels last.
    if layout == "auto" and not (channels <= 4 < height or height == width != channels):
        raise DataError(
            f"{shape}; images are [N, H, W] or [N, H, W, C], and here the channels may come first:"
            f" give data.layout=nchw ({height} channels) or data.layout=nhwc ({channels} channels)"
        )
    return x.transpose(0, 3, 1, 2)


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """Return one array of an npz file: mapped if it is stored uncompressed, else unpacked."""
    raw: NDArray[np.uint8]
    if member.compress_type == zipfile.ZIP_STORED and member.file_size:
        with path.open("rb") as file:  # the local header repeats the name; its extra field may differ in length
            file.seek(member.header_offset + 26)
            lengths = file.read(4)
            start = file.tell() + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        raw = np.memmap(path, np.uint8, "r", start, (member.file_size,))
        if zlib.crc32(raw.data) != member.CRC:
            raise zipfile.BadZipFile(f"bad checksum for {member.filename}")
    else:
        raw = np.frombuffer(archive.read(member), np.uint8)
    header = io.BytesIO(raw[:4096].tobytes())
    version = np.lib.format.read_magic(header)
    if version != (1, 0):
        raise ValueError(f"{member.filename} has format {version}, not (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype.hasobject:
        raise DataError(f"{path}: {member.filename} has pickled objects, which are never loaded; store plain numbers")
    body = raw[header.tell() :]
    if body.size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{member.filename} has {body.size} bytes, not {list(shape)} of {dtype}")
    return np.ndarray(shape, dtype, body.data, order="F" if fortran else "C")


# ----------------------------------------------------------------------------------------------------- torchvision


def _read_torchvision(name: str, root: Path, download: bool = False) -> Parts:
    """Read torchvision's files; torchvision checks their MD5 before it unpickles (CIFAR) or parses (SVHN) them."""
    import_module("backforward_suite._torchvision")  # makes the next line work beside a CPU-only torch
    datasets = import_module("torchvision.datasets")
    if not download and (missing := [file for file in KNOWN[name].files if not (root / file).exists()]):
        raise DataError(
            f"{KNOWN[name].title} under {root} is incomplete: {', '.join(missing)} is missing;"
            f" add it, or move the other files away to download all"
        )
    kinds: dict[str, Callable[..., Any]] = {
        "mnist": datasets.MNIST,
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "svhn": datasets.SVHN,
    }
    parts: Parts = {}
    for part in KNOWN[name].sizes:
        which = {"split": part} if name == "svhn" else {"train": part == "train"}
        try:
            found = kinds[name](root, download=download, **which)
        except MemoryError:
            raise
        except Exception as error:  # torchvision raises many kinds of errors on damaged files
            if download:
                raise
            raise DataError(
                f"{KNOWN[name].title} under {root} is damaged or incomplete ({type(error).__name__}: {error});"
                f" delete {', '.join(KNOWN[name].files)} there to download again"
            ) from error
        x = np.asarray(found.data)
        if name.startswith("cifar"):
            x = x.transpose(0, 3, 1, 2)
        parts[part] = (x[:, None] if x.ndim == 3 else x, np.asarray(found.labels if name == "svhn" else found.targets))
    return parts


def _download(name: str, root: Path) -> Parts:
    """Let torchvision download into a temporary folder, and move its files to their place when all are complete."""
    created = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root) as alone:
            if any((root / file).exists() for file in KNOWN[name].files):  # another process has downloaded them
                return _read_torchvision(name, root)
            for left in root.glob(f".{name}-????????") if alone else ():  # by a killed download
                shutil.rmtree(left, ignore_errors=True)
            beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
            try:
                with _timeout(_TIMEOUT):
                    parts = _read_torchvision(name, beside, download=True)
                for file in KNOWN[name].files:
                    _move(beside / file, root / file)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
            return parts
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of the libraries that torchvision uses
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise DataError(_why_not(name, root, error)) from error


def _why_not(name: str, root: Path, error: BaseException) -> str:
    """Return in one line why a download failed, from the chain of causes."""
    title = KNOWN[name].title
    cause: BaseException | None = error
    seen: list[BaseException] = []  # a chain of causes may be circular
    while cause is not None and cause not in seen:
        seen.append(cause)
        if isinstance(cause, HTTPError):
            cause.close()  # else it keeps its connection open
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left under {root} to download {title}; free some, or set data.root or $BACKFORWARD_DATA"
        if isinstance(cause, OSError) and not isinstance(cause, URLError) and cause.filename is not None:
            return (
                f"cannot write {title} under {root} ({cause.strerror}); name a folder that can be written"
                f" (data.root or $BACKFORWARD_DATA)"
            )
        cause = cause.__cause__ or cause.__context__
    arrays = ", ".join(f"x_{part}, y_{part}" for part in KNOWN[name].sizes)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = " ".join(dict.fromkeys((lines[0], lines[-1])))  # of all mirrors, name the last one's error
    return (
        f"{title} is not under {root} and its download failed ({reason}); give {root / name}.npz ({arrays}; uint8),"
        f" or torchvision's files under {root}, or a network to download from"
    )


def _move(source: Path, target: Path) -> None:
    """Move a file or folder, unless another process was quicker, as may be where folders cannot be locked."""
    try:
        source.replace(target)
    except OSError:
        if not target.exists():
            raise


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[bool]:
    """Let one process at a time download into ``root``; yield False where the file system cannot lock folders."""
    handle = os.open(root, os.O_RDONLY)
    try:
        locked = False
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        yield locked
    finally:
        os.close(handle)


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Give up connections without data for ``seconds``."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
