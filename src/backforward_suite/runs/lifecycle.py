"""The life of a run's folder: whether the run is done, which process trains it, how it ends."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from backforward_suite import processes
from backforward_suite.atomic import remove_half_written, whole
from backforward_suite.config import Request, differing, fingerprint, plain
from backforward_suite.errors import BadInput, Busy, Refused, cause_of
from backforward_suite.runs.files import (
    DONE,
    TABLES,
    WRITTEN,
    Result,
    read_plan,
    read_result,
    sums_of_tables,
    write_result,
)
from backforward_suite.runs.identity import changed
from backforward_suite.runs.locks import LOCK, locked

KEEP_BOTH = "give another name=... to keep both, or delete the folder to train it again"
LATE = 3.0  # seconds after timeout_min until a run that cannot end itself is ended from outside Python

_result_written = threading.Lock()  # locked to write a result, as a run may finish just when its time is over


def finished_result(folder: Path, request: Request) -> Result | None:
    """The result of a run that is done; None if it is not.

    Args:
        folder: The run's folder.
        request: What is asked for now.

    Raises:
        BadInput: The folder holds a finished run of other settings, data or source, or a damaged result.
    """
    result = read_result(folder)
    if result is None or result["status"] not in DONE:
        return None
    settings = result.get("settings", {})
    if result.get("settings_hash") != request.hash or fingerprint(settings) != request.hash:
        keys = differing(request.values, settings) or "its settings do not match their hash"
        commit = result.get("code", {}).get("commit")
        made = f" (made by commit {str(commit)[:9]})" if commit else ""
        raise Refused(f"{folder} holds a finished run of other settings{made}: {keys}; {KEEP_BOTH}")
    if what := changed(request, result):
        raise Refused(f"{folder} holds a finished run, and {what}; {KEEP_BOTH}")
    return result


def take_over(source: Path, folder: Path) -> None:
    """Copy a finished run's result, curves and config, but not its weights.

    The copied result names the trained run as `taken_over_from`.

    Args:
        source: The folder of the finished run.
        folder: The folder of a run of equal settings; it is left alone if that is done or being trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # If it is taken or damaged, the run itself will report that.
    with suppress(Timeout, BadInput), locked(folder):
        there, result = read_result(folder), read_result(source)
        if result is None or (there is not None and there["status"] in DONE):
            return
        (folder / ".hydra").mkdir(exist_ok=True)
        for path in [*(source / name for name in TABLES), *source.glob("events.out.*"), *source.glob(".hydra/*.yaml")]:
            if path.exists():
                with whole(folder / path.relative_to(source), "wb") as file:
                    file.write(path.read_bytes())
        # The result comes last: until then the run is not done.
        origin = result.get("taken_over_from") or f"{source.parent.name}/{source.name}"
        write_result(folder, {**result, "taken_over_from": origin})


@contextmanager
def claimed(folder: Path, request: Request) -> Iterator[Callable[[Result], Result]]:
    """Lock a run's folder while training in it.

    Yields:
        A function that writes the result and returns it. If an exception is raised instead, a result of status
        `failed` with its cause is written.

    Raises:
        Busy: Another process trains in this folder.
        BadInput: The folder is not a run's, or holds a half-done run of other settings. Nothing is written then.
    """
    rank = processes.rank(request.settings.trainer.devices)
    if rank > 0:  # the run's first process holds the lock
        with _ended_when_overdue(folder, request), _failing(folder, request, f"rank {rank}: "):
            yield lambda result: result
        return
    if request.settings.trainer.devices > 1:
        processes.take_others_along()
    refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            # A process that checks whether the folder is taken holds it for a moment.
            stack.enter_context(locked(folder, timeout=1))
        except Timeout:
            raise Busy(f"{folder}: another process is training this run; wait for it, or stop it") from None
        _refuse_half_done_of_others(folder, request)
        _forget_failure(folder)
        remove_half_written(folder, WRITTEN)
        _write_hydra(folder, request)
        with _ended_when_overdue(folder, request), _failing(folder, request):
            yield partial(_written, folder)


def refuse_foreign(folder: Path) -> None:
    """Raise BadInput if a path is anything but a new or empty folder or a run's, which contains a lock file."""
    if not folder.exists():
        if folder.is_symlink():
            raise BadInput(f"{folder} is a link that leads nowhere; remove it")
        return
    if not folder.is_dir():
        raise BadInput(f"{folder} is a file, but must be the folder of a run; move it away")
    names = {path.name for path in folder.iterdir()}
    if "sweep.json" in names:
        raise BadInput(f"{folder} is the folder of a sweep; a run needs one of its own, such as {folder / 'run'}")
    others = sorted(name for name in names - {"run.log"} if name == ".hydra" or not name.startswith("."))
    if others and LOCK not in names:
        raise BadInput(
            f"{folder} holds files that no run has left there ({', '.join(others[:3])}): it has no {LOCK}; "
            "give a new or empty folder"
        )


def _refuse_half_done_of_others(folder: Path, request: Request) -> None:
    """Raise BadInput if a folder holds the checkpoint of other settings, before its config is overwritten."""
    checkpoint = folder / "last.ckpt"
    if not checkpoint.exists():
        return
    try:
        loaded = OmegaConf.load(folder / ".hydra" / "config.yaml")
        found = plain(loaded) if isinstance(loaded, DictConfig) else None
    except (OSError, ValueError, YAMLError):  # the checkpoint holds its settings as well
        return
    if found is not None and fingerprint(found) != request.hash:
        raise Refused(f"{checkpoint} is of other settings: {differing(request.values, found)}; {KEEP_BOTH}")


def note_failure(folder: Path, request: Request, cause: str) -> None:
    """Write a result of status `failed` for a run that could not, unless it is being trained again."""
    with suppress(Timeout, OSError, BadInput), locked(folder):
        _write_failed(folder, request.values, cause)


def forget_failure(folder: Path) -> None:
    """Remove the result of an earlier failure, unless the run is being trained.

    Otherwise a run that is killed early would report the previous failure.
    """
    if not (folder / "result.json").exists():
        return
    with suppress(Timeout), locked(folder):
        _forget_failure(folder)


def _forget_failure(folder: Path) -> None:
    result = read_result(folder)
    if result is not None and result["status"] not in DONE:
        (folder / "result.json").unlink()


@contextmanager
def _failing(folder: Path, request: Request, who: str = "") -> Iterator[None]:
    """Write a result of status `failed` on an exception."""
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # on a full disk, the first error is the cause
            _write_failed(folder, request.values, who + cause_of(error))
        raise


def _write_failed(folder: Path, settings: dict[str, Any], cause: str) -> None:
    """Write a failure, unless another process of the run has: the others fail as a consequence."""
    if not (folder / "result.json").exists():
        write_result(folder, {"status": "failed", "cause": cause, "settings": settings})


@contextmanager
def _ended_when_overdue(folder: Path, request: Request) -> Iterator[None]:
    """End this process after `timeout_min`: write that cause as the result, and the threads' stacks to the log."""
    minutes = request.settings.timeout_min
    if minutes is None:
        yield
        return
    seconds, cause, settings = 60 * minutes, overdue(request), request.values

    def end() -> None:
        with _result_written:
            result = read_result(folder)
            if result is not None and result["status"] in DONE:  # just in time
                return
            with suppress(OSError):
                _write_failed(folder, settings, cause)
            faulthandler.dump_traceback()
            print(f"error: {cause}", file=sys.stderr, flush=True)
            os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    # Also ends a process that hangs in native code without releasing the interpreter's lock.
    faulthandler.dump_traceback_later(seconds + LATE, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def overdue(request: Request) -> str:
    """The cause of a run that was ended after `timeout_min`."""
    return f"ran longer than timeout_min={request.settings.timeout_min}"


def _written(folder: Path, result: Result) -> Result:
    with _result_written:
        write_result(folder, {**result, "files": sums_of_tables(folder)})
    return result


def _write_hydra(folder: Path, request: Request) -> None:
    """Write the composed config where Hydra's users look for it."""
    assert request.hydra is not None
    there = folder / ".hydra"
    there.mkdir(exist_ok=True)
    remove_half_written(there, [f"{name}.yaml" for name in ("config", "hydra", "overrides")])
    nodes = {"config": request.cfg, "hydra": {"hydra": request.hydra}, "overrides": request.hydra.overrides.task}
    for name, node in nodes.items():
        with whole(there / f"{name}.yaml") as file:
            file.write(OmegaConf.to_yaml(node))


def add_to_plan(root: Path, planned: Mapping[str, Sequence[str]]) -> None:
    """Add runs to the plan in a sweep's folder (`sweep.json`), which several commands may share.

    Args:
        root: The sweep's folder.
        planned: The overrides of each run, by name.
    """
    new = {name: list(overrides) for name, overrides in planned.items()}
    if not new.keys() - read_plan(root).keys():
        return
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / LOCK):  # two sweeps may start at once
        remove_half_written(root, ["sweep.json"])
        with whole(root / "sweep.json") as file:
            json.dump({"runs": read_plan(root) | new}, file, indent=2)
            file.write("\n")
