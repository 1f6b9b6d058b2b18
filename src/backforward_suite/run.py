"""One run: a training, or a study."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from backforward_suite.config import Request
from backforward_suite.runs import files, names


def run(request: Request, folder: Path | None = None) -> files.Result:
    """Do what was asked for.

    Torch and Lightning are imported here: they take seconds, which a finished run or a mistyped key spares.

    Args:
        request: What was asked for.
        folder: Where curves and checkpoints go, and where a half-done run goes on; None writes nothing.

    Returns:
        The content of `result.json`: status, final and best metrics, settings, origin, timing.

    Raises:
        BadInput: Something asked for cannot be had.
    """
    if request.settings.study is not None:
        from backforward_suite.studies.conduct import study

        return study(request, folder)
    from backforward_suite.train.fit import train

    return train(request, folder)


def train(cfg: DictConfig, folder: Path | None = None) -> files.Result:
    """The same for a config composed from `conf/train.yaml`."""
    return run(names.request_of(cfg), folder)
