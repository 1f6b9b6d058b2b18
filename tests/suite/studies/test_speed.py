from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers.settings import MakeSetting

from backforward.models import MLP
from backforward.rules import Backprop
from backforward_suite.errors import BadInput
from backforward_suite.studies import Speed, speed
from backforward_suite.timing import Timing

TIMES = {"none": (1.0, 2.0, 3.0), "batch": (4.0, 4.0, 4.0), "prop": (2.0, 3.0, 9.0)}


def test_every_norm_takes_training_steps_from_the_same_start(make_setting: MakeSetting) -> None:
    made: list[tuple[str, Any]] = []
    steps: list[int] = []

    def model(norm: str, **arguments: Any) -> Any:
        made.append((norm, MLP(norm=norm, hidden=12, **arguments)))
        return made[-1][1]

    class Rule(Backprop):
        def step(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            steps.append(len(y))
            return super().step(x, y)

    final, rows = Speed(rounds=2, seconds_a_turn=0.0)(make_setting(Rule, model=model, batch_size=8))
    assert [norm for norm, _ in made] == ["none", "batch", "prop"]
    assert steps == [8] * 3 * (2 + 2)  # twice to warm up, once a round
    networks = dict(made)
    fresh = {norm: MLP((1, 8, 8), 10, hidden=12, norm=norm, seed=0) for norm in networks}
    for norm, network in networks.items():
        weight, before = network.hidden1.linear.weight, fresh[norm].hidden1.linear.weight
        assert not torch.equal(weight, before)
        assert torch.equal(before, fresh["none"].hidden1.linear.weight)
    assert torch.allclose(networks["prop"].hidden1.linear.weight.norm(dim=1), torch.ones(12))
    assert {(row["norm"], row["round"]) for row in rows} == {(norm, k) for norm in networks for k in (1, 2)}
    assert all(name.startswith("time/") for name in final if name != "steps_per_epoch")


def test_headlines_of_known_times(make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "interleaved", lambda *_: {norm: Timing(times) for norm, times in TIMES.items()})
    final, rows = Speed()(make_setting(batch_size=100))
    assert [(row["norm"], row["round"], row["time/step_ms"]) for row in rows][3:5] == [("batch", 1, 4), ("batch", 2, 4)]
    assert final["steps_per_epoch"] == 12  # of 1,297 images; the last short batch is left out
    assert final["time/median_ms/prop"] == 3
    assert final["time/spread_ms/batch"] == 0
    assert final["time/extrapolated_epoch_seconds/none"] == pytest.approx(0.024)
    assert final["time/ratio/prop_batch"] == 0.75
    assert final["time/ratio/prop_none"] == 2
    assert final["time/ratio_low/prop_none"] == 1.5
    assert final["time/ratio_high/prop_none"] == 3


def test_bad_settings_are_refused(make_setting: MakeSetting) -> None:
    with pytest.raises(BadInput, match="batch_size=2000: must be <= 1297, the number of training images"):
        Speed()(make_setting(batch_size=2000))
    with pytest.raises(ValueError, match=r"study.rounds=0"):
        Speed(rounds=0)
    with pytest.raises(ValueError, match=r"study.seconds_a_turn=-1"):
        Speed(seconds_a_turn=-1)
