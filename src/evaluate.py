"""Evaluate the trained network of a run on a data set.

python src/evaluate.py outputs/train/bfp-lr0.05
"""

import sys

from backforward_suite.commands.evaluate import command

if __name__ == "__main__":
    sys.exit(command())
