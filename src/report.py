"""Read finished runs.

python src/report.py table outputs/quickstart
python src/report.py status outputs/quickstart
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from backforward import cli
from backforward.report.status import sweep_status
from backforward.report.table import sweep_table

CONF = Path(__file__).resolve().parent.parent / "conf"


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description="Read finished runs.")
    commands = parser.add_subparsers(required=True, metavar="command")
    table = commands.add_parser("table", help="a sweep as a table: mean and spread over seeds")
    table.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/quickstart")
    table.set_defaults(call=lambda given: Console().print(sweep_table(given.folder)))
    status = commands.add_parser("status", help="which runs of a sweep are finished, running, failed, missing")
    status.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/quickstart")
    status.set_defaults(call=lambda given: Console().print(sweep_status(given.folder), highlight=False))
    given = parser.parse_args()
    given.call(given)


if __name__ == "__main__":
    sys.exit(cli.run(main, CONF))
