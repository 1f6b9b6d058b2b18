from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from tests.helpers.training import trained

from backforward_suite.train import bar
from backforward_suite.train.bar import ProgressBar


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches of the epoch's bar as they are drawn, by a clock that moves .2 s a batch."""
    seen: list[int] = []
    now = [0.0]
    should_update = ProgressBar._should_update

    def watched(self: ProgressBar, current: int, total: int) -> bool:
        now[0] += 0.2
        monkeypatch.setattr(bar.time, "monotonic", lambda: now[0])
        due = should_update(self, current, total)
        if due and self.trainer.training and not self.trainer.validating:
            seen.append(current)
        return due

    monkeypatch.setattr(ProgressBar, "_should_update", watched)
    return seen


def test_it_moves_twice_a_second_and_at_the_end_of_an_epoch(drawn: list[int], capfd: Any) -> None:
    trained(None, "max_epochs=1", "trainer.progress_bar=true", "batch_size=64")  # an epoch of 20 batches
    assert drawn == sorted(drawn)
    assert drawn[-1] == 20
    assert all(later - earlier <= 3 for earlier, later in pairwise(drawn))
    assert 6 <= len(drawn) <= 9
    assert "20/20" in capfd.readouterr().out


def test_it_can_be_left_out(drawn: list[int]) -> None:
    trained(None, "max_epochs=1", "trainer.progress_bar=false", "batch_size=64")
    assert drawn == []
