"""Every config under `conf/` composes, and trains; every experiment is a sweep, at each scale."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from tests.helpers.commands import CONF, REPOSITORY
from tests.helpers.configs import composed

from backforward_suite.config import Request
from backforward_suite.errors import BadInput
from backforward_suite.hardware import gpu_count
from backforward_suite.report import experiments
from backforward_suite.run import train
from backforward_suite.runs import names
from backforward_suite.sweep.grids import _product

GROUPS = sorted(
    path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("experiment", "hydra", "data")
)
CHOICES = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((CONF / group).glob("*.yaml"))
    if path.stem not in ("wandb", "mlflow")  # not of our extras: tested in train/test_loggers.py where installed
]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
TINY = (
    *("data=digits", "data.train_images=128", "data.evaluation_images=100", "model.hidden=8", "batch_size=32"),
    *("max_epochs=1", "trainer.accelerator=cpu"),
)
# What makes a choice small, or possible at all, where TINY does not.
BESIDES = {
    ("model", "nin"): ("data.size=17", "model.width=0.05", "~model.hidden"),
    ("model", "residual"): ("model.depth=8", "model.width=0.25", "~model.hidden"),
    ("study", "one_step"): ("study.draws=3", "study.widths=[4]"),
    ("study", "moments_few"): (),
    ("study", "moments"): (
        *("study.samples=1000", "study.widths=[4]", "study.depth=2", "study.chain_inputs=8", "study.jacobian_rows=8"),
        *("study.shapes=[[2,8]]", "study.covariance_inputs=100", "study.channels=4", "study.images=8"),
        "data.size=8",
    ),
    ("study", "speed"): (
        *("model=nin", "data.size=17", "model.width=0.05", "~model.hidden", "study.rounds=1"),
        "study.seconds_a_turn=0.001",
    ),
}


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda text: text)
def test_every_choice_trains(group: str, choice: str, tmp_path: Path) -> None:
    tiny = [key for key in TINY if group != "trainer" or not key.startswith("trainer.")]
    besides = BESIDES.get((group, choice), ())
    tiny = [key for key in tiny if f"~{key.partition('=')[0]}" not in besides]
    names.register_resolvers()
    cfg = composed(f"{group}={choice}", *tiny, *(key for key in besides if not key.startswith("~")))
    if group == "trainer" and choice.startswith("gpu") and not gpu_count():
        with pytest.raises(BadInput, match="this machine has no GPU"):
            Request.of(cfg)
        return
    if (group, choice) == ("trainer", "ddp"):  # trained in tests/test_distributed.py, in processes of its own
        assert Request.of(cfg, here=False).settings.trainer.devices == 2
        return
    assert train(cfg, tmp_path)["status"] == "finished"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
def test_every_data_set_that_is_here_trains(name: str, tmp_path: Path) -> None:
    tiny = [key for key in TINY if key != "data=digits"]
    root = Path(os.environ.get("BACKFORWARD_DATA", REPOSITORY / "data"))
    if name == "npz":
        root = tmp_path
        x, y = np.random.default_rng(0).integers(256, size=(400, 8, 8), dtype=np.uint8), np.arange(400) % 4
        np.savez(root / "mine.npz", x_train=x, y_train=y, x_test=x[:200], y_test=y[:200], x_val=x[:100], y_val=y[:100])
    cfg = composed(f"data={name}", *tiny, f"data.root={root}", *(["data.name=mine"] if name == "npz" else []))
    if name not in ("digits", "npz") and not (root / f"{name}.npz").is_file():
        Request.of(cfg)
        pytest.skip(f"no {root / f'{name}.npz'}: composed, not trained")
    assert train(cfg, tmp_path)["status"] == "finished"


@pytest.mark.parametrize("scale", ["smoke", "small", "paper"])
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ("quickstart", "search")])
def test_every_experiment_is_a_sweep_at_every_scale(name: str, scale: str) -> None:
    """The first and the last run of each of its grids compose, each in a folder of the experiment."""
    names.register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"experiment={name}", f"scale={scale}"], return_hydra_config=True)
        sweeper = cfg.hydra.sweeper
        grids = [
            _product(
                OverridesParser.create().parse_overrides(
                    [f"{key}={value}" for key, value in {**grid, **sweeper.params, **grid}.items()]
                )
            )
            for grid in sweeper.grids or [{}]
        ]
        jobs = [job for grid in grids for job in grid]
        assert len({tuple(sorted(job)) for job in jobs}) == len(jobs) >= 1
        for job in [grid[end] for grid in grids for end in ((0, -1) if len(grid) > 1 else (0,))]:
            given = [f"experiment={name}", f"scale={scale}", *job]
            one = compose("train", overrides=given, return_hydra_config=True)
            Request.of(one, one.hydra)
            place, _, experiment = one.name.rpartition("/")
            assert place == scale
            assert experiment in experiments.ORDER
            assert name.startswith(experiment)
