from __future__ import annotations

import json

import pytest
import torch

from backforward.models import NIN
from backforward_suite.bench import normprop


@pytest.mark.parametrize("project", [True, False])
def test_the_timed_step_trains_and_projects(project: bool):
    network = NIN((3, 32, 32), 10, 0.05, "prop", seed=0)
    before = network.conv1.conv.weight.detach().clone()
    normprop.training_step(network, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), project=project)()
    after = network.conv1.conv.weight.detach()
    assert not torch.equal(after, before)
    norms = after.flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms)) == project


def test_every_case_has_its_times_and_ratios(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(normprop, "WIDTHS", (0.05,))
    monkeypatch.setattr(normprop, "BATCHES", (2,))
    monkeypatch.setattr(normprop, "ROUNDS", 2)
    monkeypatch.setattr(normprop, "SECONDS_A_TURN", 0.0)
    cases = normprop.run()["cases"]
    assert [case["layout"] for case in cases] == ["channels last", "contiguous"]
    for case in cases:
        assert all(case["milliseconds"][arm] > 0 for arm in ("none", "batch", "prop", "prop_unprojected"))
        assert set(case["ratios"]) == {"prop/none", "prop/batch", "prop_unprojected/none"}
        for ratio in case["ratios"].values():
            assert ratio["lower_quartile"] <= ratio["median"] <= ratio["upper_quartile"]
    json.dumps(cases)
