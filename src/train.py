"""Train one network, or sweep over many settings.

python src/train.py -m method=bfp,sgd lr=0.1,0.05,0.01
"""

import sys

from backforward_suite.commands.train import command

if __name__ == "__main__":
    sys.exit(command())
