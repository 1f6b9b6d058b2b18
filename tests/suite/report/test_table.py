from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from backforward_suite.errors import BadInput
from backforward_suite.report.table import mean_and_spread, sweep_table
from backforward_suite.runs.files import write_result


def result(method: str, lr: float, seed: int, loss: float | None, status: str = "finished") -> dict[str, Any]:
    accuracy = None if loss is None else 1 - loss
    return {
        "status": status,
        "settings_hash": f"{method} {lr} {seed}",
        "choices": {"method": method, "data": "digits"},
        "settings": {"method": {"_target_": method}, "optimizer": {"lr": lr}, "lr": lr, "seed": seed, "max_epochs": 3},
        "final": {
            "loss/train": loss,
            "accuracy/validation": accuracy,
            "accuracy/test": accuracy,
            "weight_norm/total": 2.0,
        },
        "data": {"name": "digits", "train": 1297},
        "timing": {"seconds": 1.0},
    }


def shown(root: Path) -> str:
    console = Console(width=80, file=StringIO())
    console.print(sweep_table(root))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_seeds_become_mean_and_spread_and_rows_stand_in_natural_order(tmp_path: Path) -> None:
    for lr in (0.1, 0.05):
        for seed, loss in enumerate((0.2, 0.3, 0.4)):
            folder = tmp_path / f"sgd-lr{lr}-seed{seed}"
            folder.mkdir()
            write_result(folder, result("sgd", lr, seed, loss * lr))
    text = shown(tmp_path)
    rows = [line.split() for line in text.splitlines() if "±0." in line]
    assert [row[0] for row in rows] == ["0.05", "0.1"]  # the only key that varies; optimizer.lr follows it
    assert rows[1][1:4] == ["3", "0.0300±0.0100", "97.00±1.00"]
    assert "digits (1297 training images), 3 epochs" in text


def test_a_diverged_seed_is_counted_and_a_failed_one_left_out(tmp_path: Path) -> None:
    for seed, (loss, status) in enumerate([(0.2, "finished"), (None, "diverged"), (0.1, "failed")]):
        (tmp_path / str(seed)).mkdir()
        write_result(tmp_path / str(seed), result("bfp", 1.0, seed, loss, status))
    assert "2 (1 diverged)" in shown(tmp_path)


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no finished run here"):
        sweep_table(tmp_path)


def test_mean_and_spread_uses_the_sample_standard_deviation() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0], ".2f") == "2.00±1.00"
    assert mean_and_spread([1.0], ".2f") == "1.00"
    assert mean_and_spread([None, 2.0, 4.0], ".1f") == "3.0±1.4"
    assert mean_and_spread([None], ".1f") == "-"


def test_a_key_of_one_choice_alone_is_told(tmp_path: Path) -> None:
    """Of `noisy` with two noises and `sgd`, which has none, `method` tells only some apart."""
    for name, method, noise in (("a", "noisy", 0.1), ("b", "noisy", 0.5), ("c", "sgd", None)):
        (tmp_path / name).mkdir()
        one = result(method, 0.1, 0, 0.2)
        one["settings_hash"] = name
        if noise is not None:
            one["settings"]["method"]["noise"] = noise
        write_result(tmp_path / name, one)
    rows = [line.split()[:2] for line in shown(tmp_path).splitlines() if "80.00" in line]
    assert rows == [["noisy", "0.1"], ["noisy", "0.5"], ["sgd", "-"]]


def test_equal_settings_count_once(tmp_path: Path) -> None:
    for name in ("here", "and_in_another_folder"):
        (tmp_path / name).mkdir()
        write_result(tmp_path / name, result("sgd", 0.1, 0, 0.2))
    (row,) = (line for line in shown(tmp_path).splitlines() if "80.00" in line)
    assert " 1 " in row
