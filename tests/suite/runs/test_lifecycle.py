from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig
from tests.helpers.configs import with_hydra

from backforward_suite.config import Request
from backforward_suite.errors import BadInput
from backforward_suite.runs import files, lifecycle
from backforward_suite.runs.files import read_result, write_result
from backforward_suite.runs.lifecycle import finished_result


class TestFinished:
    def written(self, folder: Path, cfg: DictConfig, **changes: object) -> None:
        request = Request.of(cfg)
        result = {"status": "finished", "settings": request.values, "settings_hash": request.hash}
        write_result(folder, {**result, **changes})

    def test_no_file_is_not_done(self, tmp_path: Path) -> None:
        assert finished_result(tmp_path, Request.of(with_hydra())) is None

    @pytest.mark.parametrize(("status", "done"), [("finished", True), ("diverged", True), ("failed", False)])
    def test_status_decides(self, tmp_path: Path, status: str, done: bool) -> None:
        self.written(tmp_path, with_hydra(), status=status)
        assert (finished_result(tmp_path, Request.of(with_hydra())) is not None) == done

    def test_other_settings_are_refused_by_name(self, tmp_path: Path) -> None:
        self.written(tmp_path, with_hydra())
        with pytest.raises(BadInput, match=r"lr=0.2 \(there: 0.1\)"):
            finished_result(tmp_path, Request.of(with_hydra("lr=0.2")))

    def test_settings_that_do_not_match_their_hash_are_refused(self, tmp_path: Path) -> None:
        self.written(tmp_path, with_hydra(), settings_hash="0")
        with pytest.raises(BadInput, match="do not match their hash"):
            finished_result(tmp_path, Request.of(with_hydra()))

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"status": 3}', "\xff"])
    def test_a_damaged_file_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "result.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(BadInput, match=r"result.json is damaged"):
            read_result(tmp_path)


def test_a_finished_run_is_copied(tmp_path: Path) -> None:
    source, folder = tmp_path / "one" / "run", tmp_path / "other" / "run"
    (source / ".hydra").mkdir(parents=True)
    (source / "metrics.csv").write_text("epoch\n0\n")
    (source / ".hydra" / "config.yaml").write_text("lr: 0.1\n")
    files.write_result(source, {"status": "finished", "settings_hash": "abc"})
    folder.mkdir(parents=True)
    files.write_result(folder, {"status": "failed", "cause": "of an earlier try"})
    assert files.done_below(tmp_path) == {"abc": source}

    lifecycle.take_over(source, folder)
    assert files.read_result(folder) == {"status": "finished", "settings_hash": "abc", "taken_over_from": "one/run"}
    for name in ("metrics.csv", ".hydra/config.yaml"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()

    files.write_result(source, {"status": "finished", "settings_hash": "new"})
    lifecycle.take_over(source, folder)  # a finished run is left alone
    assert (files.read_result(folder) or {})["settings_hash"] == "abc"


def test_a_damaged_result_is_left_alone(tmp_path: Path) -> None:
    source, folder = tmp_path / "one", tmp_path / "other"
    source.mkdir()
    folder.mkdir()
    files.write_result(source, {"status": "finished", "settings_hash": "abc"})
    (folder / "result.json").write_text("{")
    lifecycle.take_over(source, folder)
    assert (folder / "result.json").read_text() == "{"
    assert not files.is_done(folder)
