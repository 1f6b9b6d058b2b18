"""Which runs of a sweep can be trained as one stack, and what their common process does."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from backforward import cli, runs
from backforward.errors import Busy
from backforward.settings import Settings, fingerprint, flatten, plain
from hydra_plugins.backforward_pool._jobs import Job
from hydra_plugins.backforward_pool._pool import Load

OWN = ("seed", "lr", "optimizer.lr")  # what may differ within a stack


def why_alone(settings: Settings) -> str | None:
    """Why a run cannot be part of a stack; None if it can."""
    given: dict[str, Any] = dict(flatten(settings.model_dump()))
    of_model = settings.model.model_extra or {}
    reasons = {
        "a study is no training": settings.study is not None,
        f"trainer.devices={settings.trainer.devices}": settings.trainer.devices > 1,
        "timeout_min is of a single run": settings.timeout_min is not None,
        "diagnostics look at a single network": any(settings.diagnostics.when().values()),
        "bfloat16 rounds too much to be the same": settings.trainer.precision == "bf16-mixed",
        "max_grad_norm is of a single network": settings.max_grad_norm is not None,
        f"{settings.optimizer.target} is not SGD": settings.optimizer.target != "torch.optim.SGD",
        "trainer.capture=on records a single network's steps": settings.trainer.capture == "on",
        "engine=shortcut": "shortcut" in given.values(),
        f"{settings.model.target} is no MLP": settings.model.target != "backforward.models.MLP",
        "norm=batch has running statistics": settings.norm.kind == "batch",
        "data_norm=batch has running statistics": settings.data_norm == "batch",
        "each network draws its own dropout": bool(of_model.get("dropout")),
        "PReLU has weights of its own": of_model.get("activation") == "prelu",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def loads_of(jobs: Sequence[Job], pending: Sequence[Job], size: int, slots: int) -> tuple[list[Load], dict[str, int]]:
    """Share out jobs among processes.

    Args:
        jobs: All of the sweep: which of them stand together does not depend on what is done already, so that a stack
            that was cut off finds its checkpoint.
        pending: Those to do.
        size: Runs in a stack at most.
        slots: Processes at a time; runs alike are shared out among them all.

    Returns:
        The loads, stacks first; and by reason, how many runs are trained alone.
    """
    alike: dict[str, list[Job]] = defaultdict(list)
    alone: dict[str, int] = defaultdict(int)
    singles = []
    for job in jobs:
        reason = why_alone(Settings.check(job.cfg))
        if reason is None:
            rest = {key: value for key, value in flatten(plain(job.cfg)) if key not in OWN}
            alike[json.dumps(rest, sort_keys=True)].append(job)
        elif job in pending:
            alone[reason] += 1
            singles.append(job)
    stacks = []
    for group in alike.values():
        count = max(math.ceil(len(group) / size), min(slots, len(group) // 2), 1)
        for place in range(count):
            share = group[place::count]
            todo = tuple(job for job in share if job in pending)
            if len(todo) > 1:
                stacks.append(Load(todo, _checkpoint(share)))
            else:
                singles += todo
    return stacks + [Load((job,)) for job in singles], dict(alone)


def _checkpoint(jobs: Sequence[Job]) -> Path:
    members = json.dumps(sorted(fingerprint(plain(job.cfg)) for job in jobs))
    return jobs[0].folder.parent / f".stack-{hashlib.sha256(members.encode()).hexdigest()[:16]}.ckpt"


def train_together(together: Sequence[tuple[DictConfig, DictConfig, Path]], checkpoint: Path) -> None:
    """Train runs as one stack, each in its folder; one that another process has taken is left to it.

    Args:
        together: Of each run its config with Hydra's node, without it, and its folder.
        checkpoint: Where the stack goes on if it was cut off.

    Raises:
        Stopped: SIGTERM came; there is a checkpoint.
        Exception: The stack cannot be trained, or one of its runs cannot be built.
    """
    import backforward._torchvision  # noqa: F401  (before Lightning, which imports torchvision)
    from backforward.building import Parts
    from backforward.stack_fitting import Member, fit_stack

    runs.register_resolvers()
    members, data = [], None
    with ExitStack() as sittings:
        for composed, cfg, folder in together:
            HydraConfig.instance().set_config(composed)
            try:
                write = sittings.enter_context(runs.sitting(folder, cfg))
            except Busy:
                continue
            if runs.finished_result(folder, cfg) is not None:  # another sweep was quicker
                continue
            settings = Settings.check(cfg)
            with cli.refusing():
                parts = Parts(cfg, settings, data)
                module, loaders, arithmetic = parts.training()
            data = parts.data
            members.append(
                Member(settings, plain(cfg), runs.choices(), module, loaders, arithmetic, folder=folder, write=write)
            )
        fit_stack(members, checkpoint)
