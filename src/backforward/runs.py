"""A run's folder: its name, what lies in it, and when the run counts as done.

    outputs/<name>/<run name>/
        .hydra/          the composed config and the overrides
        events.out.*     TensorBoard
        metrics.csv      one row an epoch, row 0 before training
        diagnostics.csv  with diagnostics=cheap|full: one row a number
        study.csv        of a study, in the place of metrics.csv: one row a measurement
        last.ckpt        where a half-done run goes on; best.ckpt: the epoch of best validation accuracy
        run.log          what the run printed, when it ran in a sweep
        result.json      written last and whole: the run is done, or why it failed
        .lock            held by the process that trains here
    outputs/<name>/sweep.json   what the sweeps of that name have planned

Knows neither torch nor Lightning: sweeps and reports read folders with this module alone.
"""

from __future__ import annotations

import csv
import faulthandler
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from backforward import processes
from backforward.errors import BadInput, Busy
from backforward.files import whole
from backforward.hardware import gpu_count
from backforward.settings import WITHOUT_EFFECT, Settings, differing, fingerprint, plain

DONE = ("finished", "diverged")
LOCK = ".lock"  # in a run's folder, held while it trains
ELSEWHERE = ("slurm", "ray")  # launchers whose runs have other GPUs and cores than this machine
LATE = 3.0  # seconds after timeout_min until a run that cannot end itself is ended from outside Python
NAME_LIMIT = 150  # characters; most file systems end at 255 bytes

Result = dict[str, Any]

_result_written = threading.Lock()  # a run may be done in the moment when its time is over


# --- names -----------------------------------------------------------------------------------------------------------


def run_name(cfg: DictConfig) -> str:
    """A run's name: its method, then each override that can change the result, in the order of `conf/train.yaml`.

    Args:
        cfg: The composed config with Hydra's node, which knows the overrides and the choices of groups.

    Returns:
        For example `bfp-lr0.05-seed3`. The same settings give the same name, however the overrides were ordered.

    Raises:
        BadInput: A setting has the wrong type or range: such a run has no name, and so no folder is made for it.
    """
    elsewhere = cfg.hydra.mode == RunMode.MULTIRUN and cfg.hydra.runtime.choices.get("hydra/launcher") in ELSEWHERE
    Settings.check(cfg, here=not elsewhere)
    choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
    assert isinstance(choices, dict)
    overrides = OverridesParser.create().parse_overrides(list(cfg.hydra.overrides.task))
    keys = {override.key_or_group for override in overrides} - WITHOUT_EFFECT - {"method", "experiment"}
    keys = {key for key in keys if not key.startswith("hydra.")}
    order = {key: place for place, key in enumerate(Settings.model_fields)}
    keys_in_order = sorted(keys, key=lambda key: (order.get(key.split(".")[0], len(order)), key))
    leaves = [key.rpartition(".")[2] for key in keys_in_order]

    parts = [str(choices.get("method"))]
    for key, leaf in zip(keys_in_order, leaves, strict=True):
        if key in choices:
            parts.append(str(choices[key]))
            continue
        label = leaf if leaves.count(leaf) == 1 else key
        value = OmegaConf.select(cfg, key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        parts.append(f"{label}{value}" if number else f"{label}_{value}")
    return _as_file_name("-".join(parts))


def _as_file_name(text: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_")
    if safe == text and len(safe) <= NAME_LIMIT:
        return safe
    # Two different texts must not meet in one folder.
    return f"{safe[:NAME_LIMIT]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def choices() -> dict[str, str]:
    """The choices of groups in the current Hydra run, such as `method: bfp`; none outside Hydra."""
    if not HydraConfig.initialized():
        return {}
    made = HydraConfig.get().runtime.choices
    return {group: str(made[group]) for group in Settings.model_fields if made.get(group) is not None}


def register_resolvers() -> None:
    """Give configs `${run_name:}`, `${by_scale:smoke,small,paper}` (a value for each) and `${scale_of_machine:}`."""
    register = partial(OmegaConf.register_new_resolver, replace=True)
    register("run_name", lambda *, _root_: run_name(_root_))
    register("by_scale", _by_scale)
    register("scale_of_machine", lambda: "paper" if gpu_count() else "small")


def _by_scale(smoke: Any, small: Any, paper: Any, *, _root_: DictConfig) -> Any:
    scale = _root_.scale or "small"
    return {"smoke": smoke, "small": small, "paper": paper}.get(scale)


# --- files -----------------------------------------------------------------------------------------------------------


def write_metrics(folder: Path, rows: list[dict[str, float | int | None]]) -> None:
    """Write `metrics.csv`: one row an epoch, numbers in full precision, an empty cell where nothing was measured."""
    _write_rows(folder / "metrics.csv", rows)


def write_study(folder: Path, rows: Sequence[Mapping[str, float | int | str | None]]) -> None:
    """Write `study.csv`: one row a measurement, as the study defines them; an empty cell where a key has no say."""
    _write_rows(folder / "study.csv", rows)


def _write_rows(path: Path, rows: Sequence[Mapping[str, float | int | str | None]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole(path) as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_metrics(folder: Path) -> list[dict[str, float | None]]:
    """Read `metrics.csv`; no file, no rows."""
    try:
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return [{key: float(cell) if cell else None for key, cell in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []


class Measured(NamedTuple):
    """A row of `diagnostics.csv`.

    Attributes:
        epoch: As in `metrics.csv`: the epoch, from 1, in which the batch lies; 0 is before training.
        step: Batches trained on before it was measured, over all epochs.
        measure: What was measured, as `group/quantity`.
        layer: The layer's name in the network; empty: of the whole network.
        update: Which update of the batch, from 1, where the rule makes several.
        value: In full precision; may be `nan` or infinite.
    """

    epoch: int
    step: int
    measure: str
    layer: str
    update: int
    value: float


def write_diagnostics(folder: Path, rows: list[Measured]) -> None:
    """Write `diagnostics.csv`: one row a number."""
    with whole(folder / "diagnostics.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Measured._fields)
        writer.writerows(rows)


def read_diagnostics(folder: Path) -> list[Measured]:
    """Read `diagnostics.csv`; no file, no rows."""
    try:
        with (folder / "diagnostics.csv").open(newline="", encoding="utf-8") as file:
            return [
                Measured(int(epoch), int(step), measure, layer, int(update), float(value))
                for epoch, step, measure, layer, update, value in list(csv.reader(file))[1:]
            ]
    except FileNotFoundError:
        return []


def write_result(folder: Path, result: Result) -> None:
    """Write `result.json`."""
    with whole(folder / "result.json") as file:
        json.dump(result, file, indent=2, default=str)
        file.write("\n")


def read_result(folder: Path) -> Result | None:
    """Read `result.json`; None where there is none.

    Raises:
        BadInput: The file is damaged.
    """
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, dict) and isinstance(result.get("status"), str):
            return result
        raise ValueError("no status in it")
    except FileNotFoundError:
        return None
    except (ValueError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is damaged ({error}); delete it to have this run done again") from None


def finished_result(folder: Path, cfg: DictConfig) -> Result | None:
    """The result of a run that is done, or None if it is still to do.

    Args:
        folder: The run's folder.
        cfg: What is asked for now.

    Raises:
        BadInput: The folder holds the finished run of other settings, or a damaged result.
    """
    result = read_result(folder)
    if result is None or result["status"] not in DONE:
        return None
    asked = plain(cfg)
    if result.get("settings_hash") != fingerprint(asked):
        keys = differing(asked, result.get("settings", {})) or "its settings do not match their hash"
        raise BadInput(f"{folder} holds a finished run of other settings: {keys}; give another name=... to keep both")
    return result


def result_folders(root: Path) -> list[Path]:
    """Folders of runs below `root`, by name in natural order (lr0.05 before lr0.1, seed2 before seed10)."""
    marks = ("result.json", "metrics.csv", "run.log", "last.ckpt")
    found = {path.parent for mark in marks for path in root.rglob(mark)}
    return sorted(found, key=lambda path: natural(str(path)))


def natural(text: str) -> list[Any]:
    """A sort key that orders numbers inside text by value."""
    return [(0, float(part)) if number else (1, part) for number, part in _split_numbers(text)]


def _split_numbers(text: str) -> Iterator[tuple[bool, str]]:
    for part in re.split(r"(\d+(?:\.\d+)?)", text):
        if part:
            yield part[0].isdigit(), part


def is_done(folder: Path) -> bool:
    """Whether a run's folder holds a result, whatever its settings."""
    with suppress(BadInput):  # a damaged result is none
        result = read_result(folder)
        return result is not None and result["status"] in DONE
    return False


def done_below(root: Path) -> dict[str, Path]:
    """Folders of the runs below `root` that are done, by the hash of their settings."""
    found = {}
    for path in root.rglob("result.json"):
        with suppress(BadInput):  # a damaged one is no run to share
            result = read_result(path.parent)
            if result is not None and result["status"] in DONE:
                found[str(result["settings_hash"])] = path.parent
    return found


def take_over(source: Path, folder: Path) -> None:
    """Let a run that is done elsewhere be done here too: its record, its curves and its config, not its weights.

    Its result then names, as `taken_over_from`, the run that was trained.

    Args:
        source: Its folder.
        folder: The folder of a run of equal settings that is not done, and that nobody works on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Taken, or damaged: the run's own start says so.
    with suppress(Timeout, BadInput), FileLock(folder / LOCK, timeout=0):
        there, result = read_result(folder), read_result(source)
        if result is None or (there is not None and there["status"] in DONE):
            return
        (folder / ".hydra").mkdir(exist_ok=True)
        tables = ("metrics.csv", "diagnostics.csv", "study.csv")
        for path in [*(source / name for name in tables), *source.glob("events.out.*"), *source.glob(".hydra/*.yaml")]:
            if path.exists():
                with whole(folder / path.relative_to(source), "wb") as file:
                    file.write(path.read_bytes())
        # The result last: until then the run is not done.
        origin = result.get("taken_over_from") or f"{source.parent.name}/{source.name}"
        write_result(folder, {**result, "taken_over_from": origin})


@contextmanager
def sitting(folder: Path, cfg: DictConfig) -> Iterator[Callable[[Result], Result]]:
    """Have a run's folder to oneself while training in it.

    Yields:
        A function that writes the result and returns it. If an error comes instead, a result of status `failed`
        with its cause is written, and the error goes on.

    Raises:
        Busy: Another process trains in this folder.
    """
    rank = processes.rank(cfg.trainer.devices)
    if rank > 0:  # the first process of this run keeps the folder
        with _ended_when_overdue(folder, cfg), _failing(folder, cfg, f"rank {rank}: "):
            yield lambda result: result
        return
    if cfg.trainer.devices > 1:
        processes.take_others_along()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # A moment's patience: whoever looks whether the folder is taken holds it for that long.
        lock = FileLock(folder / LOCK, timeout=1).acquire()
    except Timeout:
        raise Busy(f"{folder}: another process is training this run; wait for it, or stop it") from None
    with lock:
        _forget_failure(folder)
        for half_written in folder.rglob(".*.tmp"):  # by one that was killed
            half_written.unlink(missing_ok=True)
        _write_hydra(folder, cfg)
        with _ended_when_overdue(folder, cfg), _failing(folder, cfg):
            yield partial(_written, folder)


def is_taken(folder: Path) -> bool:
    """Whether a process is training in this folder. Its lock goes with it, however it ends."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def note_failure(folder: Path, cfg: DictConfig, cause: str) -> None:
    """Write a result of status `failed` for a run that ended without a word, unless it is being trained again."""
    with suppress(Timeout, OSError), FileLock(folder / LOCK, timeout=0):
        _write_failed(folder, plain(cfg), cause)


def forget_failure(folder: Path) -> None:
    """Remove what an earlier sitting failed of, unless the run is being trained: it is to be begun again.

    A run that is killed before it has its folder to itself would else be given that cause.
    """
    if not (folder / "result.json").exists():
        return
    with suppress(Timeout), FileLock(folder / LOCK, timeout=0):
        _forget_failure(folder)


def _forget_failure(folder: Path) -> None:
    result = read_result(folder)
    if result is not None and result["status"] not in DONE:
        (folder / "result.json").unlink()


@contextmanager
def _failing(folder: Path, cfg: DictConfig, who: str = "") -> Iterator[None]:
    """Write down why a run failed."""
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # a full disk is the likely cause, and no reason to hide it
            _write_failed(folder, plain(cfg), who + cause_of(error))
        raise


def _write_failed(folder: Path, settings: dict[str, Any], cause: str) -> None:
    """Unless another of the run's processes has: when one fails, the others fail of that."""
    if not (folder / "result.json").exists():
        write_result(folder, {"status": "failed", "cause": cause, "settings": settings})


@contextmanager
def _ended_when_overdue(folder: Path, cfg: DictConfig) -> Iterator[None]:
    """Once `timeout_min` has passed, end this process and say so in the result; its threads' stacks go to the log."""
    if cfg.timeout_min is None:
        yield
        return
    seconds, cause, settings = 60 * cfg.timeout_min, overdue(cfg), plain(cfg)

    def end() -> None:
        with _result_written:
            result = read_result(folder)
            if result is not None and result["status"] in DONE:  # just in time
                return
            with suppress(OSError):
                _write_failed(folder, settings, cause)
            faulthandler.dump_traceback()
            print(f"error: {cause}", file=sys.stderr, flush=True)
            os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    # Outside Python's reach: also ends a process that hangs in native code and lets no thread of Python run.
    faulthandler.dump_traceback_later(seconds + LATE, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def overdue(cfg: DictConfig) -> str:
    """The cause of a run that was ended because it hung."""
    return f"ran longer than timeout_min={cfg.timeout_min}"


def cause_of(error: BaseException) -> str:
    """Why a run failed, in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory ({text})" if text else "out of memory"
    if isinstance(error, BadInput):
        return text
    return f"{kind}: {text}" if text else kind


def _written(folder: Path, result: Result) -> Result:
    with _result_written:
        write_result(folder, result)
    return result


def _write_hydra(folder: Path, cfg: DictConfig) -> None:
    """Keep the composed config where Hydra's users look for it."""
    there = folder / ".hydra"
    there.mkdir(exist_ok=True)
    of_hydra = HydraConfig.get()
    for name, node in (("config", cfg), ("hydra", {"hydra": of_hydra}), ("overrides", of_hydra.overrides.task)):
        with whole(there / f"{name}.yaml") as file:
            file.write(OmegaConf.to_yaml(node))


# --- sweeps ----------------------------------------------------------------------------------------------------------


def add_to_plan(root: Path, planned: Mapping[str, Sequence[str]]) -> None:
    """Write down what a sweep is going to run, beside what other commands have planned in the same folder.

    Args:
        root: The sweep's folder.
        planned: By run name, its overrides.
    """
    new = {name: list(overrides) for name, overrides in planned.items()}
    if not new.keys() - read_plan(root).keys():
        return
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / LOCK):  # two sweeps may begin at once
        for half_written in root.glob(".sweep.json.*.tmp"):  # by one that was killed
            half_written.unlink()
        with whole(root / "sweep.json") as file:
            json.dump({"runs": read_plan(root) | new}, file, indent=2)
            file.write("\n")


def read_plan(root: Path) -> dict[str, list[str]]:
    """Read what sweeps have planned in a folder: by run name, its overrides; no plan, no runs.

    Raises:
        BadInput: The file is damaged.
    """
    path = root / "sweep.json"
    try:
        planned: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return dict(planned)
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path} is damaged ({error}); delete it, and the next sweep writes it anew") from None


# --- what a person reads ---------------------------------------------------------------------------------------------


def objective(result: Mapping[str, Any]) -> float | None:
    """The number by which settings are chosen: accuracy on the validation set after the last epoch."""
    accuracy: float | None = result.get("final", {}).get("accuracy/validation")
    return accuracy


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log that are not empty."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()][-count:]
