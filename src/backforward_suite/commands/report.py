"""Read finished runs.

python src/report.py table outputs/quickstart
python src/report.py status outputs/quickstart
python src/report.py verify outputs/quickstart
python src/report.py page --scale small      # `page` may be left out
python src/report.py page --reference
python src/report.py keep
"""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from backforward_suite import cli
from backforward_suite.arguments import Parser
from backforward_suite.config import fingerprint
from backforward_suite.errors import BadInput
from backforward_suite.report.reading import SCALES
from backforward_suite.report.status import sweep_status
from backforward_suite.report.table import sweep_csv, sweep_table
from backforward_suite.runs.files import Result

CONF = Path(__file__).resolve().parents[3] / "conf"
OUTPUTS = Path("outputs")
REFERENCE = OUTPUTS / "reference"


def page(scale: str | None, of_reference: bool) -> None:
    """Write the report: of the runs in `outputs/`, or of the committed results, without training.

    Args:
        scale: `smoke`, `small`, `medium` or `paper`; None takes the largest that has runs.
        of_reference: Whether to read the committed results.

    Raises:
        BadInput: There is nothing to report on.
        RunsFailed: The report was written, but some experiments could not be examined.
    """
    from backforward_suite.report import page, reference

    source = REFERENCE if of_reference else OUTPUTS
    scale = scale or _largest(source)
    with tempfile.TemporaryDirectory() as place:
        if of_reference:
            reference.unpack(REFERENCE, scale, Path(place))
        examined = page.examine_all(Path(place) if of_reference else OUTPUTS, scale)
        written = page.write(examined, source / "report", scale)
    Console().print(page.tally(examined), highlight=False, soft_wrap=True)
    Console().print(f"{escape(str(written))}, report.md and figures/ beside it", highlight=False, soft_wrap=True)
    if faults := page.faults(examined):
        raise cli.RunsFailed("; ".join(faults))


def keep(scale: str | None) -> None:
    """Pack the finished runs of a scale into `outputs/reference/`, for a commit.

    Raises:
        BadInput: There are none.
    """
    from backforward_suite.report import reference

    scale = scale or _largest(OUTPUTS)
    for name, count in reference.pack(OUTPUTS, scale, REFERENCE).items():
        path = REFERENCE / scale / f"{name}.jsonl"
        Console().print(
            f"{escape(str(path))}: {count} runs, {path.stat().st_size / 1000:,.0f} kB", highlight=False, soft_wrap=True
        )


def verify(folder: Path) -> None:
    """Check the files of finished runs: checksums, settings, tables, checkpoints, data and source.

    Raises:
        BadInput: There is no finished run.
        RunsFailed: Some have changed.
    """
    from backforward_suite.report.verify import table_of, verified

    found = verified(folder, {"checkpoint": _checkpoint, "data, source": _data_and_source})
    _wide().print(table_of(found, folder), highlight=False)
    if wrong := sum(one.wrong for one in found):
        raise cli.RunsFailed(f"{wrong} of {len(found)} runs have changed")


def _checkpoint(folder: Path, result: Result) -> str:
    """What is wrong with a finished run's checkpoints; studies, and runs taken over from others, have none."""
    from backforward_suite.train.callbacks.checkpoint import read_checkpoint

    if result.get("settings", {}).get("study") or "taken_over_from" in result:
        return ""
    for name in ("last.ckpt", "best.ckpt"):
        if not (folder / name).exists():
            if name == "last.ckpt":
                return f"{folder / name} is missing"
            continue
        checkpoint = read_checkpoint(folder / name)
        data = checkpoint.get("stands_on", {}).get("data")
        if fingerprint(checkpoint["settings"]) != result.get("settings_hash") or (
            data is not None and data != result.get("data", {}).get("sha256")
        ):
            return f"{folder / name} belongs to another run"
        if name == "last.ckpt" and checkpoint["global_step"] != result.get("final", {}).get("step"):
            return f"{folder / name} is from another step than the result"
    return ""


def _data_and_source(_: Path, result: Result) -> str:
    """What has changed in the data and source of a run."""
    from omegaconf import DictConfig

    from backforward_suite.config import Request
    from backforward_suite.runs.identity import changed

    return changed(Request.of(DictConfig(result.get("settings", {})), here=False), result)


def _largest(folder: Path) -> str:
    from backforward_suite.report import reference

    scales = reference.scales_in(folder)
    if not scales:
        raise BadInput(f"{folder}: no results of any scale here; make reproduce trains them")
    return scales[-1]


def _wide() -> Console:
    """A console that does not truncate output to a file or another program."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=240)


def _table(given: Namespace) -> None:
    where = dict(text.partition("=")[::2] for text in given.where)
    if wrong := [text for text in given.where if "=" not in text]:
        raise BadInput(f"--where {wrong[0]}: give KEY=VALUE, such as data=mnist")
    if given.csv:
        print(sweep_csv(given.folder, where, given.sort), end="")
    else:
        _wide().print(sweep_table(given.folder, where, given.sort), highlight=False)


def main() -> None:
    """Parse the command line and run the command."""
    parser = Parser(description="Read finished runs.")
    commands = parser.add_subparsers(required=True, metavar="command")
    table = commands.add_parser("table", help="a sweep as a table: mean and spread over seeds")
    table.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/quickstart")
    table.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only runs with this setting")
    table.add_argument("--sort", metavar="KEY", help="by a setting, or loss, val, test, norm, sec; the best first")
    table.add_argument("--csv", action="store_true", help="as comma-separated values, in full precision")
    table.set_defaults(call=_table)
    status = commands.add_parser("status", help="which runs of a sweep are finished, running, failed or missing")
    status.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/quickstart")
    status.add_argument("--all", action="store_true", help="every failed run, even if the reason is the same")
    status.set_defaults(call=lambda given: Console().print(sweep_status(given.folder, given.all), highlight=False))
    checked = commands.add_parser("verify", help="whether files, data and source of finished runs are unchanged")
    checked.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/quickstart")
    checked.set_defaults(call=lambda given: verify(given.folder))
    pages = commands.add_parser("page", help="every claim with its verdict: outputs/report/index.html")
    pages.add_argument("--scale", choices=SCALES, help="of the runs; default: the largest that has runs")
    pages.add_argument("--reference", action="store_true", help="of the committed results, into outputs/reference/")
    pages.set_defaults(call=lambda given: page(given.scale, given.reference))
    kept = commands.add_parser("keep", help="pack finished runs into outputs/reference/, for a commit")
    kept.add_argument("--scale", choices=SCALES, help="of the runs; default: the largest that has runs")
    kept.set_defaults(call=lambda given: keep(given.scale))
    arguments = sys.argv[1:]
    if not arguments or arguments[0].partition("=")[0] in ("--scale", "--reference"):
        arguments = ["page", *arguments]  # the default command
    given = parser.parse_args(arguments)
    given.call(given)


def command() -> int:
    """The command line; returns its exit code."""
    return cli.run(main, CONF)
