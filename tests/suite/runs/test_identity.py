"""A run is identified by its settings, data and source; only an equal one is reused or resumed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers.configs import composed
from tests.helpers.own_data import MINE, write_data
from tests.helpers.training import CutOff, cut_off_at

from backforward_suite.config import Request
from backforward_suite.errors import BadInput, Refused
from backforward_suite.run import run
from backforward_suite.runs import identity
from backforward_suite.runs.files import write_result
from backforward_suite.runs.lifecycle import finished_result
from backforward_suite.train.callbacks.record import RunRecord


def asked(root: Path, *overrides: str) -> Request:
    return Request.of(composed(*MINE, f"data.root={root}", *overrides))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a run on the data of seed 0."""
    write_data(tmp_path / "data", 0)
    request = asked(tmp_path / "data")
    (tmp_path / "run").mkdir()
    write_result(tmp_path / "run", run(request, tmp_path / "run"))
    return tmp_path / "run"


def seen(finished: Path, root: Path) -> bool:
    identity._content.cache_clear()
    return finished_result(finished, asked(root)) is not None


def test_equal_data_are_not_read_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> str:
        raise AssertionError("nothing has changed")

    monkeypatch.setattr(identity, "_content", read)
    assert finished_result(finished, asked(tmp_path / "data")) is not None


def test_content_decides(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "data" / "mine.npz"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))  # as after a copy
    assert seen(finished, tmp_path / "data")
    write_data(tmp_path / "elsewhere", 0)
    assert seen(finished, tmp_path / "elsewhere")
    with np.load(path) as arrays:
        np.savez_compressed(path, **arrays)  # other bytes, the same images
    assert seen(finished, tmp_path / "data")


def test_other_data_of_the_same_name_are_refused(finished: Path, tmp_path: Path) -> None:
    size = (tmp_path / "data" / "mine.npz").stat().st_size
    path = write_data(tmp_path / "data", 1)
    assert path.stat().st_size == size
    with pytest.raises(Refused, match=r"finished run, and .*mine\.npz holds other data now; give another name"):
        seen(finished, tmp_path / "data")
    write_data(tmp_path / "elsewhere", 2)
    with pytest.raises(Refused, match="holds other data"):
        seen(finished, tmp_path / "elsewhere")


def test_a_result_stays_valid_when_its_data_are_gone(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "mine.npz").unlink()
    assert seen(finished, tmp_path / "data")


def test_a_result_of_an_older_version_stays_valid(finished: Path, tmp_path: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    del result["checksum"], result["data"]["files"]
    (finished / "result.json").write_text(json.dumps(result))
    write_data(tmp_path / "data", 1)
    assert seen(finished, tmp_path / "data")


def cut_off(request: Request, folder: Path, at: int = 8) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(RunRecord, "before_batch", cut_off_at(at))
        run(request, folder)
    assert (folder / "last.ckpt").exists()


def test_a_half_done_run_never_resumes_with_other_data(tmp_path: Path) -> None:
    write_data(tmp_path / "data", 0)
    request = asked(tmp_path / "data")
    cut_off(request, tmp_path / "run")
    content = (tmp_path / "run" / "last.ckpt").read_bytes()
    write_data(tmp_path / "data", 1)
    with pytest.raises(Refused, match=r"last\.ckpt cannot be resumed: its data have changed since it was written"):
        run(request, tmp_path / "run")
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == content
    write_data(tmp_path / "data", 0)
    assert run(request, tmp_path / "run")["status"] == "finished"


LAYERS = "WIDTH = {width}\n"
NET = """\
from layers_of_mine import WIDTH
from torch import nn

def net(in_shape, classes, seed):
    size = in_shape[0] * in_shape[1] * in_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of the user's, in a module that imports another."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "net_of_mine.py").write_text(NET)
    (folder / "layers_of_mine.py").write_text(LAYERS.format(width=4))
    monkeypatch.syspath_prepend(str(folder))
    for name in ("net_of_mine", "layers_of_mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def with_own_model() -> Request:
    cfg = composed("data=digits", "batch_size=64", "max_epochs=2", "trainer.accelerator=cpu")
    cfg.model = {"_target_": "net_of_mine.net", "seed": 0}
    return Request.of(cfg)


def test_the_source_of_the_users_model_counts(package: Path) -> None:
    request = with_own_model()
    found = identity.own_sources(request.values)
    assert found.keys() == {"net_of_mine", "layers_of_mine"}  # none of torch's or ours
    assert identity.changed_sources(request, found) == ""
    assert identity.changed_sources(request, None) == ""  # an older version recorded none
    (package / "layers_of_mine.py").write_text(LAYERS.format(width=8))
    assert identity.changed_sources(request, found) == "the source of layers_of_mine has changed"
    result = {"code": {"own": found}}
    assert identity.changed(request, result) == "the source of layers_of_mine has changed"


def test_a_half_done_run_never_resumes_with_another_model(package: Path, tmp_path: Path) -> None:
    request = with_own_model()
    cut_off(request, tmp_path / "run", at=25)
    with (package / "net_of_mine.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(BadInput, match="the source of net_of_mine has changed since it was written"):
        run(request, tmp_path / "run")
