from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers.configs import requested

from backforward_suite.data import load_data
from backforward_suite.errors import BadInput
from backforward_suite.report import experiments, reference
from backforward_suite.report.experiments._tables import hardware
from backforward_suite.report.reading import read_runs
from backforward_suite.results import assembled
from backforward_suite.runs import files

NAME = "bfp_norm"
KEPT = "shift/applied_relative"
SETTINGS = {"seed": 3, "data": {"name": "digits", "root": "/home/somebody/data", "size": None}}


@pytest.fixture(autouse=True)
def one_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever there is to examine, these tests need one that reads one measure."""
    monkeypatch.setattr(experiments, "names", lambda: [NAME])
    monkeypatch.setattr(experiments, "diagnostics_of", lambda name: (KEPT,))


def write_run(outputs: Path, name: str, status: str = "finished", **result: object) -> Path:
    folder = outputs / "small" / NAME / name
    folder.mkdir(parents=True)
    files.write_metrics(folder, [{"epoch": 0, "loss/train": None}, {"epoch": 1, "loss/train": 0.1 + 0.2, "lr": 1e-17}])
    rows = [files.Measured(1, 40, measure, "head", 1, 1 / 3) for measure in (KEPT, "update/norm", KEPT)]
    files.write_diagnostics(folder, rows)
    (folder / "study.csv").write_text('quantile,value\n"a, b",0.1\n')
    (folder / "last.ckpt").write_text("weights")
    request = replace(requested(), values=SETTINGS, choices={})
    found = {"status": status, "final": {"loss/train": 0.1 + 0.2}}
    data = load_data("digits", Path())
    written = assembled(found, request, data, torch.device("cpu"), {"seconds": 2.5}, {})
    files.write_result(folder, {**written, **result})
    return folder


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    write_run(tmp_path / "outputs", "bfp-lr0.1-seed10")
    write_run(tmp_path / "outputs", "bfp-lr0.1-seed2", status="diverged")
    write_run(tmp_path / "outputs", "sgd-lr0.1-seed2", status="failed")
    return tmp_path / "outputs"


def test_round_trip(outputs: Path, tmp_path: Path) -> None:
    committed, elsewhere, again = tmp_path / "reference", tmp_path / "elsewhere", tmp_path / "again"
    assert reference.pack(outputs, "small", committed) == {NAME: 2}  # a failed run is no result
    assert reference.unpack(committed, "small", elsewhere) == {NAME: 2}
    reference.pack(elsewhere, "small", again)
    file = committed / "small" / f"{NAME}.jsonl"
    assert (again / "small" / f"{NAME}.jsonl").read_bytes() == file.read_bytes()
    for name in ("bfp-lr0.1-seed2", "bfp-lr0.1-seed10"):
        there, here = elsewhere / "small" / NAME / name, outputs / "small" / NAME / name
        for table in ("metrics.csv", "study.csv"):
            assert (there / table).read_bytes() == (here / table).read_bytes()
        assert not (there / "last.ckpt").exists()
    assert [run.name for run in read_runs(elsewhere)] == ["bfp-lr0.1-seed2", "bfp-lr0.1-seed10"]  # natural order


def test_what_is_of_the_machine_and_its_user_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a result as a run writes it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "somebody's third")
    monkeypatch.setattr("platform.platform", lambda: "Linux-of-somebody")
    whole = files.read_result(write_run(tmp_path / "outputs", "bfp-lr0.1-seed2"))
    assert whole is not None
    assert json.dumps(whole).count("somebody") == 3
    reference.pack(tmp_path / "outputs", "small", tmp_path / "reference")
    text = (tmp_path / "reference" / "small" / f"{NAME}.jsonl").read_text()
    assert "somebody" not in text
    kept = json.loads(text)["result"]
    assert kept["settings"] == {"seed": 3, "data": {"name": "digits", "size": None}}
    assert set(kept["hardware"]) == set(whole["hardware"]) - {"system"}
    assert set(kept["timing"]) == set(whole["timing"]) - {"cuda_visible_devices"}


def test_the_threads_of_a_run_are_told_with_its_hardware(outputs: Path) -> None:
    threads = torch.get_num_threads()
    [told] = hardware(read_runs(outputs)).split("; ")
    assert told.endswith(f", {threads} {'thread' if threads == 1 else 'threads'} a run")


def test_of_the_diagnostics_only_what_is_read_is_kept(outputs: Path, tmp_path: Path) -> None:
    reference.pack(outputs, "small", tmp_path / "reference")
    reference.unpack(tmp_path / "reference", "small", tmp_path / "elsewhere")
    for run in read_runs(tmp_path / "elsewhere"):
        assert run.diagnostics["measure"].tolist() == [KEPT, KEPT]
        assert run.diagnostics["value"].tolist() == [1 / 3, 1 / 3]


def test_unpacking_leaves_what_is_there(outputs: Path, tmp_path: Path) -> None:
    reference.pack(outputs, "small", tmp_path / "reference")
    mine = write_run(tmp_path / "elsewhere", "bfp-lr0.1-seed2", own=True)
    before = (mine / "result.json").read_bytes()
    assert reference.unpack(tmp_path / "reference", "small", tmp_path / "elsewhere") == {NAME: 1}
    assert (mine / "result.json").read_bytes() == before
    assert (mine / "last.ckpt").exists()
    assert reference.unpack(tmp_path / "reference", "small", tmp_path / "elsewhere") == {NAME: 0}


def test_packing_nothing_leaves_what_was_committed(outputs: Path, tmp_path: Path) -> None:
    reference.pack(outputs, "small", tmp_path / "reference")
    with pytest.raises(BadInput, match="no finished run here; make reproduce SCALE=small"):
        reference.pack(tmp_path / "empty", "small", tmp_path / "reference")
    assert reference.scales_in(tmp_path / "reference") == ["small"]
    assert reference.scales_in(outputs) == ["small"]
    assert reference.scales_in(tmp_path / "empty") == []


@pytest.mark.parametrize(
    "damage",
    [
        '{"run": "a", "result"',
        '{"run": "../../a", "result": {"status": "finished"}}',
        '{"run": "..", "result": {"status": "finished"}}',
        '{"run": "a", "result": {"status": "failed"}}',
        '{"result": {"status": "finished"}}',
        "[]",
    ],
)
def test_a_damaged_line_is_named_and_makes_no_folder(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "reference" / "small" / f"{NAME}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(damage + "\n")
    with pytest.raises(BadInput, match="line 1, is damaged"):
        reference.unpack(tmp_path / "reference", "small", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_scale_that_was_not_kept_is_named(outputs: Path, tmp_path: Path) -> None:
    reference.pack(outputs, "small", tmp_path / "reference")
    with pytest.raises(BadInput, match=r"paper: no committed results here; scales that have some: small"):
        reference.unpack(tmp_path / "reference", "paper", tmp_path / "elsewhere")
