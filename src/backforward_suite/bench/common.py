"""What several benchmarks need: a training run, a choice of data, and a description of the machine."""

from __future__ import annotations

import os
import platform
import tempfile
from contextlib import redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from backforward_suite.hardware import cpu_count, cpu_model

CONF = Path(__file__).resolve().parents[3] / "conf"
SIZES = {"mnist": 28, "cifar10": 32}  # height and width to which digits are enlarged where the data set is missing

Row = dict[str, Any]


def train(overrides: list[str]) -> dict[str, Any]:
    """Train once in a temporary folder, with the progress bar drawn out of sight; return the run's result."""
    from hydra import compose, initialize_config_dir

    from backforward_suite.run import train as train_composed

    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), tempfile.TemporaryDirectory() as folder:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=overrides)
        return train_composed(cfg, Path(folder))


def available(data: str, root: Path) -> bool:
    """Return whether the folder of data sets has this one."""
    return (root / f"{data}.npz").is_file()


def data_overrides(data: str, root: Path) -> list[str]:
    """Choose a data set, or enlarged digits where it is missing."""
    if available(data, root):
        return [f"data={data}", f"data.root={root}"]
    return ["data=digits", f"data.size={SIZES[data]}"]


def machine() -> Row:
    """Describe where and when the numbers are measured."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_model(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [{"name": gpu.name, "gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
