"""Where images come from: every way, in order, and every way it can fail."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import struct
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from numpy.typing import NDArray

import backforward_suite._torchvision  # noqa: F401  (before torchvision)

# isort: split
from torchvision import datasets

from backforward_suite.data import DataError, default_root, sources

Arrays = dict[str, NDArray[Any]]


def arrays(shape: tuple[int, ...], parts: tuple[str, ...] = ("train", "test"), count: int = 20) -> Arrays:
    """Return random images and labels 0 to 9, each twice."""
    random = np.random.RandomState(0)
    made: Arrays = {}
    for part in parts:
        made[f"x_{part}"] = random.randint(0, 256, (count, *shape), np.uint8)
        made[f"y_{part}"] = random.permutation(count).astype(np.uint8) % 10
    return made


def shrink(monkeypatch: pytest.MonkeyPatch, name: str, count: int = 20) -> None:
    """Let a data set be known with few images, so that a test can write it."""
    known = sources.KNOWN[name]
    monkeypatch.setitem(sources.KNOWN, name, replace(known, sizes=dict.fromkeys(known.sizes, count)))


def everything(root: Path) -> dict[str, bytes | None]:
    """Return all entries under a folder: files with their bytes, folders with None."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def refusal(name: Any, root: Path) -> str:
    """Read a data set that cannot be read; return the error's line. Nothing under the root may change."""
    before = everything(root) if root.is_dir() else root.exists()
    with pytest.raises(DataError) as caught:
        sources.read(name, root)
    assert (everything(root) if root.is_dir() else root.exists()) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever looks for the network finds none, unless a test serves it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# ---------------------------------------------------------------------------------------------------------- digits


def test_digits_are_scikit_learns_scaled_to_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    parts, source = sources.read("digits", tmp_path / "never looked at")
    assert source == "scikit-learn"
    assert {part: x.shape for part, (x, _) in parts.items()} == {"train": (1547, 1, 8, 8), "test": (250, 1, 8, 8)}
    pixels, labels = load_digits(return_X_y=True)
    # The union of both parts is the whole, image for image: sorted as bytes, label last.
    read = np.concatenate([np.c_[x.reshape(len(x), -1), y] for x, y in parts.values()])
    whole = np.c_[np.array([[round(v * 255 / 16) for v in row] for row in pixels.tolist()]), labels]
    assert sorted(read.tolist()) == sorted(whole.tolist())
    assert np.bincount(parts["test"][1]).tolist() == [25] * 10
    # A scikit-learn that keeps its file elsewhere is asked for the same.
    monkeypatch.setattr(sources, "find_spec", lambda _: type("Spec", (), {"origin": str(tmp_path / "__init__.py")}))
    for part, (x, y) in sources.read("digits", tmp_path)[0].items():
        assert np.array_equal(x, parts[part][0])
        assert np.array_equal(y, parts[part][1])


def test_digits_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    assert refusal("digits", tmp_path) == (
        "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
    )


# ------------------------------------------------------------------------------------------------------------- npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npz_file_is_read_channels_first(
    tmp_path: Path, save: Callable[..., None], shape: tuple[int, ...], order: Any
) -> None:
    made = arrays(shape)
    save(tmp_path / "mine.npz", **{key: np.asarray(value, order=order) for key, value in made.items()})
    parts, source = sources.read("mine", tmp_path)
    assert source == str(tmp_path / "mine.npz")
    for part, (x, y) in parts.items():
        assert x.shape == (20, *(shape[2:] or (1,)), 6, 5)
        assert np.array_equal(np.moveaxis(x, 1, 3).reshape(20, *shape), made[f"x_{part}"])
        assert np.array_equal(y, made[f"y_{part}"])


def test_an_uncompressed_npz_file_is_mapped_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **arrays((4, 5)))
    base: Any = sources.read("mine", tmp_path)[0]["train"][0]
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base if not isinstance(base.base, memoryview) else base.base.obj
    assert isinstance(base, np.memmap)


def spoil(path: Path, change: str) -> None:  # noqa: PLR0912
    """Damage a good npz file."""
    content = path.read_bytes()
    made = arrays((4, 5))
    match change:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("<html>404</html>")
        case "flipped bit":
            place = content.index(made["x_test"].tobytes()) + 7
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        case "flipped bit, compressed":
            np.savez_compressed(path, **made)
            content = bytearray(path.read_bytes())
            content[200] ^= 255
            path.write_bytes(content)
        case "npy instead":
            with path.open("wb") as file:
                np.save(file, made["x_train"])
        case "header":
            with zipfile.ZipFile(path, "w") as archive:
                for key in made:
                    archive.writestr(f"{key}.npy", b"no npy header at all")
        case "short":
            with zipfile.ZipFile(path, "w") as archive:
                for key, value in made.items():
                    file = io.BytesIO()
                    np.save(file, value)
                    archive.writestr(f"{key}.npy", file.getvalue()[:-3])
        case "missing":
            np.savez(path, **{key: value for key, value in made.items() if key != "y_test"})
        case "pickled":
            made["y_train"] = np.array([Trap(str(path.parent / "sprung"))] * 20, dtype=object)
            np.savez(path, **made)
        case "flat":
            np.savez(path, **(made | {"x_train": made["x_train"].reshape(20, 20)}))
        case "channels first":
            np.savez(path, **(made | {"x_train": np.zeros((20, 3, 32, 32), np.uint8)}))


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


DAMAGED = "is damaged or no npz file"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("truncated", DAMAGED),
        ("empty", DAMAGED),
        ("text", "is damaged or no npz file (File is not a zip file); write it again with numpy.savez"),
        ("flipped bit", "(bad checksum for x_test.npy)"),
        ("flipped bit, compressed", DAMAGED),
        ("npy instead", DAMAGED),
        ("header", DAMAGED),
        ("short", "x_train.npy has 397 bytes, not [20, 4, 5] of uint8"),
        ("missing", "has no y_test: it needs x_train, y_train, x_test, y_test, it has x_train, y_train, x_test"),
        ("pickled", "y_train.npy has pickled objects, which are never loaded; store plain numbers"),
        ("flat", "x_train has shape [20, 20]; images are [N, H, W] or [N, H, W, C]"),
        ("channels first", "x_train has shape [20, 3, 32, 32]; images are [N, H, W] or [N, H, W, C], and here"),
    ],
)
def test_a_damaged_npz_file_is_refused(tmp_path: Path, change: str, fault: str) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays((4, 5)))
    spoil(path, change)
    message = refusal("mine", tmp_path)
    assert message.startswith(str(path))
    assert fault in message
    assert not (tmp_path / "sprung").exists()


def test_svhns_npz_needs_the_extra_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "svhn.npz", **arrays((4, 5)))
    assert "svhn.npz has no x_extra, y_extra: it needs x_train, y_train, x_extra, y_extra, x_test, y_test" in refusal(
        "svhn", tmp_path
    )


def test_the_npz_comes_before_torchvisions_files_and_a_damaged_one_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, "mnist")
    write_mnist(tmp_path)
    made = arrays((28, 28), count=30)
    np.savez(tmp_path / "mnist.npz", **made)
    parts, source = sources.read("mnist", tmp_path)
    assert source.endswith("mnist.npz")
    assert np.array_equal(parts["train"][0][:, 0], made["x_train"])
    (tmp_path / "mnist.npz").write_bytes(b"PK")
    assert "mnist.npz is damaged" in refusal("mnist", tmp_path)


# ------------------------------------------------------------------------------------------------- names and roots


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("mnst", "no data set 'mnst': did you mean 'mnist'? there is no"),
        ("MNIST", "no data set 'MNIST': did you mean 'mnist'? there is no"),
        ("imagenet", "imagenet.npz; there are digits, mnist, cifar10, cifar100, svhn, and any <root>/<name>.npz"),
        (
            "../secret",
            "'../secret' cannot be the name of a data set; there are digits, mnist, cifar10, cifar100, svhn, and any",
        ),
        ("", "'' cannot be the name of a data set"),
        (None, "None cannot be the name of a data set"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path, name: Any, fault: str) -> None:
    assert fault in refusal(name, tmp_path)


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    assert "root is a file; name a folder (data.root or $BACKFORWARD_DATA)" in refusal("mnist", tmp_path / "root")


def test_a_root_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write MNIST under" in refusal("mnist", tmp_path / "file" / "root")


def test_an_npz_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.npz").mkdir()
    assert refusal("mine", tmp_path) == f"cannot read mine under {tmp_path}: Is a directory"


def test_the_root_is_the_environments_else_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKFORWARD_DATA", "/somewhere")
    assert default_root() == Path("/somewhere")
    monkeypatch.setenv("BACKFORWARD_DATA", "")
    assert default_root() == Path("data")
    monkeypatch.delenv("BACKFORWARD_DATA")
    assert default_root() == Path("data")


# --------------------------------------------------------------------------------------------- torchvision's files


def ubyte(values: NDArray[np.uint8]) -> bytes:
    """Return an array in the format of MNIST: magic number, sizes (big-endian), bytes."""
    return struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()


MNIST_FILES = {
    "train-images-idx3-ubyte": "x_train",
    "train-labels-idx1-ubyte": "y_train",
    "t10k-images-idx3-ubyte": "x_test",
    "t10k-labels-idx1-ubyte": "y_test",
}


def write_mnist(root: Path) -> Arrays:
    made = arrays((28, 28))
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for file, key in MNIST_FILES.items():
        (folder / file).write_bytes(ubyte(made[key]))
    return made


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """Write pickled batches in the official format, and give torchvision their checksums."""
    made = arrays((32, 32, 3))
    kind, labels = (datasets.CIFAR10, "labels") if name == "cifar10" else (datasets.CIFAR100, "fine_labels")
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(file: str, content: Any) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return md5(folder / file)

    def batch(part: str, rows: slice) -> Any:
        planes = made[f"x_{part}"][rows].transpose(0, 3, 1, 2).reshape(-1, 3072)
        return {"data": planes, labels: made[f"y_{part}"][rows].tolist()}

    files, each = kind.train_list, 20 // len(kind.train_list)
    train = [[f, write(f, batch("train", slice(i * each, (i + 1) * each)))] for i, (f, _) in enumerate(files)]
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", [[f, write(f, batch("test", slice(20)))] for f, _ in kind.test_list])
    meta = kind.meta | {"md5": write(kind.meta["filename"], {kind.meta["key"]: list("abcdefghij")})}
    monkeypatch.setattr(kind, "meta", meta)
    return made


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """Write MATLAB files in the official format (H, W, C, N; the digit 0 is labelled 10), with their checksums."""
    made = arrays((32, 32, 3), ("train", "extra", "test"))
    table = {}
    for part, (url, file, _) in datasets.SVHN.split_list.items():
        y = made[f"y_{part}"][:, None]
        content = {"X": made[f"x_{part}"].transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y).astype(np.uint8)}
        scipy.io.savemat(root / file, content, do_compression=True)
        table[part] = [url, file, md5(root / file)]
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    return made


def agree(parts: sources.Parts, made: Arrays) -> None:
    assert {f"{letter}_{part}" for part in parts for letter in "xy"} == set(made)
    for part, (x, y) in parts.items():
        expected = made[f"x_{part}"] if made[f"x_{part}"].ndim == 4 else made[f"x_{part}"][..., None]
        assert x.dtype == np.uint8
        assert np.array_equal(x, expected.transpose(0, 3, 1, 2))
        assert y.tolist() == made[f"y_{part}"].tolist()


def test_mnists_files_are_read(tmp_path: Path) -> None:
    made = write_mnist(tmp_path)
    parts, source = sources.read("mnist", tmp_path)
    assert source == str(tmp_path / "MNIST")
    agree(parts, made)


@pytest.mark.parametrize("change", ["truncated", "missing", "swapped"])
def test_damaged_mnist_files_are_refused(tmp_path: Path, change: str) -> None:
    write_mnist(tmp_path)
    folder = tmp_path / "MNIST" / "raw"
    images = folder / "t10k-images-idx3-ubyte"
    match change:
        case "truncated":
            images.write_bytes(images.read_bytes()[:5000])
        case "missing":
            images.unlink()
        case "swapped":
            shutil.copy(folder / "t10k-labels-idx1-ubyte", images)
    message = refusal("mnist", tmp_path)
    assert message.startswith(f"MNIST under {tmp_path} is damaged or incomplete (")
    assert message.endswith("; delete MNIST there to download again")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifars_files_are_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_cifar(tmp_path, name, monkeypatch)
    parts, source = sources.read(name, tmp_path)
    assert source == str(tmp_path / sources.KNOWN[name].files[0])
    agree(parts, made)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_cifar_file_of_another_checksum_is_never_unpickled(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    (tmp_path / "cifar-10-batches-py" / file).write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    message = refusal("cifar10", tmp_path)
    assert message.startswith(f"CIFAR-10 under {tmp_path} is damaged or incomplete (RuntimeError: Dataset ")
    assert not (tmp_path / "sprung").exists()


def test_svhns_files_are_read_and_the_digit_0_is_class_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_svhn(tmp_path, monkeypatch)
    parts, source = sources.read("svhn", tmp_path)
    assert source == str(tmp_path / "train_32x32.mat")
    agree(parts, made)


def test_svhn_without_its_extra_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    (tmp_path / "extra_32x32.mat").unlink()
    assert refusal("svhn", tmp_path) == (
        f"SVHN under {tmp_path} is incomplete: extra_32x32.mat is missing; add it, or move the other files away"
        f" to download all"
    )


def test_a_damaged_svhn_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-10])
    assert f"SVHN under {tmp_path} is damaged or incomplete (RuntimeError: Dataset not found" in refusal(
        "svhn", tmp_path
    )


# ------------------------------------------------------------------------------------------------------- downloads


class Server:
    """Serves files by name on this machine and counts what was asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, []  # type: ignore[var-annotated]
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path[1:])
                content = outer.files.get(self.path[1:])
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, bytes]], Server]]:
    running: list[tuple[Server, threading.Thread]] = []
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def start(files: dict[str, bytes]) -> Server:
        monkeypatch.setattr(urllib.request, "urlopen", opener.open)
        server = Server(files)
        thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.server.shutdown()
        server.server.server_close()
        thread.join()


def mnist_at(server: Server, monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """Put MNIST's four packed files on a server and tell torchvision of it."""
    made, resources = arrays((28, 28)), []
    for file, key in MNIST_FILES.items():
        content = gzip.compress(ubyte(made[key]))
        server.files[f"{file}.gz"] = content
        resources.append((f"{file}.gz", hashlib.md5(content, usedforsecurity=False).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [server.url])
    return made


Serve = Callable[[dict[str, bytes]], Server]


def test_mnist_is_downloaded_once_and_only_what_is_needed_stays(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve({})
    made = mnist_at(server, monkeypatch)
    root = tmp_path / "new" / "root"
    parts, source = sources.read("mnist", root)
    agree(parts, made)
    assert source == str(root / "MNIST")
    assert set(server.asked) == set(server.files)
    asked = len(server.asked)
    assert "100%" in capfd.readouterr().err  # torchvision's progress bar
    assert [path.name for path in root.iterdir()] == ["MNIST"]
    agree(sources.read("mnist", root)[0], made)
    assert len(server.asked) == asked


def test_processes_that_start_together_download_once(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve({})
    made = mnist_at(server, monkeypatch)
    got: list[sources.Parts] = []
    threads = [threading.Thread(target=lambda: got.append(sources.read("mnist", tmp_path)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    for parts in got:
        agree(parts, made)
    assert max(Counter(server.asked).values()) <= 2  # torchvision asks twice: where the file is, and for the file


def test_processes_that_start_together_agree_where_folders_cannot_be_locked(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mnist_at(serve({}), monkeypatch)
    both = threading.Barrier(2)
    move = sources._move

    def move_together(source: Path, target: Path) -> None:
        both.wait(20)  # each has downloaded all of it
        move(source, target)

    monkeypatch.setattr(sources, "_move", move_together)
    monkeypatch.setattr(sources, "_locked", lambda _: contextlib.nullcontext(False))
    got: list[sources.Parts] = []
    threads = [threading.Thread(target=lambda: got.append(sources.read("mnist", tmp_path)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2
    for parts in (*got, sources.read("mnist", tmp_path)[0]):
        agree(parts, made)
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


def test_a_data_set_of_several_files_is_not_read_before_all_are_in_place(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    made = write_svhn(there, monkeypatch)
    server = serve({path.name: path.read_bytes() for path in there.iterdir()})
    table = {part: [server.url + file, file, sum_] for part, (_, file, sum_) in datasets.SVHN.split_list.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    got: list[sources.Parts] = []
    second = threading.Thread(target=lambda: got.append(sources.read("svhn", here)[0]))
    move = sources._move

    def start_second_after_one(source: Path, target: Path) -> None:
        move(source, target)
        if second.ident is None:
            second.start()
            second.join(0.2)  # it waits
            assert not got

    monkeypatch.setattr(sources, "_move", start_second_after_one)
    agree(sources.read("svhn", here)[0], made)
    second.join()
    agree(got[0], made)
    assert len(server.asked) == 2 * len(server.files)  # torchvision asks twice: where the file is, and for the file


def test_a_download_removes_what_a_killed_one_left_and_nothing_else(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    mnist_at(serve({}), monkeypatch)
    for name in (".mnist-abcd1234", ".mnist-mine", ".cifar10-abcd1234"):
        (tmp_path / name).mkdir()
    sources.read("mnist", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"MNIST", ".mnist-mine", ".cifar10-abcd1234"}


def test_cifar_is_downloaded_and_its_archive_does_not_stay(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_cifar(tmp_path / "there", "cifar10", monkeypatch)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(tmp_path / "there" / "cifar-10-batches-py", "cifar-10-batches-py")
    server = serve({"cifar.tar.gz": packed.getvalue()})
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server.url}cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    agree(sources.read("cifar10", tmp_path / "here")[0], made)
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["cifar-10-batches-py"]


def test_svhn_is_downloaded_whole(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.mkdir()
    made = write_svhn(there, monkeypatch)
    server = serve({path.name: path.read_bytes() for path in there.iterdir()})
    table = {part: [server.url + file, file, sum_] for part, (_, file, sum_) in datasets.SVHN.split_list.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    agree(sources.read("svhn", tmp_path / "here")[0], made)
    assert everything(tmp_path / "here") == everything(there)
    # One of the three is not to be had: nothing stays of the others.
    del server.files["extra_32x32.mat"]
    assert "its download failed (HTTP Error 404: Not Found)" in refusal("svhn", tmp_path / "elsewhere")


def test_a_download_of_another_checksum_leaves_nothing(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve({})
    mnist_at(server, monkeypatch)
    server.files["t10k-labels-idx1-ubyte.gz"] += b"!"
    assert refusal("mnist", tmp_path).startswith(
        f"MNIST is not under {tmp_path} and its download failed"
        f" (Error downloading t10k-labels-idx1-ubyte.gz: File not found or corrupted.); give {tmp_path}/mnist.npz"
    )
    refusal("mnist", tmp_path / "new" / "root")
    assert list(tmp_path.iterdir()) == []


def test_no_network_and_no_data_names_the_ways_to_bring_them(tmp_path: Path) -> None:
    assert refusal("cifar10", tmp_path / "root") == (
        f"CIFAR-10 is not under {tmp_path}/root and its download failed (<urlopen error no network in tests>);"
        f" give {tmp_path}/root/cifar10.npz (x_train, y_train, x_test, y_test; uint8),"
        f" or torchvision's files under {tmp_path}/root, or a network to download from"
    )
    assert "(x_train, y_train, x_extra, y_extra, x_test, y_test; uint8)" in refusal("svhn", tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_a_full_disk_is_called_so_and_leaves_nothing(
    tmp_path: Path, name: str, number: int, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_a_little(url: str, path: str, *_: Any) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(datasets.utils, "_urlretrieve", write_a_little)
    monkeypatch.setattr(datasets.utils, "_get_redirect_url", lambda url, **_: url)
    title = sources.KNOWN[name].title
    assert refusal(name, tmp_path) == (
        f"no space left under {tmp_path} to download {title}; free some, or set data.root or $BACKFORWARD_DATA"
    )


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write: /proc")
def test_a_root_that_cannot_be_written() -> None:
    with pytest.raises(DataError, match=r"^cannot write MNIST under /proc \(.*\); name a folder that can be written"):
        sources.read("mnist", Path("/proc"))


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(url: str, path: str, *_: Any) -> None:
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.utils, "_urlretrieve", interrupt)
    monkeypatch.setattr(datasets.utils, "_get_redirect_url", lambda url, **_: url)
    with pytest.raises(KeyboardInterrupt):
        sources.read("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_silent_server_is_given_up(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve({})
    mnist_at(server, monkeypatch)
    release = threading.Event()
    monkeypatch.setattr(server.server.RequestHandlerClass, "do_GET", lambda _: release.wait())
    monkeypatch.setattr(sources, "_TIMEOUT", 0.2)
    try:
        assert "its download failed" in refusal("mnist", tmp_path)
    finally:
        release.set()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.npz")
    with pytest.raises(DataError, match=r"mine\.npz is no regular file"):
        sources.read("mine", tmp_path)


def test_a_member_that_fits_into_no_memory_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {f"{letter}_{part}": np.zeros(4, np.uint8) for letter in "xy" for part in ("train", "test")}
    np.savez_compressed(tmp_path / "mine.npz", **images)

    def read(*_: Any) -> bytes:
        raise MemoryError

    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    with pytest.raises(DataError, match="unpacks to 528 bytes, which do not fit into memory"):
        sources.read("mine", tmp_path)
