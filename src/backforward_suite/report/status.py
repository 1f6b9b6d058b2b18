"""Where a sweep stands: which of its runs are finished, running, failed, stopped, missing."""

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
    """What a run's folder says of it.

    Attributes:
        name: The run's name.
        state: One of `STATES`. `stopped`: it was killed or told to end, and goes on from its last checkpoint.
        epoch: How many epochs stand in its metrics.
        note: Accuracy of a finished one, cause of a failed one.
        lines: The last ones of a failed one's log.
    """

    name: str
    state: str
    epoch: int
    note: str = ""
    lines: tuple[str, ...] = ()


def state_of(folder: Path) -> State:  # noqa: PLR0911
    """Look at a run's folder, which need not exist."""
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
        return State(folder.name, "stopped", epoch, "goes on from its last checkpoint", lines[-1:])
    if (folder / locks.LOCK).exists():  # it began, and left neither a checkpoint nor a word
        return State(folder.name, "failed", epoch, "ended before its first checkpoint", lines)
    return State(folder.name, "missing", epoch, "not begun")


def sweep_states(root: Path) -> list[State]:
    """Look at all runs below a folder, and at those that are planned there and have no folder yet.

    Args:
        root: A sweep's folder, `outputs/<name>`.

    Raises:
        BadInput: There is nothing.
    """
    folders = {*files.result_folders(root), *(root / name for name in files.read_plan(root))}
    if not folders:
        raise BadInput(f"{root}: no sweep here; give a sweep's folder, such as outputs/quickstart")
    return [state_of(folder) for folder in sorted(folders, key=lambda folder: files.natural(str(folder)))]


def sweep_status(root: Path, everything: bool = False) -> RenderableType:
    """Show where a sweep stands: a line a run, the last lines of the failed ones, how many are in which state.

    Args:
        root: A sweep's folder.
        everything: Whether runs that failed of the same are shown one by one, and the log of each.
    """
    states = sweep_states(root)
    alike: dict[str, list[State]] = defaultdict(list)  # by what is one line
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
