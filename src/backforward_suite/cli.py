"""The command line's manners: one line for bad input, an exit code, no traceback.

Set BACKFORWARD_TRACEBACKS=1 (or Hydra's HYDRA_FULL_ERROR=1) to see tracebacks all the same.
"""

from __future__ import annotations

import codecs
import faulthandler
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from backforward_suite.errors import BadInput, Busy, Stopped
from backforward_suite.explain import causes, explain, one_line

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
    faulthandler.enable()  # a crash in native code, such as SIGBUS, prints where it happened
    _write_whatever_the_encoding()
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
        return _say(line, BUSY if any(isinstance(cause, Busy) for cause in causes(error)) else BAD_INPUT)
    return 0


PLAIN = {"±": "+-", "…": "...", "—": "-", "–": "-", "×": "x", "━": "-", "╸": "-", "╺": "-", "─": "-"}


def _write_whatever_the_encoding() -> None:
    """Let a terminal or file that is not UTF-8 get plain characters instead of an error."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end

    codecs.register_error("backforward-plain", plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backforward-plain")


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
        raise BadInput(one_line(text)) from error
    except (ValueError, TypeError, ArithmeticError, NotImplementedError) as error:
        raise BadInput(one_line(str(error))) from error


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
