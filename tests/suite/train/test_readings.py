"""Readings that lag: on a GPU, and as if, on a CPU."""

from __future__ import annotations

import pytest
import torch

from backforward_suite.train import readings
from backforward_suite.train.readings import Readings


def test_where_nothing_waits_a_look_gives_what_it_asks_for() -> None:
    seen = Readings()
    assert seen.look(torch.tensor([1.5, 2.0]), 3) == (3, [1.5, 2.0])
    assert seen.pending is None
    assert seen.take() is None


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_look_that_lags_gives_what_the_look_before_asked_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "_lags", lambda _: True)
    seen, values = Readings(), torch.zeros((), dtype=torch.float64, device=device)
    given = []
    for step in range(4):
        given.append(seen.look(values, step))
        values += 1  # as sums go on, or a replayed step writes its loss to the same place
    assert given == [None, (0, [0.0]), (1, [1.0]), (2, [2.0])]
    assert seen.pending == (3, [3.0])
    assert seen.pending == (3, [3.0])
    assert seen.take() == (3, [3.0])
    assert seen.take() is None
    assert seen.look(values, 9) is None


def test_what_is_pending_goes_on_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "_lags", lambda _: True)
    one, other = Readings(), Readings()
    one.look(torch.tensor([1.0, 2.0]), 5)
    other.restore(one.pending)
    assert other.pending == (5, [1.0, 2.0])
    assert other.look(torch.tensor([3.0, 4.0]), 6) == (5, [1.0, 2.0])
    assert other.look(torch.tensor([5.0]), 7) == (6, [3.0, 4.0])
    other.restore(None)
    assert other.take() is None
