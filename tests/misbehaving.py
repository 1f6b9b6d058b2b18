"""Optimizers that do to a run what can happen to one. Plain SGD with the same weights otherwise."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch


class Raises(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("the first step was the last")


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
    """Nothing in the process can end it: its threads stand still as well."""

    def step(self, closure: Any = None) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
