"""Curves go where they are asked for, and change neither a result nor its hash."""

from __future__ import annotations

import csv
import sqlite3
import tomllib
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from tests.helpers.commands import REPOSITORY
from tests.helpers.configs import requested
from tests.helpers.training import same, trained, weights

from backforward_suite.errors import BadInput
from backforward_suite.runs.files import read_metrics
from backforward_suite.train import loggers

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the trackers' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
SHORT = ("max_epochs=2", "method=bfp", "diagnostics=full", "diagnostics.samples=20", "trainer.limit_train_batches=3")


def test_csv_has_every_point_and_the_training_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir(), (tmp_path / "tensorboard").mkdir()
    trained(tmp_path / "csv", *SHORT, "logger=csv")
    trained(tmp_path / "tensorboard", *SHORT)
    assert same(weights(tmp_path / "csv"), weights(tmp_path / "tensorboard"))
    assert read_metrics(tmp_path / "csv") == read_metrics(tmp_path / "tensorboard")
    assert not list((tmp_path / "csv").rglob("events.out.*"))
    with (tmp_path / "csv" / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss/validation"]) for row in rows if row["loss/validation"]]
    assert losses[:3] == [row["loss/validation"] for row in read_metrics(tmp_path / "csv")]
    assert any(key.startswith("shift/") for key in rows[0])  # numbers of diagnostics, without figures


def test_mlflow_has_the_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    database = tmp_path / "mlflow.db"
    trained(tmp_path, *SHORT, "diagnostics=off", "logger=mlflow", f"logger.tracking_uri=sqlite:///{database}")
    run = (tmp_path / loggers.MLFLOW_RUN).read_text().strip()
    with sqlite3.connect(database) as found:
        rows = dict(found.execute("select key, value from latest_metrics where run_uuid = ?", (run,)).fetchall())
        settings = dict(found.execute("select key, value from params where run_uuid = ?", (run,)).fetchall())
    found.close()
    assert rows["accuracy/validation"] == read_metrics(tmp_path)[-1]["accuracy/validation"]
    assert settings["lr"] == "0.1"


def test_wandb_has_the_run_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    trained(tmp_path, *SHORT, "diagnostics=off", "logger=wandb", "logger.offline=true")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"accuracy/validation" in content
    assert b"max_epochs" in content


@pytest.mark.parametrize("logger", ["tensorboard", "csv", "mlflow", "wandb"])
def test_a_logger_is_no_part_of_what_was_asked_for(logger: str) -> None:
    # The hash that the same settings had before there was a choice of loggers.
    before = "819fce23cc71d57b4fbb80ac8733ed55b48dcacd5531be967df8dcbe1aa41398"
    assert requested(f"logger={logger}").hash == before


@pytest.mark.parametrize(("name", "made"), [("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")])
def test_a_logger_that_is_not_installed_is_named(
    name: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(loggers, made, missing)
    line = rf"^logger={name}: its package is not installed; pip install -e '\.\[{name}\]'$"
    with pytest.raises(BadInput, match=line):
        trained(tmp_path, *SHORT, f"logger={name}")
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(package.startswith(name) for package in extras[name])


def test_a_tracker_that_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Weights & Biases before `wandb login`, or a server of MLflow that does not answer."""

    class Refuses(CSVLogger):
        def log_hyperparams(self, *_: object, **__: object) -> None:
            try:
                raise ConnectionError("no route to host\nretry later")
            except ConnectionError as error:
                raise LookupError("cannot log in") from error

    monkeypatch.setattr(loggers, "WandbLogger", lambda save_dir, **_: Refuses(save_dir))
    with pytest.raises(BadInput, match=r"^logger=wandb cannot be opened \(LookupError: cannot log in\); mend"):
        trained(tmp_path, *SHORT, "logger=wandb")


def test_the_limit_shortens_epochs_and_belongs_to_the_result(tmp_path: Path) -> None:
    result = trained(tmp_path, "max_epochs=2", "trainer.limit_train_batches=3")
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 3, 6]
    assert result["settings_hash"] != requested("data=digits", "max_epochs=2").hash
    assert requested("trainer.limit_train_batches=null").hash == requested().hash


@pytest.mark.parametrize(("debug", "steps"), [("fast", 6), ("overfit", 200), ("profile", 40)])
def test_debugging_modes_train_what_they_say(debug: str, steps: int, tmp_path: Path) -> None:
    result = trained(tmp_path, f"debug={debug}")
    assert result["final"]["step"] == steps
    if debug == "overfit":
        assert result["final"]["loss/train"] < 0.1
    if debug == "profile":
        assert "training_step" in (tmp_path / "fit-profile.txt").read_text()
