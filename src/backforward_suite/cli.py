"""Common to all commands: bad input gives one line and an exit code instead of a traceback.

BACKFORWARD_TRACEBACKS=1 (or Hydra's HYDRA_FULL_ERROR=1) shows tracebacks.
"""

from __future__ import annotations

import codecs
import faulthandler
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
BAD_INPUT = 2
BUSY = 75  # another process trains this run: try later (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C (128 + SIGINT)
STOPPED = 143  # SIGTERM, as from Slurm (128 + SIGTERM)


class RunsFailed(Exception):
    """Some runs of a sweep failed; their causes have been printed already."""


class _Carried(BaseException):
    """Carries an error past Hydra, which prints lines of its own about an `Exception`."""


@contextmanager
def past_hydra() -> Iterator[None]:
    """Pass the errors of a single run to `run`; in a sweep, Hydra's launchers need to see them."""
    try:
        yield
    except Exception as error:
        if HydraConfig.get().mode == RunMode.RUN:
            raise _Carried from error
        raise


def run(main: Callable[[], Any], conf: Path) -> int:
    """Call a command; print its errors and return an exit code.

    Args:
        main: The command.
        conf: The folder of configs, to name the choices of a group.
    """
    with suppress(io.UnsupportedOperation):  # a stream without a file, as in a notebook
        faulthandler.enable()  # a crash in native code, such as SIGBUS, prints where it happened
    _replace_unencodable()
    # With HYDRA_FULL_ERROR, Hydra raises instead of printing and exiting. The runs of a sweep inherit both variables.
    tracebacks = os.environ.setdefault("BACKFORWARD_TRACEBACKS", os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        try:
            main()
        except _Carried as carried:
            assert carried.__cause__ is not None
            raise carried.__cause__ from None
    except KeyboardInterrupt:
        return _say("interrupted; the same command resumes", INTERRUPTED)
    except Stopped:
        return _say("stopped by SIGTERM; the same command resumes from the last checkpoint", STOPPED)
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


def _replace_unencodable() -> None:
    """Replace characters that a terminal or file cannot encode by plain ones."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end

    codecs.register_error("backforward-plain", plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backforward-plain")


@contextmanager
def refusing() -> Iterator[None]:
    """Turn the errors that constructors raise about their arguments into `BadInput`, which is printed as one line."""
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
    """After a single run of an experiment that lists a sweep, mention `-m`."""
    hydra = HydraConfig.get()
    # Launchers start single runs as well, with a folder.
    by_hand = hydra.mode == RunMode.RUN and not any(key.startswith("hydra.run.dir=") for key in hydra.overrides.hydra)
    lists = any(hydra.sweeper.get(key) for key in ("params", "grids"))
    if by_hand and lists and hydra.runtime.choices.get("experiment"):
        print("This was one run; with -m, the experiment's sweep")


def show(result: Mapping[str, Any], folder: Path) -> None:
    """Print a run's result as a short table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    def number(value: float | None, form: str) -> str:
        return "infinite" if value is None else format(value, form)

    final, timing = result["final"], result["timing"]
    last = f"{timing['seconds']:.1f} s"
    if result["settings"].get("study"):
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        for name, value in final.items():
            table.add_row(name, number(value, ".5g"))
    else:
        table = Table("", *(Column(split, justify="right") for split in ("train", "validation", "test")))
        for metric, form in (("loss", ".4f"), ("accuracy", ".2%")):
            values = [final.get(f"{metric}/{split}") for split in ("train", "validation", "test")]
            table.add_row(metric, *("-" if value is None else format(value, form) for value in values))
        speed = timing["samples_per_second"]
        last = f"epoch {final['epoch']}, weight norm {number(final['weight_norm/total'], '.2f')}, {last}" + (
            f", {speed:,.0f} samples/s" if speed else ""
        )
    console = Console()
    console.print(f"[bold]{escape(folder.name)}[/]: {result['status']}", highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"{last}\nin {escape(str(folder))}", highlight=False, soft_wrap=True)


def _say(line: str, code: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    return code
