"""A corpus of damaged files: commands that read them refuse in one line, or their result is right."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tests.helpers.faults.instants import RUN
from tests.helpers.faults.trials import Ended, Tally, difference, left, refused, reported, trained

from backforward_suite.runs import files

FLIPS = 20


def damaged_files(scratch: Path, tally: Tally, stride: int = 1) -> None:
    """Damage each file of a finished and of a half-done run in each way, and let all commands read it.

    Args:
        scratch: A folder to make.
        tally: Where to note the outcomes.
        stride: Try only every so many-th damage.
    """
    scratch.mkdir()
    finished, foreign, half_done = (scratch / name for name in ("finished", "foreign", "half_done"))
    for cwd, overrides in ((finished, RUN), (foreign, (*RUN, "seed=1"))):
        cwd.mkdir()
        assert trained(cwd, *overrides).code == 0
    folder = run_of(finished)
    expected = left(folder)
    shutil.copytree(finished, half_done)
    (run_of(half_done) / "result.json").unlink()
    tried = 0
    for cwd in (finished, half_done):
        for path in sorted(path for path in run_of(cwd).rglob("*") if path.is_file() and path.name != ".lock"):
            for what, content in damages(path, run_of(foreign)):
                tried += 1
                if tried % stride:
                    continue
                copy = scratch / "copy"
                shutil.copytree(cwd, copy)
                (run_of(copy) / path.relative_to(run_of(cwd))).write_bytes(content)
                _read(copy, f"{cwd.name}: {path.name}: {what}", path.name, expected, tally)
                shutil.rmtree(copy)


def run_of(cwd: Path) -> Path:
    """The folder of the only run below."""
    return next(path.parent for path in cwd.rglob("last.ckpt"))


def damages(path: Path, foreign: Path) -> Iterator[tuple[str, bytes]]:
    """Ways to damage a file, each with its content then."""
    content, chance = path.read_bytes(), random.Random(path.name)
    for _ in range(FLIPS if content else 0):
        place, bit = chance.randrange(len(content)), chance.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place} flipped", bytes(flipped)
    yield "cut", content[: len(content) // 2]
    yield "emptied", b""
    yield "swapped", next(one for one in sorted(path.parent.iterdir()) if one.is_file() and one != path).read_bytes()
    others = list(foreign.rglob(path.name if "tfevents" not in path.name else "events.out.*"))
    yield "of a foreign run", others[0].read_bytes()
    if path.name == "result.json":
        older: dict[str, Any] = json.loads(content)
        del older["checksum"], older["files"]
        yield "of an older version", json.dumps(older).encode()
        for key in ("settings", "final", "choices", "data", "timing", "settings_hash", "status"):
            yield f"{key} null", json.dumps({**older, key: None}).encode()
            yield f"{key} missing", json.dumps({name: value for name, value in older.items() if name != key}).encode()
        yield "nested too deeply", b"[" * 100_000
    if path.name == "last.ckpt":
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["checksum"], checkpoint["stands_on"]
        torch.save(checkpoint, path.with_name("older"))
        yield "of an older version", path.with_name("older").read_bytes()
        path.with_name("older").unlink()


def _read(cwd: Path, what: str, name: str, expected: dict[str, Any], tally: Tally) -> None:
    """Let all commands read a damaged run."""
    for command in ("status", "table", "verify"):
        ended = reported(cwd, command, "outputs/train")
        tally.note(f"damaged, {command}", what, ended, "" if ended.code == 0 or refused(ended) else str(ended.code))
    was_done = (run_of(cwd) / "result.json").exists()
    again = trained(cwd, *RUN)
    if again.code:
        problem = "" if refused(again) else f"exit code {again.code}"
    elif was_done:
        problem = _wrong_skipped(run_of(cwd), name, expected, verified=ended)
    else:
        problem = difference(left, run_of(cwd), expected, but=NOT_READ.get(name.partition(".")[0]))
    tally.note("damaged, train again", what, again, problem)


# A resumed run does not read earlier points in TensorBoard's file, or the best epoch's weights.
NOT_READ = {"events": "curves", "best": "best.ckpt"}


def _wrong_skipped(folder: Path, name: str, expected: dict[str, Any], *, verified: Ended) -> str:
    """What is silently wrong after a damaged run was accepted as finished."""
    result = files.read_result(folder)
    assert result is not None
    if any(result[key] != expected["result"][key] for key in ("status", "final", "best")):
        return "another result"
    # The other files are not read here; `verify` finds them.
    if name in ("metrics.csv", "last.ckpt", "best.ckpt") and verified.code == 0:
        return difference(left, folder, expected, but="curves")
    return ""
