"""The columns of TensorBoard's HParams; tests of what TensorBoard makes of them are in test_tensorboard.py."""

from __future__ import annotations

from tests.helpers.configs import with_hydra

from backforward_suite.config import Request
from backforward_suite.train.hparams import is_finite, readable, varying


def requested(*overrides: str) -> Request:
    cfg = with_hydra(*overrides)
    return Request.of(cfg, cfg.hydra)


def test_settings_read_as_a_person_gives_them() -> None:
    values = readable(requested("method=bfp", "lr=0.05", "method.groups=2"))
    assert (values["method"], values["lr"], values["method.groups"]) == ("bfp", 0.05, 2)
    assert "max_grad_norm" not in values  # null
    assert not any(key.endswith("_target_") for key in values)


def test_what_varies_is_what_runs_set_differently_or_not_at_all() -> None:
    plan = {"a": ["lr=0.1", "seed=0"], "b": ["lr=0.2", "seed=0"], "c": ["lr=0.1", "seed=0", "+method.groups=2"]}
    assert varying(plan) == ["lr", "method.groups"]
    assert varying({}) == []


def test_a_diverged_metric_is_not_finite() -> None:
    assert [is_finite(value) for value in (1.0, 3, float("inf"), float("nan"), None, "x")] == [True, True] + [False] * 4
