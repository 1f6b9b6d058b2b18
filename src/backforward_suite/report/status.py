"""The state of a sweep: which of its runs are finished, running, failed, stopped or missing."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from backforward_suite.errors import BadInput
from backforward_suite.runs import files, locks

LOG_LINES = 5  # of a failed run
LOGS = 3  # failed runs whose log is shown
STATES = ("finished", "diverged", "running", "stopped", "failed", "missing")


@dataclass(frozen=True)
class State:
    """The state of a run.

    Attributes:
        name: The run's name.
        state: One of `STATES`. `stopped`: it was killed or told to end, and can continue from its last checkpoint.
        epoch: The number of epochs in its metrics.
        note: Accuracy of a finished run, cause of a failed one.
        lines: The last lines of a failed run's log.
    """

    name: str
    state: str
    epoch: int
    note: str = ""
    lines: tuple[str, ...] = ()


def state_of(folder: Path) -> State:  # noqa: PLR0911
    """The state of a run by its folder, which need not exist."""
    epoch = files.epochs_done(folder)
    try:
        result = files.read_result(folder)
        files.read_metrics(folder)
    except BadInput as error:
        return State(folder.name, "failed", epoch, str(error))
    if result is not None and result["status"] in files.DONE:
        accuracy = files.objective(result)
        note = "" if accuracy is None else f"validation accuracy {accuracy:.2%}"
        return State(folder.name, result["status"], epoch, note)
    if locks.is_taken(folder):
        return State(folder.name, "running", epoch)
    lines = tuple(files.last_lines(folder / "run.log", LOG_LINES))
    if result is not None:
        return State(folder.name, "failed", epoch, str(result.get("cause", "")), lines)
    if (folder / "last.ckpt").exists():
        return State(folder.name, "stopped", epoch, "continues from its last checkpoint", lines[-1:])
    if (folder / locks.LOCK).exists():  # it began, and left neither a checkpoint nor a result
        return State(folder.name, "failed", epoch, "ended before its first checkpoint", lines)
    return State(folder.name, "missing", epoch, "not begun")


def sweep_states(root: Path) -> list[State]:
    """The states of all runs below a folder, including planned ones without a folder.

    Args:
        root: A sweep's folder, `outputs/<name>`.

    Raises:
        BadInput: There are no runs.
    """
    folders = {*files.result_folders(root), *(root / name for name in files.read_plan(root))}
    if not folders:
        raise BadInput(f"{root}: no sweep here; give a sweep's folder, such as outputs/quickstart")
    return [state_of(folder) for folder in sorted(folders, key=lambda folder: files.natural(str(folder)))]


def sweep_status(root: Path, everything: bool = False) -> RenderableType:
    """Show the state of a sweep: a line a run, the last log lines of failed runs, and the number of runs in each state.

    Args:
        root: A sweep's folder.
        everything: Show each failed run and its log, even if others failed for the same reason.
    """
    states = sweep_states(root)
    alike: dict[str, list[State]] = defaultdict(list)  # runs that share a line
    for state in states:
        fold = state.state == "failed" and not everything
        alike[f"failed {state.note}" if fold else f"run {state.name}"].append(state)
    table = Table()
    table.add_column("run", overflow="fold")
    for heading in ("state", "epoch", ""):
        table.add_column(heading, justify="right" if heading == "epoch" else "left")
    for first, *more in alike.values():
        also = f" and {len(more)} more" if more else ""
        table.add_row(escape(first.name) + also, first.state, str(first.epoch), escape(first.note))
    failed = [first for first, *_ in alike.values() if first.state == "failed" and first.lines]
    shown = failed if everything else failed[-LOGS:]
    logs = [
        f"[bold]{escape(state.name)}[/], last lines of its log:\n" + "\n".join(f"    {escape(x)}" for x in state.lines)
        for state in shown
    ]
    if len(shown) < len(failed):
        logs.append(f"{len(failed) - len(shown)} more logs of failed runs: --all")
    counts = Counter(state.state for state in states)
    summary = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return Group(table, *logs, f"{len(states)} {'run' if len(states) == 1 else 'runs'}: {summary}")
