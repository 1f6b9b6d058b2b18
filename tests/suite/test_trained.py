"""Networks that come back from runs' folders compute what was evaluated when they were trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tests.helpers.training import CutOff, cut_off_at, trained, weights

from backforward_suite import load
from backforward_suite.commands import evaluate
from backforward_suite.data import load_data
from backforward_suite.errors import BadInput
from backforward_suite.runs.files import Result, write_result
from backforward_suite.train.callbacks.record import RunRecord
from backforward_suite.trained import score

OWN_MODEL = """
from torch import nn


def network(in_shape, classes, seed):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.BatchNorm1d(classes))
"""


def run(folder: Path, *overrides: str) -> Result:
    result = trained(folder, "max_epochs=2", *overrides)
    write_result(folder, result)
    return result


@pytest.mark.parametrize(
    "overrides",
    [
        "model=mlp data_norm=global method=bfp",
        "norm=prop data_norm=batch trainer.precision=64-true",
        "norm=batch data_norm=none trainer.precision=bf16-mixed",
        "own model",
    ],
)
def test_a_trained_network_comes_back(overrides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = overrides.split()
    if overrides == "own model":
        (tmp_path / "my_networks.py").write_text(OWN_MODEL)
        monkeypatch.syspath_prepend(tmp_path)
        given = ["~model.hidden", "model._target_=my_networks.network"]
        given += [f"~model.{key}" for key in ("depth", "activation", "dropout", "init", "norm", "jacobian_factor")]
    folder = tmp_path / "run"
    result = run(folder, *given)
    network = load(folder)
    sys.modules.pop("my_networks", None)
    assert not any(module.training for module in network.modules())
    state = network.state_dict()
    assert all(torch.equal(state[key[8:]], value) for key, value in weights(folder).items() if key[:8] == "network.")
    test = load_data("digits", Path("nowhere")).test
    found = score(network, test, result["settings"]["trainer"]["precision"], torch.device("cpu"))
    assert found.loss == pytest.approx(result["final"]["loss/test"], rel=1e-6)
    assert found.accuracy == pytest.approx(result["final"]["accuracy/test"], abs=1e-12)


@pytest.fixture(scope="module")
def normprop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "prop"
    run(folder, "norm=prop", "data_norm=batch", "lr=0.5", "max_epochs=3")
    return folder


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_it_can_be_exported_and_traced(normprop: Path) -> None:
    network = load(normprop)
    x, several = torch.rand(2, 1, 8, 8), torch.rand(7, 1, 8, 8)
    any_size = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(network, (x,), dynamic_shapes=any_size).module()
    torch.testing.assert_close(exported(several), network(several))
    torch.testing.assert_close(torch.jit.trace(network, x)(several), network(several))


def test_the_best_epoch_is_the_one_of_the_result(tmp_path: Path) -> None:
    result = run(tmp_path, "lr=3", "seed=1", "max_epochs=4")  # too high a rate: accuracy goes up and down
    found = evaluate.evaluate(tmp_path, [], "best")
    assert found["epoch"] == result["best"]["epoch"]
    assert found["scores"]["validation"]["accuracy"] == pytest.approx(result["best"]["accuracy/validation"])
    assert evaluate.evaluate(tmp_path, [], "last")["epoch"] == 4


def test_a_half_done_run_has_a_network_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunRecord, "before_batch", cut_off_at(60))
    with pytest.raises(CutOff):
        run(tmp_path)
    assert evaluate.evaluate(tmp_path, [], "last")["epoch"] == 1


def test_the_command_prints_a_table_and_json(
    normprop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(normprop), "data.evaluation_images=100"])
    assert evaluate.command() == 0
    table = capsys.readouterr().out
    assert "prop, last.ckpt (epoch 3) on digits (scikit-learn)" in table
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--json", str(normprop), "data.evaluation_images=100"])
    assert evaluate.command() == 0
    found = json.loads(capsys.readouterr().out)
    assert [score["images"] for score in found["scores"].values()] == [1297, 100, 100]
    assert f"{found['scores']['test']['accuracy']:.2%}" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["RUN", "lr=0.1"], "lr=0.1: only data=NAME and its keys"),
        (["RUN", "data=moon"], "data=moon: no such data; there are cifar10"),
        (["RUN", "data.rot=x"], "data.rot: no such key; there are name, protocol"),
        (["RUN", "data.size=big"], "data.size=big: input should be a valid integer"),
        (
            ["RUN", "data.size=9"],
            "takes images [1, 8, 8] of 10 classes, digits has [1, 9, 9] of 10; data.size=8 resizes",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_line(
    arguments: list[str],
    message: str,
    normprop: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(normprop) if argument == "RUN" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *given])
    assert evaluate.command() == 2
    ended = capsys.readouterr()
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_where_there_is_no_network_the_reason_is_given(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no last\.ckpt"):
        load(tmp_path)
    write_result(tmp_path, {"status": "finished", "taken_over_from": "bfp_norm/sgd"})
    with pytest.raises(BadInput, match="has its result from bfp_norm/sgd"):
        load(tmp_path)
    write_result(tmp_path, {"status": "finished", "settings": {"study": {"x": 1}}})
    with pytest.raises(BadInput, match="is a study"):
        load(tmp_path)
    (tmp_path / "last.ckpt").write_bytes(b"nonsense")
    with pytest.raises(BadInput, match="is damaged"):
        load(tmp_path)
