"""A run that goes on from a shorter one, in a folder of its own, is the run that trained all epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.commands import Command
from tests.helpers.training import same, trained, weights

from backforward_suite.errors import BadInput
from backforward_suite.runs.files import read_metrics

SAME = ("method=bfp", "optimizer=sgd_momentum", "norm=batch", "model.dropout=0.2")
RUN = (*SAME, "schedule=halve", "schedule.step_size=1")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "short"
    folder.mkdir()
    trained(folder, *RUN, "max_epochs=2")
    return folder


def test_more_epochs_are_those_of_a_run_of_all_epochs(short: Path, tmp_path: Path) -> None:
    (tmp_path / "on").mkdir(), (tmp_path / "straight").mkdir()
    before = {path.name: path.read_bytes() for path in short.iterdir() if path.is_file()}
    on = trained(tmp_path / "on", *RUN, "max_epochs=4", f"go_on_from={short}")
    straight = trained(tmp_path / "straight", *RUN, "max_epochs=4")
    assert on["final"] == straight["final"]
    assert on["best"] == straight["best"]
    assert on["settings_hash"] == straight["settings_hash"]
    assert read_metrics(tmp_path / "on") == read_metrics(tmp_path / "straight")
    assert same(weights(tmp_path / "on"), weights(tmp_path / "straight"))
    assert {path.name: path.read_bytes() for path in short.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*RUN, "max_epochs=4", "lr=0.2"], r"has other settings than max_epochs: lr=0.2 \(there: 0.1\)"),
        ([*RUN, "max_epochs=2"], "has max_epochs=2; give a larger max_epochs"),
        ([*SAME, "schedule=cosine", "max_epochs=4"], "has other settings than max_epochs: schedule"),
    ],
)
def test_other_settings_are_refused(overrides: list[str], message: str, short: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        trained(tmp_path, *overrides, f"go_on_from={short}")
    assert not (tmp_path / "last.ckpt").exists()


def test_what_has_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"go_on_from=nowhere: no last\.ckpt there"):
        trained(tmp_path, "go_on_from=nowhere")
    with pytest.raises(BadInput, match="works on one device"):
        trained(tmp_path, "go_on_from=nowhere", "trainer.devices=2")


def test_more_epochs_of_a_finished_run_are_offered(train: Command) -> None:
    """Only of a run that differs in nothing else, and only until the offer is taken."""
    asked = ("data=digits", "model.hidden=8", "batch_size=64", "trainer.accelerator=cpu")
    assert train(*asked, "max_epochs=1").code == 0
    shorter = "outputs/train/sgd-hidden8-digits-batch_size64-max_epochs1"
    assert "go_on_from" not in train(*asked, "max_epochs=2", "lr=0.2").out
    assert "go_on_from" not in train(*asked, "max_epochs=2", "patience=5").out
    assert "go_on_from" not in train(*asked, "max_epochs=2", f"go_on_from={shorter}").out
    longer = shorter.replace("epochs1", "epochs2")
    first_line = train(*asked, "max_epochs=3").out.splitlines()[0]
    assert first_line == f"{longer} has trained the first 2: go_on_from={longer} trains the other epochs alone"
