"""`make faults`: every instant of a run and of a sweep's parent, and a corpus of damaged files.

python -m tests.helpers.faults [--stride N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import backforward_suite.sweep.preload  # noqa: F401  (what the forks need)

# isort: split
from tests.helpers.faults.damage import damaged_files
from tests.helpers.faults.instants import RUN, SWEEP, every_instant
from tests.helpers.faults.trials import Tally


def main(stride: int) -> int:
    """Try all; print counts; return the exit code."""
    began, tally = time.monotonic(), Tally()
    with tempfile.TemporaryDirectory() as scratch:
        for part, (kind, arguments) in enumerate({"a run": RUN, "a sweep's parent": SWEEP}.items()):
            place = Path(scratch, str(part))
            place.mkdir()
            every_instant(place, arguments, kind, tally, stride)
        damaged_files(Path(scratch, "damage"), tally, stride)
    for line in (*tally.wrong, *tally.tracebacks):
        print(line)
    for kind, count in tally.tried.items():
        print(f"{kind}: {count}")
    print(
        f"{tally.tried.total()} faults tried; silently wrong or stuck: {len(tally.wrong)}; "
        f"tracebacks: {len(tally.tracebacks)}; {time.monotonic() - began:.0f} s"
    )
    return 1 if tally.wrong or tally.tracebacks else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Inject faults into real commands.")
    parser.add_argument("--stride", type=int, default=1, help="try each so many-th fault")
    sys.exit(main(parser.parse_args().stride))
