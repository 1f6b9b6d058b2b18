"""Every instant of a command: it is killed there, or an operation fails there; then the same command succeeds."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.helpers.faults.injection import ACTS
from tests.helpers.faults.trials import Ended, Tally, difference, left, refused, reported, trained
from tests.helpers.pages import findings
from tests.helpers.synthetic import write_run

from backforward_suite.report import page

RUN = ("data=digits", "model.hidden=4", "batch_size=256", "max_epochs=2", "trainer.accelerator=cpu",
       "trainer.log_every_n_steps=2")  # fmt: skip
SWEEP = ("-m", "seed=0,1", "hydra.launcher.slots=1", *RUN)
MOST = 4  # operations of a kind that are made to fail; all are killed at


@dataclass(frozen=True)
class Target:
    """A command in which each operation goes wrong.

    Attributes:
        kind: Its name in the tally.
        call: Runs it: `call(folder, *arguments, inject=(act, at))`.
        arguments: Its command line.
        left: What it leaves below a folder, by name; equal however often it was interrupted.
        prepare: Fills the folder before the command.
    """

    kind: str
    call: Callable[..., Ended]
    arguments: tuple[str, ...]
    left: Callable[[Path], dict[str, Any]]
    prepare: Callable[[Path], None] = lambda _: None


def runs_below(cwd: Path) -> dict[str, Any]:
    """The parts of each finished run below a folder."""
    return {
        f"{path.parent.name}: {part}": content
        for path in cwd.rglob("result.json")
        for part, content in left(path.parent).items()
    }


def files_below(name: str) -> Callable[[Path], dict[str, Any]]:
    """The bytes of each file in a folder of that name."""
    return lambda cwd: {
        str(path.relative_to(cwd)): path.read_bytes() for path in (cwd / name).rglob("*") if path.is_file()
    }


def targets() -> list[Target]:
    """A run, a sweep's own process, and the commands that write reports."""
    examined = [one for one in findings(Path("outputs")) if not one.fault]
    renamed = tuple(
        replace(one, figure=replace(one.figure, name=f"{one.figure.name}_before")) for one in examined[0].drawn
    )
    page.examine_all = lambda *_: examined  # type: ignore[assignment]  # drawing takes seconds, and writes nothing

    def with_a_report(cwd: Path) -> None:
        page.write([replace(examined[0], drawn=renamed)], cwd / "outputs" / "report", "small")

    def with_runs(cwd: Path) -> None:
        for seed in range(2):
            write_run(cwd / "outputs", "bfp_depth", seed=seed)

    return [
        Target("a run", trained, RUN, runs_below),
        Target("a sweep's parent", trained, SWEEP, runs_below),
        Target("a report", reported, ("page", "--scale", "small"), files_below("outputs/report"), with_a_report),
        Target("keep", reported, ("keep", "--scale", "small"), files_below("outputs/reference"), with_runs),
    ]


def every_instant(scratch: Path, target: Target, tally: Tally, stride: int = 1) -> None:
    """Let each operation of a command go wrong in each way; then give the command again.

    Args:
        scratch: An empty folder.
        target: The command.
        tally: Where to note the outcomes.
        stride: Try each so many-th instant.
    """
    cwd = scratch / "faulty"

    def fresh() -> None:
        shutil.rmtree(cwd, ignore_errors=True)
        cwd.mkdir()
        target.prepare(cwd)

    fresh()
    undisturbed = target.call(cwd, *target.arguments)
    assert undisturbed.code == 0, undisturbed.out
    expected = target.left(cwd)
    tried, seen = 0, Counter[str]()
    for at, name in enumerate(undisturbed.operations, start=1):
        seen[kind_of(name)] += 1
        for act in ACTS:
            # TensorBoard writes each point separately, so faults other than kills are tried at the first few of a kind.
            if (act == "tear" and not name.startswith("write")) or (act != "kill" and seen[kind_of(name)] > MOST):
                continue
            tried += 1
            if tried % stride:
                continue
            fresh()
            ended = target.call(cwd, *target.arguments, inject=(act, at))
            problem = "" if ended.code in (0, -9) or refused(ended) else f"exit code {ended.code}"
            if ended.code == 0:  # it succeeded all the same, so everything must be right already
                problem = difference(target.left, cwd, expected)
            again = target.call(cwd, *target.arguments)
            if not problem:
                problem = f"again: {again.out}" if again.code else difference(target.left, cwd, expected)
            what = f"{at} ({name}): {ended.out[-300:] if problem else ''}"
            tally.note(f"{target.kind}: {act}", what, ended if "Traceback" in ended.out else again, problem)


def kind_of(operation: str) -> str:
    """An operation without the random or counted part of its file's name."""
    return re.sub(r"\.\w{8}\.tmp$|(?<=tfevents).*", "", operation)
