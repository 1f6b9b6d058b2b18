"""The command line's manners: one line for bad input, an exit code, no traceback.

Set BACKFORWARD_TRACEBACKS=1 (or Hydra's HYDRA_FULL_ERROR=1) to see tracebacks all the same.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from backforward_suite.errors import BadInput, Busy, Stopped

# Exit codes.
FAILED = 1  # runs failed
BAD_INPUT = 2  # what was asked for cannot be done
BUSY = 75  # another process trains this run: try later (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C (128 + SIGINT)
STOPPED = 143  # told to end, as by Slurm: what was running has a checkpoint (128 + SIGTERM)


class RunsFailed(Exception):
    """Some runs of a sweep failed; their causes have been shown already."""


class _Carried(BaseException):
    """Carries an error past Hydra, which would print lines of its own about an Exception."""


@contextmanager
def past_hydra() -> Iterator[None]:
    """Let the errors of a single run reach `run` as they are; in a sweep, Hydra's launchers must see them."""
    try:
        yield
    except Exception as error:
        if HydraConfig.get().mode == RunMode.RUN:
            raise _Carried from error
        raise


def run(main: Callable[[], Any], conf: Path) -> int:
    """Call Hydra's main; return an exit code instead of raising.

    Args:
        main: The function that `@hydra.main` made.
        conf: The folder of configs, to name the choices of a group.
    """
    # Hydra would print errors of its own and exit; we want to see them here. The runs of a sweep inherit both.
    tracebacks = os.environ.setdefault("BACKFORWARD_TRACEBACKS", os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        try:
            main()
        except _Carried as carried:
            assert carried.__cause__ is not None
            raise carried.__cause__ from None
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on from here", INTERRUPTED)
    except Stopped:
        return _say("stopped by SIGTERM; the same command goes on from the last checkpoint", STOPPED)
    except RunsFailed as error:
        return _say(str(error), FAILED)
    except Exception as error:
        if tracebacks:
            raise
        line = explain(error, conf, sys.argv[1:])
        if line is None:
            raise
        return _say(line, BUSY if any(isinstance(cause, Busy) for cause in _causes(error)) else BAD_INPUT)
    return 0


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what a constructor says of its arguments into `BadInput`, so that it is shown as one line."""
    try:
        yield
    except BadInput:
        raise
    except InstantiationException as error:
        cause = error.__cause__ or error
        text = str(cause if not isinstance(cause, OmegaConfBaseException) else error)
        raise BadInput(_one_line(text)) from error
    except (ValueError, TypeError, ArithmeticError, NotImplementedError) as error:
        raise BadInput(_one_line(str(error))) from error


def explain(error: BaseException, conf: Path, overrides: Sequence[str]) -> str | None:
    """What to tell a user in one line, or None if this is no error of theirs."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, BadInput):
            return _one_line(str(cause))
    if isinstance(error, ValueError) and str(error).startswith("Only one of --run, --multirun, --cfg"):
        return _one_line(str(error))  # Hydra's own
    if isinstance(error, OmegaConfBaseException | HydraException):  # some of Hydra's are an OSError as well
        return _config_error(error, [str(cause) for cause in chain], conf, overrides)
    return next((_os_error(cause) for cause in chain if isinstance(cause, OSError)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()  # a chain may lead back to itself
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full; free some space and give the same command again: finished runs are kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}may not be written here ({error.strerror}); change its rights or work in another folder"
    if error.errno == errno.EFBIG:
        return f"{where}no file may grow so large here; raise the limit (ulimit -f)"
    return f"{where}{error.strerror or error}"


def _config_error(error: Exception, chain: list[str], conf: Path, overrides: Sequence[str]) -> str:
    text, everything = str(error), "\n".join(chain)
    if found := re.search(
        r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':((?:\n\t\S+)+)", everything
    ):
        group, choice, there = found.group(1), found.group(2), found.group(3).split()
        if (group, choice) == ("hydra/sweeper", "optuna"):
            return "hydra/sweeper=optuna: it is not installed; pip install -e '.[optuna]'"
        return f"{group}={choice}: no such {group}; there are {', '.join(there)}{_close(choice, there)}"
    if found := re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", everything):
        full_key = found.group(2)
        folder, _, leaf = full_key.rpartition(".")
        keys = _keys(conf, folder, overrides)
        there = f"; there are {', '.join(keys)}{_close(leaf, keys)}" if keys else ""
        return f"{full_key}: no such key{there}"
    if found := re.search(r"Could not override '([^']+)'", everything):
        groups = sorted(path.name for path in conf.iterdir() if path.is_dir())
        return f"{found.group(1)}: no such key or group; groups are {', '.join(groups)}{_close(found.group(1), groups)}"
    if isinstance(error, OverrideParseException):
        return f"{' '.join(overrides)}: {_one_line(text)}"
    return _one_line(text)


def _keys(conf: Path, folder: str, overrides: Sequence[str]) -> list[str]:
    """The keys of `conf/train.yaml`, or those of the choice made (else any choice) of a group."""
    from omegaconf import DictConfig, OmegaConf

    if folder:
        chosen = [text.partition("=")[2].split(",")[0] for text in overrides if text.startswith(f"{folder}=")]
        defaults = OmegaConf.load(conf / "train.yaml").defaults
        by_default = [entry[folder] for entry in defaults if isinstance(entry, DictConfig) and folder in entry]
        files = [conf / folder / f"{choice}.yaml" for choice in chosen + by_default]
        files += sorted((conf / folder).glob("*.yaml"))
        file = next((path for path in files if path.is_file()), None)
    else:
        file = conf / "train.yaml"
    if file is None:
        return []
    loaded = OmegaConf.load(file)
    assert isinstance(loaded, DictConfig)
    loaded = loaded.get(folder, loaded)  # a group's file may set other keys as well, its own under its name
    if loaded is None:  # a choice without keys, as study=none
        return []
    keys = [str(key) for key in loaded if key not in ("defaults", "hydra")]
    if not folder:
        keys += sorted(path.name for path in conf.iterdir() if path.is_dir() and path.name != "hydra")
    return keys


def _close(word: str, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or "unknown error"


def hint_at_sweep() -> None:
    """After a run that a user gave by hand: say so if its experiment lists a sweep, and `-m` was left out."""
    hydra = HydraConfig.get()
    # Launchers, too, give each run as a single one; they say where it lies.
    by_hand = hydra.mode == RunMode.RUN and not any(key.startswith("hydra.run.dir=") for key in hydra.overrides.hydra)
    lists = any(hydra.sweeper.get(key) for key in ("params", "grids"))
    if by_hand and lists and hydra.runtime.choices.get("experiment"):
        print("This was one run; with -m, the experiment's sweep")


def show(result: Mapping[str, Any], folder: Path) -> None:
    """Print a run's result as a short table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if result["settings"].get("study"):
        _show_study(result, folder)
        return
    final, timing = result["final"], result["timing"]
    table = Table()
    table.add_column("")
    for split in ("train", "validation", "test"):
        table.add_column(split, justify="right")
    for label, metric, form in (("loss", "loss", "{:.4f}"), ("accuracy", "accuracy", "{:.2%}")):
        values = [final.get(f"{metric}/{split}") for split in ("train", "validation", "test")]
        table.add_row(label, *("-" if value is None else form.format(value) for value in values))
    console = Console()
    console.print(f"[bold]{escape(folder.name)}[/]: {result['status']}", highlight=False, soft_wrap=True)
    console.print(table)
    speed, norm = timing["samples_per_second"], final["weight_norm/total"]
    console.print(
        f"epoch {final['epoch']}, weight norm {'infinite' if norm is None else f'{norm:.2f}'}, "
        f"{timing['seconds']:.1f} s" + (f", {speed:,.0f} samples/s" if speed else "") + f"\nin {escape(str(folder))}",
        highlight=False,
        soft_wrap=True,
    )


def _show_study(result: Mapping[str, Any], folder: Path) -> None:
    """Print a study's headline numbers."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, value in result["final"].items():
        table.add_row(name, "infinite" if value is None else f"{value:.5g}")
    console = Console()
    console.print(f"[bold]{escape(folder.name)}[/]: {result['status']}", highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"{result['timing']['seconds']:.1f} s\nin {escape(str(folder))}", highlight=False, soft_wrap=True)


def _say(line: str, code: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    return code
