"""The GPU's checks and benchmarks, as far as a CPU can carry them out; nothing is timed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers import gpu_checks
from tests.helpers.commands import REPOSITORY, environment

import gpu_check
from backforward_suite.bench import gpu
from backforward_suite.bench.common import Row
from backforward_suite.bench.gpu import Conditions

ABSENT = ["pytest", "pydantic", "rich", "filelock", "scipy", "pandas", "hydra", "lightning", "torchvision"]
WHOLE = ("training", "run")  # parts that need all that runs need


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr, in this process."""
    try:
        code = gpu_check.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_dry_run_takes_every_part_where_little_is_installed(tmp_path: Path) -> None:
    hidden = f"import sys; sys.path.insert(0, 'src'); sys.modules.update(dict.fromkeys({ABSENT}))"
    code = f"{hidden}; import gpu_check; sys.exit(gpu_check.main())"
    ended = subprocess.run(
        [sys.executable, "-c", code, "--dry-run"],
        check=False,
        cwd=REPOSITORY,
        env=environment(OUT=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "gpu_check_dry_run.json").read_text())
    assert found["dry_run"] is True
    assert found["machine"]["torch"] == torch.__version__
    assert {name: part["status"] for name, part in found["parts"].items()} == {
        name: "skipped" if name in WHOLE else "passed" if home == gpu_check.CHECKS else "measured"
        for name, home in gpu_check.PARTS.items()
    }
    for name in WHOLE:
        assert found["parts"][name]["reason"].endswith(" is not installed")  # Lightning, or what it imports
    rows = [row for part in found["parts"].values() for row in part["rows"]]
    assert {row["status"] for row in rows} == {"passed", "measured"}
    measured = found["parts"]["epoch"]["rows"]
    assert not [value for row in measured for value in row.values() if isinstance(value, float)]  # no times
    assert {(row["precision"], row["captured"]) for row in measured} == {
        (precision, captured) for precision in gpu.PRECISIONS for captured in (False, True)
    }
    for name in gpu_check.PARTS:
        assert f"\n{name} " in ended.stdout


def test_a_dry_run_trains_as_runs_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    code, _, _ = checked(capsys, "--dry-run", "--only", *WHOLE, "--out", str(out))
    parts = json.loads(out.read_text())["parts"]
    part = parts["training"]
    assert (code, part["status"], parts["run"]["status"]) == (0, "passed", "measured")
    assert [(row["precision"], row["method"], row["images"]) for row in parts["run"]["rows"]] == [
        ("tf32", "sgd", 100),
        ("tf32", "bfp", 100),
        ("fp32", "sgd", 100),
    ]
    assert {tuple(row["observers"]) for row in part["rows"]} == {("RunRecord", "ProgressBar")}
    assert not [row for row in parts["run"]["rows"] if "epoch_s" in row]
    assert [(row["method"], row["captured"]) for row in part["rows"]] == [
        (method, captured) for method in ("sgd", "bfp") for captured in (False, True)
    ]
    assert {row["watched"] for row in part["rows"]} == {2 * (12 - 4)}


def test_a_part_that_fails_is_recorded_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Conditions, rows: list[Row]) -> None:
        rows.append({"status": "passed"})
        raise RuntimeError("CUDA error: out of luck [4]\nsearch for it")

    def lacking(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    def fine(_: Conditions, rows: list[Row]) -> str:
        rows.append({"status": "measured"})
        return "all well"

    monkeypatch.setattr(gpu_checks, "rules", broken)
    monkeypatch.setattr(gpu_checks, "memory", lacking)
    monkeypatch.setattr(gpu, "epoch", fine)
    out = tmp_path / "new" / "found.json"
    code, printed, _ = checked(capsys, "--dry-run", "--only", "epoch", "memory", "rules", "--out", str(out))
    assert code == 1
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == ["rules", "memory", "epoch"]  # in the order of PARTS
    assert parts["rules"]["status"] == "failed"
    assert parts["rules"]["error"] == "RuntimeError: CUDA error: out of luck [4]"
    assert parts["rules"]["rows"] == [{"status": "passed"}]
    assert (parts["memory"]["status"], parts["memory"]["reason"]) == ("skipped", "scipy is not installed")
    assert (parts["epoch"]["status"], parts["epoch"]["summary"]) == ("measured", None)
    assert "out of luck [4]" in printed


def test_a_part_that_ends_its_process_or_never_ends_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "misbehaving_parts.py").write_text(
        "import os, time\n"
        "def well(setting, rows): rows.append({'status': 'passed'})\n"
        "def dies(setting, rows): os._exit(11)\n"
        "def hangs(setting, rows): time.sleep(600)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def outcome(name: str) -> dict[str, Any]:
        found = gpu_check.apart(name, "misbehaving_parts", setting)
        found.pop("seconds", None)
        return found

    # No Conditions, which would have each process import torch.
    setting = SimpleNamespace(due=time.monotonic() + 60, dry_run=False)
    assert outcome("well") == {
        "status": "passed",
        "summary": None,
        "error": None,
        "rows": [{"status": "passed"}],
    }
    assert outcome("dies") == {"status": "failed", "error": "its process ended with exit code 11", "rows": []}
    setting = SimpleNamespace(due=-math.inf, dry_run=False)
    monkeypatch.setattr(gpu_check, "GRACE", 0.2)
    assert outcome("hangs") == {"status": "failed", "error": "its process did not end in time", "rows": []}


@pytest.mark.parametrize(
    ("check", "statuses", "status"),
    [
        (True, ["passed", "failed"], "failed"),
        (True, ["passed", "not run"], "passed"),
        (False, ["measured", "failed"], "measured"),  # a batch too large for this GPU
        (False, ["failed"], "failed"),
        (True, ["not run"], "not run"),
    ],
)
def test_the_status_of_a_part_is_that_of_its_rows(check: bool, statuses: list[str], status: str) -> None:
    assert gpu_check.status_of([{"status": each} for each in statuses], check) == status


def test_what_time_does_not_allow_is_listed_as_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = checked(capsys, "--dry-run", "--minutes", "1e-9", "--out", str(tmp_path / "o.json"))
    assert code == 0
    parts = json.loads((tmp_path / "o.json").read_text())["parts"]
    assert {part["status"] for part in parts.values()} == {"not run"}
    assert list(parts) == list(gpu_check.PARTS)
    assert printed.count("not run") == len(parts)


def test_a_row_that_fails_or_comes_too_late_says_so() -> None:
    rows: list[Row] = []
    in_time, late = (Conditions(torch.device("cpu"), True, Path(), due) for due in (math.inf, -math.inf))

    def failing() -> Row:
        raise ValueError("too large\nby far")

    gpu.attempt(in_time, rows, {"batch": 1}, failing)
    gpu.attempt(late, rows, {"batch": 2}, failing)
    gpu.attempt(in_time, rows, {"batch": 3}, lambda: [{"ms": 1.0}, {"status": "failed"}])
    assert rows == [
        {"batch": 1, "status": "failed", "error": "ValueError: too large"},
        {"batch": 2, "status": "not run"},
        {"batch": 3, "status": "measured", "ms": 1.0},
        {"batch": 3, "status": "failed"},
    ]


def test_a_comparison_of_what_differs_fails() -> None:
    one, other = torch.ones(3), torch.tensor([1.0, 1.0, 2.0])
    assert gpu_checks.deviation([one], [one]) == 0
    assert gpu_checks.deviation({"a": other}, {"a": one}) == pytest.approx(1 / math.sqrt(3))
    assert gpu_checks.judged(0.1, 0.01) == {"status": "failed", "deviation": 0.1, "tolerance": 0.01}
    not_a_number = gpu_checks.deviation([one, one * math.nan], [one, one])
    assert gpu_checks.judged(not_a_number, 0.01) == {"status": "failed", "deviation": None, "tolerance": 0.01}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--only", "rulse"], "no such part: rulse; there are capture, rules, normprop"),
        (["--minutes", "0"], "--minutes=0: must be a number > 0"),
        (["--minutes", "soon"], "argument --minutes: invalid float value: 'soon'"),
        (["--dry-run", "--out", "."], "--out=.: Is a directory; give a file"),
        (["--dry-run", "--out", "Makefile/o.json"], "--out=Makefile/o.json: "),
        ([], "torch sees no CUDA device; --dry-run"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, printed = checked(capsys, *arguments)
    assert code == 2
    assert printed.startswith(f"error: {line}")
    assert printed.count("\n") == 1


def test_results_go_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.parsed([]).out == tmp_path / "gpu_check.json"
    monkeypatch.delenv("OUT")
    assert gpu_check.parsed([]).out == REPOSITORY / "outputs" / "gpu_check.json"
    assert gpu_check.parsed(["--dry-run"]).out == REPOSITORY / "outputs" / "gpu_check_dry_run.json"
