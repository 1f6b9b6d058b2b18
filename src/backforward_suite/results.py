"""The content of `result.json`: a run's outcome, its request, and where it ran. Shared by training and studies."""

from __future__ import annotations

import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from backforward_suite.config import Request, Settings
from backforward_suite.data import DataSplits
from backforward_suite.hardware import cpu_model
from backforward_suite.runs.files import Result


def assembled(
    found: Mapping[str, Any],
    request: Request,
    data: DataSplits,
    device: torch.device,
    timing: Mapping[str, Any],
    own: Mapping[str, str],
    *,
    devices: int = 1,
) -> Result:
    """Assemble a result.

    Args:
        found: The outcome: `status`, `final` and further keys; numbers that are not finite become None.
        request: What was asked for.
        data: The data set.
        device: The device of this process.
        timing: Measured times; peak memory and the date are added.
        own: SHA-256 of the user's modules when the run started.
        devices: Number of devices.
    """
    return {
        **{key: _finite(value) if isinstance(value, dict) else value for key, value in found.items()},
        "choices": request.choices,
        "settings": request.values,
        "settings_hash": request.hash,
        "data": _origin(data),
        "code": _code(own),
        "hardware": _hardware(device, devices),
        "timing": {
            **timing,
            "peak_memory_bytes": _peak_memory(),
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            # These depend on the slot of a sweep that the run was last resumed in.
            "threads": torch.get_num_threads(),
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        },
    }


def shows_progress(settings: Settings) -> bool:
    """Whether to draw a progress bar; by default, if standard error is a terminal."""
    bar = settings.trainer.progress_bar
    return sys.stderr.isatty() if bar == "auto" else bar


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace numbers that JSON cannot express by None."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _origin(data: DataSplits) -> dict[str, Any]:
    sizes = {"train": len(data.train.y), "validation": len(data.validation.y), "test": len(data.test.y)}
    return {
        "name": data.name,
        "shape": list(data.shape),
        "classes": data.classes,
        **sizes,
        "sha256": data.fingerprint,
        **({"files": data.files} if data.files else {}),
    }


def _code(own: Mapping[str, str]) -> dict[str, Any]:
    packages = ("torchvision", "lightning", "hydra-core", "numpy")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
        **({"own": dict(own)} if own else {}),
    }


def _commit() -> str | None:
    """The commit of this source, with `+changes` if the working tree differs; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout  # noqa: S603, S607
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")


def _hardware(device: torch.device, devices: int) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "devices": devices,
        "system": platform.platform(),
    }


def _peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
