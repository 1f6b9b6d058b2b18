"""A search by Optuna: each trial is an ordinary run, and the same search again trains nothing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
from tests.helpers.commands import Command

from backforward_suite.runs import files

SMALL = ("max_epochs=1", "model.hidden=8", "trainer.accelerator=cpu")
SEARCH = ("-m", "experiment=search", "hydra.sweeper.n_trials=4", *SMALL)


@pytest.mark.skipif(find_spec("optuna") is None, reason="not installed: optuna (pip install -e '.[optuna]')")
def test_each_trial_is_a_run(spawned: Command, tmp_path: Path) -> None:
    ended = spawned(*SEARCH)
    assert ended.code == 0, ended.err
    root = tmp_path / "outputs" / "search"
    scores = {files.objective(files.read_result(path.parent) or {}) for path in root.glob("*/result.json")}
    assert len(scores) <= 4
    assert len(files.read_plan(root)) == 4
    assert all(len(folder.parent.name) < 40 for folder in root.glob("*/result.json"))  # rates are rounded in names
    assert "alembic" not in ended.out + ended.err
    assert len(ended.err.splitlines()) <= 1
    best = OmegaConf.to_container(OmegaConf.load(root / "optimization_results.yaml"))
    assert isinstance(best, dict)
    assert best["best_value"] == max(score for score in scores if score is not None)

    again = spawned(*SEARCH)
    assert again.code == 0
    assert again.out.count("2 runs: 2 done before, skipped") == 2


def test_without_optuna_it_says_what_to_install(train: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    Plugins.instance()  # registers the sweeper where it is installed
    sweepers: Any = ConfigStore.instance().repo["hydra"]["sweeper"]
    monkeypatch.delitem(sweepers, "optuna.yaml", raising=False)
    ended = train(*SEARCH)
    assert ended.code == 2
    assert ended.err == "error: hydra/sweeper=optuna: it is not installed; pip install -e '.[optuna]'\n"
