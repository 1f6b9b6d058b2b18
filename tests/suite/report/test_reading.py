from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from tests.helpers.synthetic import write_run

from backforward_suite.errors import BadInput
from backforward_suite.report.reading import Run, read_runs


def test_a_run_knows_its_place_settings_and_numbers(tmp_path: Path) -> None:
    write_run(tmp_path, "np_table", method="bfp", lr=0.05, seed=3, settings={"model.depth": 2}, losses=[0.3, 0.1])
    (run,) = read_runs(tmp_path)
    assert (run.name, run.seed) == ("bfp-lr0.05-seed3", 3)
    assert run.choice("method") == "bfp"
    assert run.setting("model.depth") == 2
    assert run.setting("model.width") is None
    assert run.setting("lr.deeper", 7) == 7
    assert run.final("loss/train") == 0.1
    assert run.final("loss/of_nothing") is None
    assert run.curve("loss/train").to_dict() == {1: 0.3, 2: 0.1}  # row 0 has no training loss
    assert run.curve("loss/validation").index[0] == 0
    assert run.curve("loss/of_nothing").empty
    assert run.diagnostics.empty
    assert "layer" in run.diagnostics
    assert run.study.empty


def test_a_diverged_run_counts_as_a_guess_and_as_the_worst_it_has_shown(tmp_path: Path) -> None:
    write_run(tmp_path, "x", seed=0, status="diverged", losses=[0.4, math.inf])
    write_run(tmp_path, "x", seed=1, status="diverged", losses=[30.0, math.nan])
    low, high = read_runs(tmp_path)
    assert low.final("accuracy/test") == 0.1
    assert low.final("loss/train") == pytest.approx(math.log(10))
    assert high.final("loss/train") == 30.0
    assert low.final("weight_norm/sum") == pytest.approx(27.1)  # as it was recorded


def test_runs_come_in_natural_order_failed_and_damaged_ones_as_failed_unfinished_ones_not(tmp_path: Path) -> None:
    for seed in (10, 2):
        write_run(tmp_path, "x", seed=seed)
    (write_run(tmp_path, "x", seed=3) / "result.json").write_text("{half")
    (write_run(tmp_path, "x", seed=4) / "result.json").unlink()
    found = read_runs(tmp_path)
    assert [run.name[-2:] for run in found] == ["d2", "d3", "10"]
    assert [run.status for run in found] == ["finished", "failed", "finished"]
    assert "damaged" in found[1].result["cause"]
    assert found[1].seed == 0
    assert read_runs(tmp_path / "nowhere") == []


def test_diagnostics_keep_the_empty_layer_and_a_damaged_table_is_one_line(tmp_path: Path) -> None:
    rows = pd.DataFrame([[1, 5, "shift/applied", "", 1, 0.5], [1, 5, "shift/applied", "0", 1, math.nan]])
    rows.columns = ["epoch", "step", "measure", "layer", "update", "value"]
    folder = write_run(tmp_path, "x", diagnostics=rows)
    assert read_runs(tmp_path)[0].diagnostics["layer"].tolist() == ["", "0"]
    (folder / "metrics.csv").write_text("epoch,step\n1,two\n")
    with pytest.raises(BadInput, match=r"metrics\.csv is damaged"):
        read_runs(tmp_path)[0].metrics  # noqa: B018


def test_a_run_can_be_had_without_files() -> None:
    run = Run(Path("small/x/a"), {"status": "finished"}, {"metrics": pd.DataFrame({"epoch": [1], "loss/train": [0.5]})})
    assert run.curve("loss/train").to_dict() == {1: 0.5}
    assert (run.seed, run.data, run.hardware, run.final("loss/train")) == (0, "", "unknown hardware", None)
