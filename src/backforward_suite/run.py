"""One run: a training, or a study."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from backforward_suite.config import Request
from backforward_suite.runs import files, names


def run(request: Request, folder: Path | None = None) -> files.Result:
    """Conduct a training or a study.

    Imports torch and Lightning only now: they take seconds, which a finished run or a mistyped key does not need.

    Args:
        request: The run's settings.
        folder: The folder of curves and checkpoints, where a half-done run resumes; None writes nothing.

    Returns:
        The content of `result.json`: status, final and best metrics, settings, origin, timing.

    Raises:
        BadInput: The settings cannot be met.
    """
    if request.settings.study is not None:
        from backforward_suite.studies.conduct import study

        return study(request, folder)
    from backforward_suite.train.fit import train

    return train(request, folder)


def train(cfg: DictConfig, folder: Path | None = None) -> files.Result:
    """Do the same for a config composed from `conf/train.yaml`."""
    return run(names.request_of(cfg), folder)
