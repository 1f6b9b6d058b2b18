"""Estimate how long an experiment's sweep takes from committed results of the same networks at another scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from backforward_suite.runs.names import register_resolvers
from backforward_suite.sweep.grids import products

Kind = tuple[str, int]  # method, hidden layers


class Planned(NamedTuple):
    """One run of a sweep."""

    kind: Kind
    epochs: int


def planned(conf: Path, experiment: str, scale: str) -> list[Planned]:
    """The runs of an experiment (`experiment=...`) at a scale (`scale=...`)."""
    register_resolvers()
    with initialize_config_dir(str(conf), version_base="1.3"):
        cfg = compose("train", overrides=[f"experiment={experiment}", f"scale={scale}"], return_hydra_config=True)
    method, depth = cfg.hydra.runtime.choices["method"], cfg.model.get("depth", 0)
    found = []
    for job in products(cfg.hydra.sweeper.params, cfg.hydra.sweeper.grids, (), OverridesParser.create()):
        given = dict(override.split("=", 1) for override in job)
        kind = given.get("method", method), int(given.get("model.depth", depth))
        found.append(Planned(kind, int(given.get("max_epochs", cfg.max_epochs))))
    return found


def seconds_an_epoch(results: Iterable[Mapping[str, Any]]) -> dict[Kind, float]:
    """The mean seconds per epoch, by method and depth."""
    found: dict[Kind, list[float]] = defaultdict(list)
    for result in results:
        epochs = result["final"].get("epoch") or 0
        if epochs:
            kind = result["choices"]["method"], int(result["settings"]["model"].get("depth", 0))
            found[kind].append(result["timing"]["seconds"] / epochs)
    return {kind: mean(seconds) for kind, seconds in found.items()}


def at_most(runs: Iterable[Planned], paces: Mapping[Kind, float]) -> float | None:
    """Seconds of all runs if none stops early; unknown kinds count as the slowest known; None if none is known."""
    if not paces:
        return None
    slowest = max(paces.values())
    return sum(run.epochs * paces.get(run.kind, slowest) for run in runs)
