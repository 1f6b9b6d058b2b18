"""Run what the referee's experiments still miss, then write its report.

python src/reproduce.py --scale smoke
"""

import sys

from backforward_suite.commands.reproduce import command

if __name__ == "__main__":
    sys.exit(command())
