"""Run commands in forks of this process, which has imported what they need; compare what they leave."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.helpers.commands import TRAIN
from tests.helpers.faults.injection import Injector, install
from tests.helpers.sweeps import left_by

from backforward_suite import cli
from backforward_suite.commands import report, train
from backforward_suite.sweep import pool

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of purged points, which are intended

LIMIT = 300.0  # seconds for a command


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code (minus a signal's number), what it printed, its operations."""

    code: int
    out: str
    operations: tuple[str, ...] = ()


@dataclass
class Tally:
    """Counts of the faults tried, and those that were not handled.

    Attributes:
        tried: Number of faults, by kind.
        wrong: A line for each fault that left something silently wrong, or a command stuck.
        tracebacks: The output of each command that ended in a traceback.
    """

    tried: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)

    def note(self, kind: str, what: str, ended: Ended, problem: str = "") -> None:
        """Note a trial."""
        self.tried[kind] += 1
        if "Traceback" in ended.out:
            self.tracebacks.append(f"{kind}: {what}: {ended.out[-2000:]}")
        if problem:
            self.wrong.append(f"{kind}: {what}: {problem}")


def call(cwd: Path, call_of: Callable[[], int], *arguments: str, inject: tuple[str, int] | None = None) -> Ended:
    """Run a command in a fork of this process.

    Args:
        cwd: The folder to run in.
        call_of: The command.
        arguments: Its command line.
        inject: The fault, and the number of the operation below `cwd` at which it happens.
    """
    out, operations = cwd.parent / f"{cwd.name}.out", cwd.parent / f"{cwd.name}.operations"
    pid = os.fork()
    if pid == 0:
        _child(cwd, call_of, arguments, inject, out, operations)
    code = _waited(pid)
    names = operations.read_text().splitlines() if operations.exists() else []
    operations.unlink(missing_ok=True)
    return Ended(code, out.read_text(errors="replace"), tuple(names))


def _child(
    cwd: Path,
    call_of: Callable[[], int],
    arguments: Sequence[str],
    inject: tuple[str, int] | None,
    out: Path,
    operations: Path,
) -> None:
    code = 99
    try:
        os.setsid()
        os.chdir(cwd)
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = [str(TRAIN), *arguments]
        os.environ |= {"HYDRA_FULL_ERROR": "0", "BACKFORWARD_TRACEBACKS": "0", "COLUMNS": "200"}
        # Fork the runs of a sweep from here, so that they need not import everything again.
        os.register_at_fork(after_in_child=GlobalHydra.instance().clear)
        pool._forkserver = lambda threads: nullcontext(multiprocessing.get_context("fork"))  # type: ignore[assignment]
        injector = Injector(cwd, *(inject or ()))
        install(injector)
        code = call_of()
        operations.write_text("\n".join(injector.names))
    except BaseException:  # as the interpreter would do
        traceback.print_exc()
        code = 1
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _waited(pid: int) -> int:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # runs of a killed sweep
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a command took more than {LIMIT} seconds")


def trained(cwd: Path, *arguments: str, inject: tuple[str, int] | None = None) -> Ended:
    """`python src/train.py <arguments>`."""
    return call(cwd, train.command, *arguments, inject=inject)


def reported(cwd: Path, *arguments: str, inject: tuple[str, int] | None = None) -> Ended:
    """`python src/report.py <arguments>`."""
    return call(cwd, report.command, *arguments, inject=inject)


def left(folder: Path) -> dict[str, Any]:
    """What a finished run leaves: result, tables, weights, points of its curves."""
    found = left_by(folder)
    for name in ("last.ckpt", "best.ckpt"):
        found[name] = {key: value.tolist() for key, value in found[name].items()}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found["curves"] = {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in sorted(events.Tags()["scalars"])
        if not tag.startswith("speed/")
    }
    return found


def difference(
    read: Callable[[Path], dict[str, Any]], folder: Path, expected: dict[str, Any], but: str | None = None
) -> str:
    """Name the parts, except one, in which a folder differs from what is expected, and half-written files."""
    try:
        found = read(folder)
    except Exception as error:  # reading a damaged file may raise anything
        return f"cannot be read: {error!r}"
    parts = [key for key in found.keys() | expected.keys() if repr(found.get(key)) != repr(expected.get(key))]
    torn = [path.name for path in folder.rglob("*.tmp")]
    return ", ".join([part for part in parts if part != but] + torn)


def refused(ended: Ended) -> bool:
    """Whether a command ended with an error in one line."""
    lines = [line for line in ended.out.splitlines() if line.startswith("error: ")]
    return ended.code in (cli.FAILED, cli.BAD_INPUT) and len(lines) == 1
