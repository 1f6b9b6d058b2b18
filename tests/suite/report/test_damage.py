"""One damaged file hides no report; data that differ are never averaged; `verify` finds what has changed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.helpers.commands import Ended
from tests.helpers.synthetic import write_run
from tests.helpers.training import trained

from backforward_suite import cli
from backforward_suite.commands import report as report_command
from backforward_suite.errors import BadInput
from backforward_suite.report import reference
from backforward_suite.report.reading import read_runs, refuse_mixed_data
from backforward_suite.report.status import state_of
from backforward_suite.report.table import sweep_table
from backforward_suite.runs.files import read_result, write_metrics, write_result
from backforward_suite.runs.lifecycle import _written


def result(seed: int, content: str = "a", **changes: Any) -> dict[str, Any]:
    return {
        "status": "finished",
        "settings_hash": f"hash {seed}",
        "choices": {"method": "sgd", "data": "npz"},
        "settings": {"method": {"_target_": "x"}, "lr": 0.1, "seed": seed, "max_epochs": 3, "data": {"name": "mine"}},
        "final": {"loss/train": 0.1 * (1 + seed), "accuracy/validation": 0.8, "accuracy/test": 0.8},
        "data": {"name": "mine", "train": 100, "sha256": content},
        "timing": {"seconds": 1.0},
        **changes,
    }


def shown(root: Path) -> str:
    console = Console(width=140, file=io.StringIO())
    console.print(sweep_table(root))
    return console.file.getvalue()  # type: ignore[attr-defined]


def written(root: Path, name: str, content: dict[str, Any]) -> Path:
    (root / name).mkdir()
    write_result(root / name, content)
    return root / name


def test_runs_on_other_data_are_apart(tmp_path: Path) -> None:
    for seed in range(4):
        written(tmp_path, f"seed{seed}", result(seed, "a" if seed < 2 else "b"))
    text = shown(tmp_path)
    assert "data content" in text
    rows = [line for line in text.splitlines() if "±" in line and "Mean" not in line]
    assert len(rows) == 2
    assert "0.1500±0.0707" in rows[0] + rows[1]
    assert "0.3500±0.0707" in rows[0] + rows[1]


def test_the_same_seed_on_two_data_sets_is_no_single_run(tmp_path: Path) -> None:
    written(tmp_path, "before", result(0, "a"))
    written(tmp_path, "after", result(0, "b"))
    assert len([line for line in shown(tmp_path).splitlines() if "0.1000" in line]) == 2


def test_a_referee_refuses_data_that_differ(tmp_path: Path) -> None:
    for seed, content in enumerate(("a", "a", "b")):
        folder = write_run(tmp_path, "bfp_depth", seed=seed)
        found = read_result(folder) or {}
        write_result(folder, {**found, "data": {**found["data"], "sha256": content}})
    with pytest.raises(BadInput, match="were trained on different data of one name"):
        refuse_mixed_data(read_runs(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[" * 100_000, '{"status": "finished"}', json.dumps(result(1, timing=None)),
        json.dumps(result(1, settings=None)), json.dumps(result(1, final={"loss/train": "low"})),
        json.dumps(result(1, timing={})), json.dumps(result(1, data={})), json.dumps(result(1, choices=[])),
    ],
    ids=lambda content: content[:30],
)  # fmt: skip
def test_a_damaged_result_is_named_and_the_rest_is_shown(tmp_path: Path, content: str) -> None:
    written(tmp_path, "good", result(0))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text(content)
    text = shown(tmp_path)
    assert "0.1000" in text
    assert "bad/result.json is damaged" in "".join(text.split("\n"))


def test_an_edited_result_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, "run", result(0))
    path = folder / "result.json"
    path.write_text(path.read_text().replace('"loss/train": 0.1', '"loss/train": 0.01'))
    with pytest.raises(BadInput, match="does not match its checksum"):
        read_result(folder)


@pytest.mark.parametrize(
    "content", [b"epoch,loss\n0,abc\n", b"\xff\xfe\x00", b"a,b\n1,2,3,4\n", b"a\n" + b'"' * 200_000]
)
def test_damaged_metrics_hide_no_status(tmp_path: Path, content: bytes) -> None:
    folder = written(tmp_path, "run", result(0))
    (folder / "metrics.csv").write_bytes(content)
    state = state_of(folder)
    assert (state.state, state.epoch) == ("failed", 0)
    assert "metrics.csv is damaged" in state.note


def test_a_table_that_is_not_what_the_run_left_is_not_drawn(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"epoch": 0, "loss/train": 1.0}])
    _written(tmp_path, result(0))
    (run,) = read_runs(tmp_path)
    assert list(run.metrics["loss/train"]) == [1.0]
    write_metrics(tmp_path, [{"epoch": 0, "loss/train": 2.0}])
    (run,) = read_runs(tmp_path)
    with pytest.raises(BadInput, match="its checksum differs"):
        _ = run.metrics


@pytest.mark.parametrize(
    "change",
    [{"settings": 3}, {"timing": {}}, {"timing": {"seconds": "x"}}, {"settings_hash": None}, {"final": {"x": []}}],
    ids=str,
)
def test_odd_lines_of_committed_results_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "bfp_depth.jsonl"
    path.write_text(json.dumps({"run": "a", "result": {**result(0), **change}}) + "\n")
    with pytest.raises(BadInput, match=r"bfp_depth\.jsonl, line 1, is damaged"):
        list(reference.read(path))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    (root / "run").mkdir()
    _written(root / "run", trained(root / "run", "max_epochs=1"))
    return root


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    def call(root: Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["report.py", "verify", str(root)])
        monkeypatch.setenv("BACKFORWARD_TRACEBACKS", "0")
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setenv("COLUMNS", "200")
        code = cli.run(report_command.main, report_command.CONF)
        return Ended(code, *capfd.readouterr())

    return call


def test_verify_finds_all_as_it_was(finished: Path, command: Any) -> None:
    ended = command(finished)
    assert ended.code == 0, ended.out + ended.err
    assert "1 finished run: 0 changed" in ended.out
    (line,) = [line for line in ended.out.splitlines() if "│ run " in line]
    assert line.count(" ok ") == 5


@pytest.mark.parametrize("name", ["result.json", "metrics.csv", "last.ckpt", "best.ckpt"])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_verify_looks_at_each_file(finished: Path, command: Any, name: str, damage: str) -> None:
    path = finished / "run" / name
    content = path.read_bytes()
    try:
        if damage == "gone":
            path.unlink()
        else:
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        ended = command(finished)
    finally:
        path.write_bytes(content)
    if (name, damage) == ("best.ckpt", "gone"):  # a run without an accuracy has none
        assert ended.code == 0
    elif (name, damage) == ("result.json", "gone"):
        assert "no finished run here" in ended.err
    else:
        assert ended.code == 1
        assert "1 finished run: 1 changed" in ended.out
        assert name in ended.out
