from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig
from tests.test_settings import CONF

from backforward import runs
from backforward.errors import BadInput
from backforward.files import whole
from backforward.runs import (
    finished_result,
    natural,
    read_metrics,
    read_result,
    run_name,
    write_metrics,
    write_result,
)
from backforward.settings import fingerprint, plain


def with_hydra(*overrides: str) -> DictConfig:
    runs.register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=True)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "sgd"),
        (["method=bfp", "lr=0.05", "seed=3"], "bfp-lr0.05-seed3"),
        (["seed=3", "lr=5e-2", "method=bfp"], "bfp-lr0.05-seed3"),  # neither order nor spelling counts
        (["model.depth=8", "norm=batch", "data=digits"], "sgd-depth8-batch-digits"),
        (["data.augment=flip", "optimizer=adam"], "sgd-augment_flip-adam"),
        (["name=other", "timeout_min=3", "trainer.progress_bar=false", "data.root=/x"], "sgd"),  # of no effect
        (["experiment=quickstart", "lr=0.1"], "sgd-lr0.1"),  # its name is the folder's
        (["model.dropout=0.5", "+model.extra=1"], "sgd-dropout0.5-extra1"),
    ],
    ids=str,
)
def test_a_run_is_named_after_what_was_set(overrides: list[str], name: str) -> None:
    assert run_name(with_hydra(*overrides)) == name


def test_lists_that_look_alike_do_not_meet() -> None:
    names = {run_name(with_hydra("method=bfp", f"method.groups={groups}")) for groups in ("[[a,b],[c]]", "[[a],[b,c]]")}
    assert len(names) == 2
    assert all(name.startswith("bfp-groups__a_b_c-") for name in names)


def test_keys_of_the_same_leaf_are_told_apart() -> None:
    assert run_name(with_hydra("+model.size=3", "data=digits", "data.size=16")) == "sgd-model.size3-digits-data.size16"


def test_a_long_name_fits_a_file_system() -> None:
    keys = [f"+model.a_rather_long_key_number_{n}={n}" for n in range(30)]
    assert len(run_name(with_hydra(*keys))) < 200


def test_no_folder_is_named_for_a_setting_that_cannot_be() -> None:
    with pytest.raises(BadInput, match="lr=-1"):
        run_name(with_hydra("lr=-1"))


def test_hydra_finds_the_folder() -> None:
    cfg = with_hydra("method=bfp", "lr=0.05", "name=study")
    assert cfg.hydra.run.dir == "outputs/study/bfp-lr0.05"
    assert f"{cfg.hydra.sweep.dir}/{cfg.hydra.sweep.subdir}" == "outputs/study/bfp-lr0.05"


class TestWhole:
    def test_writes(self, tmp_path: Path) -> None:
        with whole(tmp_path / "a") as file:
            file.write("new")
        assert (tmp_path / "a").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_leaves_the_old_content_where_writing_fails(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("old")
        with pytest.raises(RuntimeError), whole(tmp_path / "a") as file:
            file.write("half of the n")
            raise RuntimeError
        assert (tmp_path / "a").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
def test_metrics_keep_every_bit(values: list[float]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_metrics(Path(folder), [{"epoch": n, "x": value} for n, value in enumerate(values)])
        assert [row["x"] for row in read_metrics(Path(folder))] == values


def test_a_metric_that_was_not_measured_is_an_empty_cell(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"epoch": 0, "a": 1.0}, {"epoch": 1, "a": 2.0, "b": 3.0}])
    with (tmp_path / "metrics.csv").open() as file:
        assert next(csv.DictReader(file)) == {"epoch": "0", "a": "1.0", "b": ""}
    assert read_metrics(tmp_path)[0]["b"] is None
    assert read_metrics(tmp_path / "nowhere") == []


class TestFinished:
    def written(self, folder: Path, cfg: DictConfig, **changes: object) -> None:
        asked = plain(cfg)
        result = {"status": "finished", "settings": asked, "settings_hash": fingerprint(asked)}
        write_result(folder, {**result, **changes})

    def test_no_file_is_not_done(self, tmp_path: Path) -> None:
        assert finished_result(tmp_path, with_hydra()) is None

    @pytest.mark.parametrize(("status", "done"), [("finished", True), ("diverged", True), ("failed", False)])
    def test_status_decides(self, tmp_path: Path, status: str, done: bool) -> None:
        self.written(tmp_path, with_hydra(), status=status)
        assert (finished_result(tmp_path, with_hydra()) is not None) == done

    def test_other_settings_are_refused_by_name(self, tmp_path: Path) -> None:
        self.written(tmp_path, with_hydra())
        with pytest.raises(BadInput, match=r"lr=0.2 \(there: 0.1\)"):
            finished_result(tmp_path, with_hydra("lr=0.2"))

    def test_settings_that_do_not_match_their_hash_are_refused(self, tmp_path: Path) -> None:
        self.written(tmp_path, with_hydra(), settings_hash="0")
        with pytest.raises(BadInput, match="do not match their hash"):
            finished_result(tmp_path, with_hydra())

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"status": 3}', "\xff"])
    def test_a_damaged_file_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "result.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(BadInput, match=r"result.json is damaged"):
            read_result(tmp_path)


def test_numbers_in_names_are_ordered_by_value() -> None:
    assert sorted(["lr0.1-seed10", "lr0.1-seed2", "lr0.05-seed3"], key=natural) == [
        "lr0.05-seed3",
        "lr0.1-seed2",
        "lr0.1-seed10",
    ]


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with whole(tmp_path / "whole") as file:
        file.write("x")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_run_done_elsewhere_is_taken_over(tmp_path: Path) -> None:
    source, folder = tmp_path / "one" / "run", tmp_path / "other" / "run"
    (source / ".hydra").mkdir(parents=True)
    (source / "metrics.csv").write_text("epoch\n0\n")
    (source / ".hydra" / "config.yaml").write_text("lr: 0.1\n")
    runs.write_result(source, {"status": "finished", "settings_hash": "abc"})
    folder.mkdir(parents=True)
    runs.write_result(folder, {"status": "failed", "cause": "of an earlier try"})
    assert runs.done_below(tmp_path) == {"abc": source}

    runs.take_over(source, folder)
    assert runs.read_result(folder) == {"status": "finished", "settings_hash": "abc", "taken_over_from": "one/run"}
    for name in ("metrics.csv", ".hydra/config.yaml"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()

    runs.write_result(source, {"status": "finished", "settings_hash": "new"})
    runs.take_over(source, folder)  # what is done stays
    assert (runs.read_result(folder) or {})["settings_hash"] == "abc"


def test_a_damaged_result_is_left_for_its_run_to_report(tmp_path: Path) -> None:
    source, folder = tmp_path / "one", tmp_path / "other"
    source.mkdir()
    folder.mkdir()
    runs.write_result(source, {"status": "finished", "settings_hash": "abc"})
    (folder / "result.json").write_text("{")
    runs.take_over(source, folder)
    assert (folder / "result.json").read_text() == "{"
    assert not runs.is_done(folder)
