"""Read finished runs.

python src/report.py table outputs/quickstart
"""

import sys

from backforward_suite.commands.report import command

if __name__ == "__main__":
    sys.exit(command())
