"""Optimizers that make a run fail in various ways, otherwise plain SGD."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch


def is_trial(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is the small copy with which a rule tests an optimizer."""
    return all(p.numel() < 32 for group in optimizer.param_groups for p in group["params"])


class Raises(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        if is_trial(self):
            return super().step(closure)
        raise RuntimeError("the first step was the last")


def folder() -> Path:
    """The folder of this process's run."""
    return next(Path(word.partition("=")[2].strip("'")) for word in sys.argv if word.startswith("hydra.run.dir="))


class RaisesOnce(torch.optim.SGD):
    """Raises the first time in a folder, and not again."""

    def step(self, closure: Any = None) -> Any:
        if not is_trial(self) and not (folder() / "tried").exists():
            (folder() / "tried").touch()
            raise RuntimeError("this time it goes wrong")
        return super().step(closure)


class IsSlowAtFirst(torch.optim.SGD):
    """Slow until the run resumes from a checkpoint, if SLOW_AT_FIRST is set."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.is_slow = "SLOW_AT_FIRST" in os.environ and not (folder() / "last.ckpt").exists()

    def step(self, closure: Any = None) -> Any:
        time.sleep(0.1 * self.is_slow)
        return super().step(closure)


class IsKilled(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class RunsOutOfMemory(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
        torch.ones(2**30)


class Diverges(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("inf"))
        return super().step(closure)


class Hangs(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        time.sleep(10_000)


class IsHalted(torch.optim.SGD):
    """Stops the whole process, so that none of its threads can end it."""

    def step(self, closure: Any = None) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
