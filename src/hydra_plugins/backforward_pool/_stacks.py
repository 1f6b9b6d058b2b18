"""Which runs of a sweep can be trained as one stack, and what their common process does."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from backforward import cli, runs
from backforward.errors import BadInput, Busy
from backforward.files import whole
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
        "engine=shortcut": "shortcut" in given.values(),
        "an order drawn for each batch is of a single network": settings.draws_anew,
        f"{settings.method.target} looks at a single network": "study_rules" in str(settings.method.target),
        "stop_loss and patience end a single training": settings.stop_loss is not None or settings.patience is not None,
        f"{settings.model.target} is no MLP": settings.model.target != "backforward.models.MLP",
        "norm=batch has running statistics": settings.norm.kind == "batch",
        "data_norm=batch has running statistics": settings.data_norm == "batch",
        "each network draws its own dropout": bool(of_model.get("dropout")),
        "PReLU has weights of its own": of_model.get("activation") == "prelu",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@dataclass(frozen=True)
class CutOff:
    """A stack that was cut off.

    Attributes:
        checkpoint: Where it goes on.
        keys: Of its runs that are not done.
        step: How far it is.
    """

    checkpoint: Path
    keys: frozenset[str]
    step: int


def cut_off(roots: Iterable[Path], note: Callable[[str], object]) -> list[CutOff]:
    """Look for stacks that were cut off; delete the checkpoints that nobody needs any more.

    Args:
        roots: The sweeps' folders.
        note: Told which checkpoints are damaged.

    Returns:
        The furthest first.
    """
    found = []
    for root in roots:
        paths = list(root.glob(".stack-*.ckpt"))
        if not paths:
            continue
        from backforward.stack_fitting import progress_of  # imports Lightning

        done = runs.done_below(root).keys()
        for path in paths:
            try:
                keys, step = progress_of(path)
            except FileNotFoundError:  # another sweep's, which has ended
                continue
            except BadInput:
                note(f"{path} is damaged: its runs begin anew")
                path.unlink(missing_ok=True)
                continue
            if keys <= done:
                path.unlink(missing_ok=True)
            else:
                found.append(CutOff(path, keys - done, step))
    return sorted(found, key=lambda stack: (stack.step, len(stack.keys)), reverse=True)


def loads_of(
    pending: Sequence[Job], size: int, slots: int, cut: Sequence[CutOff] = ()
) -> tuple[list[Load], dict[str, int]]:
    """Share out jobs among processes.

    Args:
        pending: Those to do.
        size: Runs in a stack at most.
        slots: Processes at a time; runs alike are shared out among them all.
        cut: Stacks that go on as far as their runs are asked for, whatever they would be stacked with today.

    Returns:
        The loads, stacks first; and by reason, how many runs are trained alone.
    """
    alike: dict[str, list[Job]] = defaultdict(list)
    alone: dict[str, int] = defaultdict(int)
    singles, stackable = [], []
    for job in pending:
        reason = why_alone(Settings.check(job.cfg))
        if reason is None:
            stackable.append(job)
        else:
            alone[reason] += 1
            singles.append(job)
    stacks = []
    for stack in cut:
        todo = [job for job in stackable if _key(job) in stack.keys]
        stackable = [job for job in stackable if job not in todo]
        count = math.ceil(len(todo) / size)
        for place in range(count):
            share = tuple(todo[place::count])
            stacks.append(Load(share, _going_on(stack, share)))
    for job in stackable:
        rest = {key: value for key, value in flatten(plain(job.cfg)) if key not in OWN}
        alike[json.dumps(rest, sort_keys=True)].append(job)
    for group in alike.values():
        count = max(math.ceil(len(group) / size), min(slots, len(group) // 2), 1)
        for place in range(count):
            share = tuple(group[place::count])
            if len(share) > 1:
                stacks.append(Load(share, _checkpoint(share)))
            else:
                singles += share
    return stacks + [Load((job,)) for job in singles], dict(alone)


def _key(job: Job) -> str:
    """As `Member.key`."""
    return fingerprint(plain(job.cfg))


def _checkpoint(jobs: Sequence[Job]) -> Path:
    members = json.dumps(sorted(_key(job) for job in jobs))
    return jobs[0].folder.parent / f".stack-{hashlib.sha256(members.encode()).hexdigest()[:16]}.ckpt"


def _going_on(stack: CutOff, jobs: Sequence[Job]) -> Path:
    """The checkpoint from which some runs of a stack go on: a copy, if others of it are still to need theirs."""
    if stack.keys == {_key(job) for job in jobs}:
        return stack.checkpoint
    path = _checkpoint(jobs)
    with whole(path, "wb") as copy, stack.checkpoint.open("rb") as source:
        shutil.copyfileobj(source, copy)
    return path


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
