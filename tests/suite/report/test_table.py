from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from backforward_suite.errors import BadInput
from backforward_suite.report.table import mean_and_spread, sweep_csv, sweep_table
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


def shown(root: Path, width: int = 80, **options: Any) -> str:
    console = Console(width=width, file=StringIO())
    console.print(sweep_table(root, **options))
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
    header, row = (line.split() for line in shown(tmp_path).splitlines() if "seeds " in line or "80.00" in line)
    assert header[2:4] == ["seeds", "diverged"]
    assert row[2:4] == ["2", "1"]


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


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Runs of long settings on two data sets, three seeds each, one diverged."""
    for data in ("digits", "cifar100"):
        for method in ("bfp", "a_method_of_a_rather_long_name"):
            for lr in (0.0123457, 0.1):
                for seed in range(3):
                    one = result(method, lr, seed, 0.2 + seed / 10)
                    one["settings_hash"] += data
                    one["choices"]["data"], one["data"] = data, {"name": data, "train": 1297}
                    one["settings"]["model"] = {"activation": "leaky_relu" if lr == 0.1 else "relu"}
                    one["settings"]["batch_size"] = 128 if method == "bfp" else 1024
                    if (method, lr, seed, data) == ("bfp", 0.1, 2, "digits"):
                        one["status"] = "diverged"
                    folder = tmp_path / f"{data}{method}{lr}{seed}"
                    folder.mkdir()
                    write_result(folder, one)
    return tmp_path


@pytest.mark.parametrize("width", [80, 120])
def test_no_number_is_ever_cut(many: Path, width: int) -> None:
    text = shown(many, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    assert text.count("0.3000±0.1000") == 8
    assert text.count("70.00±10.00") == 16
    assert "digits (1297 training images), 3 epochs" in text
    assert "cifar100 (1297 training images), 3 epochs" in text
    assert text.index("cifar100 (") < text.rindex("0.3000±0.1000")


def test_what_finds_no_room_is_left_out_and_said(many: Path) -> None:
    text = shown(many, 60)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert "Not shown, as the console is too narrow: test %, norm, sec. (--csv has all)." in " ".join(text.split())
    assert text.count("0.3000±0.1000") == 8


def test_where_and_sort(many: Path) -> None:
    text = shown(many, 120, where={"data": "digits", "method": "bfp"})
    assert "cifar100" not in text
    assert text.count("0.3000±0.1000") == 2
    with pytest.raises(BadInput, match=r"--where lr=3: no finished run has that; there are 0\.0123457, 0\.1"):
        sweep_table(many, {"lr": "3"})
    with pytest.raises(BadInput, match=r"methd: no run has a setting of that name; did you mean method\?"):
        sweep_table(many, {"methd": "bfp"})
    with pytest.raises(BadInput, match="no run has a setting of that name"):
        sweep_table(many, sort="speed")


def test_sorting_puts_the_best_first(tmp_path: Path) -> None:
    for lr, loss in ((0.1, 0.3), (0.2, 0.1), (0.4, None), (0.3, 0.2)):
        (tmp_path / str(lr)).mkdir()
        write_result(tmp_path / str(lr), result("sgd", lr, 0, loss, "diverged" if loss is None else "finished"))

    def order(sort: str | None) -> list[str]:
        rows = [line.split() for line in shown(tmp_path, sort=sort).splitlines()]
        return [row[0] for row in rows if row and row[0].startswith("0.")]

    assert order(None) == ["0.1", "0.2", "0.3", "0.4"]
    assert order("loss") == ["0.2", "0.3", "0.1", "0.4"]  # what was not measured comes last
    assert order("test") == order("val. %") == ["0.2", "0.3", "0.1", "0.4"]
    assert order("lr") == order(None)


def test_csv_has_every_number_in_full_precision(many: Path) -> None:
    rows = list(csv.DictReader(StringIO(sweep_csv(many))))
    assert len(rows) == 8
    assert {row["data"] for row in rows} == {"digits", "cifar100"}
    (one,) = (row for row in rows if (row["data"], row["method"], row["lr"]) == ("digits", "bfp", "0.1"))
    assert (one["seeds"], one["diverged"], one["batch_size"]) == ("3", "1", "128")
    assert float(one["loss mean"]) == pytest.approx(0.3, abs=1e-15)
    assert float(one["loss sd"]) == pytest.approx(0.1, abs=1e-15)
