"""`make faults`: every instant of a run, of a sweep's own process and of reports, and a corpus of damaged files.

python -m tests.helpers.faults [--stride N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import backforward_suite.sweep.preload  # noqa: F401  (imports what the forks need)

# isort: split
from tests.helpers.faults.damage import damaged_files
from tests.helpers.faults.instants import every_instant, targets
from tests.helpers.faults.trials import Tally


def main(stride: int) -> int:
    """Try everything; print counts; return the exit code."""
    began, tally = time.monotonic(), Tally()
    with tempfile.TemporaryDirectory() as scratch:
        for target in targets():
            place = Path(scratch, target.kind)
            place.mkdir()
            every_instant(place, target, tally, stride)
            print(f"{target.kind}: {time.monotonic() - began:.0f} s", flush=True)
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
    parser.add_argument("--stride", type=int, default=1, help="try only every N-th fault")
    sys.exit(main(parser.parse_args().stride))
