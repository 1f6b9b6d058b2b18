"""Evaluate the trained network of a run on a data set.

python src/evaluate.py outputs/train/bfp-lr0.05                              # on the run's own data set
python src/evaluate.py outputs/train/bfp-lr0.05 data=npz data.name=mine      # on another data set
python src/evaluate.py outputs/train/bfp-lr0.05 --checkpoint best --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from backforward_suite import cli
from backforward_suite.config import DataSettings, Request, plain
from backforward_suite.errors import BadInput

CONF = Path(__file__).resolve().parents[3] / "conf"


def evaluate(folder: Path, overrides: list[str], checkpoint: str) -> dict[str, Any]:
    """Measure a run's network on a data set.

    Args:
        folder: The run's folder.
        overrides: Overrides of the `data` group, such as `data=npz`, `data.name=mine`; none: the run's own data set.
        checkpoint: `last` or `best`.

    Returns:
        Plain values for JSON.

    Raises:
        BadInput: Network or data set cannot be loaded, or they do not fit each other.
    """
    from backforward_suite.data import load_asked
    from backforward_suite.trained import scores, trained

    for override in overrides:
        if override.partition("=")[0].partition(".")[0] != "data" or "=" not in override:
            raise BadInput(f"{override}: only data=NAME and its keys, such as data.root=DIR, apply here")
    found = trained(folder, checkpoint)  # type: ignore[arg-type]  # `trained` checks it
    data = load_asked(_data_settings(found.request, overrides))
    if data.shape != found.shape or data.classes != found.classes:
        size = f"; data.size={found.shape[1]} resizes" if data.shape[0] == found.shape[0] else ""
        raise BadInput(
            f"{folder} takes images {list(found.shape)} of {found.classes} classes, {data.name} has {list(data.shape)}"
            f" of {data.classes}{size if data.shape != found.shape else ''}"
        )
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        "run": str(folder),
        "checkpoint": checkpoint,
        "epoch": found.epoch,
        "data": {"name": data.name, "source": data.source, "sha256": data.fingerprint},
        "scores": {split: score._asdict() for split, score in scores(found, splits).items()},
    }


def _data_settings(request: Request, overrides: list[str]) -> DataSettings:
    """Return the run's data settings, or those of the named choice, with the overrides applied."""
    own = OmegaConf.create({"data": request.values["data"]})
    if names := [text.partition("=")[2] for text in overrides if text.startswith("data=")]:
        path = CONF / "data" / f"{names[-1]}.yaml"
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
            raise BadInput(f"data={names[-1]}: no such data; there are {there}")
        own = OmegaConf.create({"data": OmegaConf.load(path)})
    OmegaConf.set_struct(own, True)
    for text in overrides:
        key, _, value = text.partition("=")
        if key != "data":
            OmegaConf.update(own, key, yaml.safe_load(value))
    try:
        return DataSettings.model_validate(plain(own)["data"])
    except ValidationError as error:
        fault = error.errors()[0]
        raise BadInput(f"data.{'.'.join(map(str, fault['loc']))}={fault['input']}: {fault['msg'].lower()}") from None


def show(found: dict[str, Any]) -> None:
    """Print the scores as a table."""
    table = Table()
    table.add_column("")
    for column in ("images", "loss", "accuracy"):
        table.add_column(column, justify="right")
    for split, score in found["scores"].items():
        table.add_row(split, f"{score['images']:,}", f"{score['loss']:.4f}", f"{score['accuracy']:.2%}")
    console = Console()
    what = f"[bold]{Path(found['run']).name}[/], {found['checkpoint']}.ckpt (epoch {found['epoch']})"
    console.print(f"{what} on {found['data']['name']} ({found['data']['source']})", highlight=False, soft_wrap=True)
    console.print(table)


def main() -> None:
    """Parse the command line, evaluate, and print."""
    parser = argparse.ArgumentParser(description="Evaluate the trained network of a run on a data set.")
    parser.add_argument("run", type=Path, help="the run's folder, such as outputs/train/bfp-lr0.05")
    parser.add_argument("data", nargs="*", help="data=NAME and keys of it, such as data.root=DIR; else the run's own")
    which = "last (default), or best: of the best validation accuracy"
    parser.add_argument("--checkpoint", default="last", choices=("last", "best"), help=which)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_intermixed_args()
    with cli.refusing():
        found = evaluate(given.run, given.data, given.checkpoint)
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def command() -> int:
    """Run the command line; return its exit code."""
    return cli.run(main, CONF)
