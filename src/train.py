"""Train one network, or sweep over many settings; or make a study instead.

    python src/train.py method=bfp lr=0.05
    python src/train.py -m method=bfp,sgd lr=0.1,0.05,0.01
    python src/train.py -m method=bfp,sgd lr=1 study=one_step

`conf/train.yaml` lists what can be set.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from backforward import cli, processes, runs
from backforward.errors import BadInput
from backforward.settings import Settings, plain

CONF = Path(__file__).resolve().parent.parent / "conf"


def train(cfg: DictConfig, folder: Path | None = None) -> runs.Result:
    """Train one network, or make the study that the config names.

    Args:
        cfg: A config composed from `conf/train.yaml`.
        folder: Where curves and checkpoints go, and where a half-done run goes on; None writes nothing.

    Returns:
        What stands in `result.json`: status, final and best metrics, settings, origin, timing.

    Raises:
        BadInput: Something asked for cannot be had.
    """
    settings = Settings.check(cfg)
    return (_train if settings.study is None else _study)(cfg, settings, folder)


# Torch and Lightning are imported within functions: they take seconds, which a skipped run or a mistyped key does
# without, and a study without the latter.


def _train(cfg: DictConfig, settings: Settings, folder: Path | None) -> runs.Result:
    import backforward._torchvision  # noqa: F401  (before Lightning, which imports torchvision)
    from backforward.building import Parts
    from backforward.fitting import fit

    with cli.refusing():
        module, loaders, arithmetic = Parts(cfg, settings).training()
    return fit(settings, plain(cfg), module, loaders, folder, runs.choices(), arithmetic)


def _study(cfg: DictConfig, settings: Settings, folder: Path | None) -> runs.Result:
    from hydra.utils import instantiate
    from torch.nn.functional import cross_entropy

    from backforward.building import Parts
    from backforward.studies import Setting
    from backforward.studying import conduct, place, tracker

    with cli.refusing():
        study = instantiate(cfg.study, _convert_="all")
        parts = Parts(cfg, settings)
        setting = Setting(
            seed=settings.seed,
            batch_size=settings.batch_size,
            data=parts.data,
            make_network=parts.network,
            make_optimizer=parts.optimizer,
            make_rule=lambda network, optimizer: parts.rule(
                network, optimizer, cross_entropy, after_update=parts.projection(network)
            ),
            track=tracker(settings),
            **place(settings),
        )
        network = parts.network(settings.seed)
        setting.make_rule(network, parts.optimizer(network)).prepare(parts.few()[0])

    return conduct(settings, plain(cfg), study, setting, folder, runs.choices())


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train in the run's folder, unless that run is done; return its accuracy on the validation set."""
    with cli.past_hydra():
        _refuse_shared_process(cfg)
        folder = Path(HydraConfig.get().runtime.output_dir)
        result = runs.finished_result(folder, cfg)
        if result is None:
            with runs.sitting(folder, cfg) as record:
                # Again, now that nobody else can be at it: another sweep may have been quicker.
                result = runs.finished_result(folder, cfg) or record(train(cfg, folder))
        if processes.rank(cfg.trainer.devices) == 0:
            cli.show(result, folder)
            cli.hint_at_sweep()
        return runs.objective(result)


def _refuse_shared_process(cfg: DictConfig) -> None:
    """In a process that has trained before, Lightning takes what that left for its own: half of the data, silently."""
    if cfg.trainer.devices > 1 and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise BadInput(
            f"trainer.devices={cfg.trainer.devices} in a sweep needs a launcher that gives each run processes of its "
            "own: hydra/launcher=pool, slurm or ray"
        )


def command() -> int:
    """The command line; returns its exit code."""
    processes.end_with_parent()
    runs.register_resolvers()
    return cli.run(main, CONF)


if __name__ == "__main__":
    sys.exit(command())
