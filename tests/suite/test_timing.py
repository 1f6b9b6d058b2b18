"""The clock of the benchmarks, on arms whose times are known."""

from __future__ import annotations

import time

import pytest
import torch

from backforward_suite import timing
from backforward_suite.timing import Timing, interleaved, peak_memory


def test_ratio_is_taken_within_rounds() -> None:
    ours, base = Timing((2.0, 20.0, 3.0)), Timing((1.0, 10.0, 1.0))
    assert ours.ratio(base) == 2.0  # not 3 / 1, the ratio of the medians
    assert ours.median == 3.0
    assert Timing((1.0,)).spread == 0.0
    assert Timing((1.0, 2.0, 3.0, 4.0)).spread == pytest.approx(2.5)


def test_arms_take_turns_and_short_ones_are_called_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    calls: list[str] = []

    def arm(name: str, seconds: float) -> timing.Arm:
        def call() -> None:
            calls.append(name)
            now[0] += seconds

        return call

    timings = interleaved({"slow": arm("slow", 0.5), "quick": arm("quick", 0.02)}, rounds=3, seconds_a_turn=0.1)
    assert timings["slow"].rounds == pytest.approx((500, 500, 500))
    assert timings["quick"].rounds == pytest.approx((20, 20, 20))
    warm_up, turns = calls[:4], calls[4:]
    assert warm_up == ["slow"] * 2 + ["quick"] * 2
    assert turns == ["slow", *["quick"] * 5, *["quick"] * 5, "slow", "slow", *["quick"] * 5]


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one arm"):
        interleaved({}, rounds=1)
    with pytest.raises(ValueError, match="one round"):
        interleaved({"a": lambda: None}, rounds=0)


def test_peak_memory_counts_what_is_held_at_a_time() -> None:
    def two_then_one() -> None:
        a = torch.empty(1000, dtype=torch.float64)
        b = torch.empty(1000, dtype=torch.float64)
        del a, b
        torch.empty(1000, dtype=torch.float64)

    assert peak_memory(two_then_one) == 16_000


def test_so_many_calls_a_turn_are_all_there_are() -> None:
    called: list[str] = []
    times = interleaved({name: lambda name=name: called.append(name) for name in "ab"}, rounds=2, calls=3)
    assert "".join(called) == "aaabbb" + "bbbaaa"
    assert [len(timing.rounds) for timing in times.values()] == [2, 2]


def test_on_a_gpu_time_is_that_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 8.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: happened.append("wait"))
    times = interleaved({"a": lambda: happened.append("call")}, rounds=1, device="cuda", calls=2)
    assert happened == ["wait", "event", "call", "call", "event", "wait"]
    assert times["a"].rounds == (4.0,)
