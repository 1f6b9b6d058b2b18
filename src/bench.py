"""Measure speed, on a quiet machine.

python src/bench.py rules
"""

import sys

from backforward_suite.commands.bench import command

if __name__ == "__main__":
    sys.exit(command())
