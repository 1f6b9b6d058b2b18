"""Interleaved timing: arms run in turn over many rounds, so that a busy moment of the machine affects all arms."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from backforward.batch import tensors_in

Arm = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call of one arm, one value per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Milliseconds per call in the median round."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the rounds, in milliseconds; 0 for a single round."""
        if len(self.rounds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return high - low

    def ratio(self, base: Timing) -> float:
        """Return the median over rounds of the ratio of times to those of `base` within a round."""
        return statistics.median(self._ratios(base))

    def ratio_quartiles(self, base: Timing) -> tuple[float, float, float]:
        """Return the lower quartile, median and upper quartile of that ratio; three equal values for a single round."""
        ratios = self._ratios(base)
        low, middle, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4)
        return low, middle, high

    def _ratios(self, base: Timing) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.rounds, base.rounds, strict=True)]


def interleaved(
    arms: Mapping[str, Arm],
    rounds: int,
    seconds_a_turn: float = 0.1,
    device: torch.device | str = "cpu",
    calls: int | None = None,
) -> dict[str, Timing]:
    """Time several arms in turn.

    Each arm is called twice to warm up. Then each round calls every arm for about `seconds_a_turn`, in an order that
    is rotated by one from round to round.

    Args:
        arms: By name, a function without arguments.
        rounds: Number of rounds.
        seconds_a_turn: Length of a turn; at least one call.
        device: Where the arms compute. Each turn waits for an accelerator before and after; a GPU is timed by events.
        calls: Calls per turn, instead of `seconds_a_turn`, of arms that are warmed up already.

    Raises:
        ValueError: There is no round or no arm.
    """
    if rounds < 1 or not arms:
        raise ValueError("timing needs at least one arm and one round")
    turn = _turn_on(torch.device(device))
    of_each = dict.fromkeys(arms, calls or 1)
    if calls is None:
        for name, arm in arms.items():
            arm()
            of_each[name] = max(1, round(seconds_a_turn / max(turn(arm, 1), 1e-9)))
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(1000 * turn(arms[name], of_each[name]) / of_each[name])
    return {name: Timing(tuple(rounds)) for name, rounds in times.items()}


def _turn_on(device: torch.device) -> Callable[[Arm, int], float]:
    """Return a function that measures the seconds of so many calls."""

    def wait() -> None:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    def by_clock(arm: Arm, calls: int) -> float:
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            arm()
        wait()
        return time.perf_counter() - started

    def by_events(arm: Arm, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait()
        start.record()
        for _ in range(calls):
            arm()
        end.record()
        wait()
        return float(start.elapsed_time(end)) / 1000

    return by_events if device.type == "cuda" else by_clock


def peak_memory(arm: Arm, device: torch.device | str = "cpu") -> int:
    """Return the peak memory of one call in bytes, beyond that before the call.

    On an accelerator, as counted by its allocator; on the host, the tensors that operators return, without the
    operators' workspaces.
    """
    device = torch.device(device)
    arm()
    if device.type == "cpu":
        storages = _Storages()
        with storages:
            arm()
        return storages.peak
    backend = torch.get_device_module(device)
    backend.synchronize(device)
    backend.reset_peak_memory_stats(device)
    before = int(backend.memory_allocated(device))
    arm()
    backend.synchronize(device)
    return int(backend.max_memory_allocated(device)) - before


class _Storages(TorchDispatchMode):
    """Tracks after each operator which of the storages that operators returned are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}  # 0 for storages from before
        self._alive: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {key: ref for key, ref in self._alive.items() if not ref.expired()}
        for tensors, new in ((tensors_in([args, kwargs]), False), (tensors_in(result), True)):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in self._alive:
                    self._alive[ref.cdata] = ref
                    self._sizes[ref.cdata] = storage.nbytes() * new
        self.peak = max(self.peak, sum(self._sizes[key] for key in self._alive))
        return result
