"""Studies through the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.commands import Command, modules_after

from backforward_suite.runs.files import read_result

DIGITS = ("data=digits", "trainer.accelerator=cpu")
STUDIES = {
    "one_step": ("study=one_step", "study.draws=3", "study.widths=[4,8]", "lr=1", "method=bfp"),
    "moments": (
        "study=moments",
        "study.activations=[relu]",
        "study.samples=1000",
        "study.widths=[8]",
        "study.chain_inputs=10",
        "study.jacobian_rows=16",
        "study.shapes=[[2,4]]",
        "study.covariance_inputs=10",
        "study.channels=2",
        "study.images=4",
    ),
    "speed": ("study=speed", "study.rounds=1", "study.seconds_a_turn=0", "model.hidden=8", "batch_size=4"),
}


def result_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*/result.json")
    result = read_result(path.parent)
    assert result is not None
    return result


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("time/")}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_is_a_run(study: str, train: Command, tmp_path: Path) -> None:
    for name in ("one", "again"):
        ended = train(*STUDIES[study], *DIGITS, f"name={name}")
        assert ended.code == 0, ended.err
    one, again = (result_of(tmp_path / "outputs" / name) for name in ("one", "again"))
    assert one["status"] == "finished"
    assert one["choices"]["study"] == study
    assert one["settings"]["study"]["_target_"].startswith("backforward_suite.studies.")
    assert timeless(one["final"]) == timeless(again["final"])
    assert one["settings_hash"] == again["settings_hash"]
    json.dumps(one, allow_nan=False)

    tables = []
    for name in ("one", "again"):
        (path,) = (tmp_path / "outputs" / name).glob("*/study.csv")
        assert not (path.parent / "metrics.csv").exists()
        with path.open(newline="") as file:
            tables.append([timeless(row) for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    assert len(tables[0]) > 1

    before = one["timing"]["finished_at"], (tmp_path / "outputs" / "one").glob("*/result.json").__next__().stat()
    ended = train(*STUDIES[study], *DIGITS, "name=one")  # done: it is shown, not made again
    assert ended.code == 0
    assert next(iter(one["final"])) in ended.out
    assert (tmp_path / "outputs" / "one").glob("*/result.json").__next__().stat() == before[1]


def test_its_result_has_the_form_of_a_trainings(train: Command, tmp_path: Path) -> None:
    assert train(*STUDIES["one_step"], *DIGITS, "name=study").code == 0
    assert train(*DIGITS, "max_epochs=1", "model.hidden=4", "name=training").code == 0
    study, training = (result_of(tmp_path / "outputs" / name) for name in ("study", "training"))
    assert list(study) == list(training)
    assert study["data"] == training["data"]
    assert study["code"] == training["code"]
    assert study["hardware"] == training["hardware"]
    assert study["timing"].keys() <= training["timing"].keys()
    assert training["settings"]["study"] is None
    assert study["settings_hash"] != training["settings_hash"]


def test_sweeps_compare_methods_on_the_same_draws(spawned: Command, tmp_path: Path) -> None:
    ended = spawned("-m", *STUDIES["one_step"][:-1], *DIGITS, "method=sgd,bfp", "name=sweep")
    assert ended.code == 0, ended.err
    before = []
    for path in sorted((tmp_path / "outputs" / "sweep").glob("*/study.csv")):
        with path.open(newline="") as file:
            before.append([row["loss_before"] for row in csv.DictReader(file)])
    assert len(before) == 2
    assert before[0] == before[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.precision=bf16-mixed"], "a study needs full precision"),
        (["diagnostics=cheap"], "diagnostics watch a training, and a study has none"),
        (["study.draws=0"], "study.draws=0: must be an integer >= 1"),
        (["study.drws=3"], "study.drws: no such key"),
        (["model=nin", "data.size=32"], "give model=mlp"),
        (["method.groups=0"], "groups"),
    ],
)
def test_bad_input_is_one_line(overrides: list[str], message: str, train: Command) -> None:
    method = ["method=bfp"] if "method.groups=0" in overrides else []
    ended = train("study=one_step", *DIGITS, *method, *overrides)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_keys_of_a_study_that_was_not_asked_for_are_unknown(train: Command) -> None:
    ended = train(*DIGITS, "study.draws=3")
    assert ended.code == 2
    assert ended.err == "error: study.draws: no such key\n"


def test_a_study_does_without_lightning() -> None:
    assert not modules_after("import backforward_suite.studies.conduct, backforward_suite.studies") & {
        "lightning",
        "lightning.pytorch",
    }
