"""Read finished runs.

python src/report.py table outputs/quickstart
python src/report.py status outputs/quickstart
python src/report.py page --scale small      # `page` may be left out
python src/report.py page --reference
python src/report.py keep
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from backforward_suite import cli
from backforward_suite.arguments import Parser
from backforward_suite.errors import BadInput
from backforward_suite.report.reading import SCALES
from backforward_suite.report.status import sweep_status
from backforward_suite.report.table import sweep_table

CONF = Path(__file__).resolve().parents[3] / "conf"
OUTPUTS = Path("outputs")
REFERENCE = OUTPUTS / "reference"


def page(scale: str | None, of_reference: bool) -> None:
    """Write the report: of the runs in `outputs/`, or of the committed results, without training.

    Args:
        scale: `smoke`, `small` or `paper`; None: the largest that there is.
        of_reference: Whether to take the committed results.

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
    Console().print(f"{written}, report.md and figures/ beside it", highlight=False, soft_wrap=True)
    if faults := page.faults(examined):
        raise cli.RunsFailed("; ".join(faults))


def keep(scale: str | None) -> None:
    """Pack the finished runs of a scale into `outputs/reference/`, to be committed.

    Raises:
        BadInput: There are none.
    """
    from backforward_suite.report import reference

    scale = scale or _largest(OUTPUTS)
    for name, count in reference.pack(OUTPUTS, scale, REFERENCE).items():
        path = REFERENCE / scale / f"{name}.jsonl"
        Console().print(f"{path}: {count} runs, {path.stat().st_size / 1000:,.0f} kB", highlight=False, soft_wrap=True)


def _largest(folder: Path) -> str:
    from backforward_suite.report import reference

    scales = reference.scales_in(folder)
    if not scales:
        raise BadInput(f"{folder}: no results of any scale here; make reproduce trains them")
    return scales[-1]


def _wide() -> Console:
    """A console that cuts nothing off where its output goes into a file or another program."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=240)


def main() -> None:
    """Parse the command line and do what it says."""
    parser = Parser(description="Read finished runs.")
    commands = parser.add_subparsers(required=True, metavar="command")
    table = commands.add_parser("table", help="a sweep as a table: mean and spread over seeds")
    table.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/quickstart")
    table.set_defaults(call=lambda given: _wide().print(sweep_table(given.folder)))
    status = commands.add_parser("status", help="which runs of a sweep are finished, running, failed, missing")
    status.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/quickstart")
    status.set_defaults(call=lambda given: Console().print(sweep_status(given.folder), highlight=False))
    pages = commands.add_parser("page", help="every claim with its verdict: outputs/report/index.html")
    pages.add_argument("--scale", choices=SCALES, help="of which runs; else the largest that there is")
    pages.add_argument("--reference", action="store_true", help="of the committed results, into outputs/reference/")
    pages.set_defaults(call=lambda given: page(given.scale, given.reference))
    kept = commands.add_parser("keep", help="pack finished runs into outputs/reference/, to be committed")
    kept.add_argument("--scale", choices=SCALES, help="of which runs; else the largest that there is")
    kept.set_defaults(call=lambda given: keep(given.scale))
    arguments = sys.argv[1:]
    if not arguments or arguments[0].partition("=")[0] in ("--scale", "--reference"):
        arguments = ["page", *arguments]  # what it is for
    given = parser.parse_args(arguments)
    given.call(given)


def command() -> int:
    """The command line; returns its exit code."""
    return cli.run(main, CONF)
