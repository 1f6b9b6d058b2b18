"""Every instant of a run, and of a sweep's parent: killed there, or failing there, the same command makes it right."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers.faults.injection import ACTS
from tests.helpers.faults.trials import Tally, difference, left, refused, trained

RUN = ("data=digits", "model.hidden=4", "batch_size=256", "max_epochs=2", "trainer.accelerator=cpu",
       "trainer.log_every_n_steps=2")  # fmt: skip
SWEEP = ("-m", "seed=0,1", "hydra.launcher.slots=1", *RUN)


MOST = 4  # failing operations of a kind that are tried


def kind_of(operation: str) -> str:
    """An operation without what is drawn or counted in its file's name."""
    return re.sub(r"\.\w{8}\.tmp$|(?<=tfevents).*", "", operation)


def undisturbed(scratch: Path, arguments: Sequence[str]) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """What each run of a command leaves, by its folder's name, and the operations of the process given the command."""
    cwd = scratch / "undisturbed"
    cwd.mkdir()
    ended = trained(cwd, *arguments)
    assert ended.code == 0, ended.out
    found = {path.parent.name: left(path.parent) for path in cwd.rglob("result.json")}
    shutil.rmtree(cwd)
    return found, ended.operations


def every_instant(scratch: Path, arguments: Sequence[str], kind: str, tally: Tally, stride: int = 1) -> None:
    """Let each operation of a command go wrong in each way; then give the command again.

    Args:
        scratch: An empty folder.
        arguments: The command line of `train.py`.
        kind: What to call it.
        tally: What is noted.
        stride: Try each so many-th instant.
    """
    expected, operations = undisturbed(scratch, arguments)
    tried, seen = 0, Counter[str]()
    for at, name in enumerate(operations, start=1):
        seen[kind_of(name)] += 1
        for act in ACTS:
            # Killed at every instant; the other faults at the first few of a kind: TensorBoard writes each point alone.
            if (act == "tear" and not name.startswith("write")) or (act != "kill" and seen[kind_of(name)] > MOST):
                continue
            tried += 1
            if tried % stride:
                continue
            cwd = scratch / "faulty"
            cwd.mkdir()
            ended = trained(cwd, *arguments, inject=(act, at))
            problem = "" if ended.code in (0, -9) or refused(ended) else f"exit code {ended.code}"
            if ended.code == 0:  # it did without: then all must be right already
                problem = compared(cwd, expected)
            again = trained(cwd, *arguments)
            problem = problem or (f"again: exit code {again.code}" if again.code else compared(cwd, expected))
            said = ended if "Traceback" in ended.out else again
            tally.note(f"{kind}: {act}", f"{at} ({name}): {ended.out[-300:] if problem else ''}", said, problem)
            shutil.rmtree(cwd)


def compared(cwd: Path, expected: dict[str, dict[str, Any]]) -> str:
    """What differs below a folder from what an undisturbed command leaves."""
    found = {path.parent.name: path.parent for path in cwd.rglob("result.json")}
    if found.keys() != expected.keys():
        return f"runs {sorted(found)}"
    return "; ".join(filter(None, (difference(found[name], expected[name]) for name in expected)))
