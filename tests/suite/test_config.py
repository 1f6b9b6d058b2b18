from __future__ import annotations

from typing import Any

import pytest
from tests.helpers.configs import composed

from backforward_suite import config as settings
from backforward_suite.config import Request, deciding, differing, fingerprint, plain
from backforward_suite.errors import BadInput


def test_defaults_are_the_backforward_papers_setting() -> None:
    asked = plain(composed())
    assert asked["model"]["hidden"] == 256
    assert asked["model"]["depth"] == 1
    assert asked["model"]["activation"] == "relu"
    assert asked["data"]["name"] == "mnist"
    assert asked["data"]["augment"] == "none"
    assert asked["batch_size"] == 128
    assert asked["weight_decay"] == 0
    assert "momentum" not in asked["optimizer"]
    Request.of(composed())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=-1", "lr=-1: input should be greater than or equal to 0"),
        ("lr=abc", "lr=abc: input should be a valid number"),
        ("lr=true", "lr=True: input should be a valid number"),
        ("lr=nan", "lr=nan: input should be a finite number"),
        ("lr=null", "lr=None: input should be a valid number"),
        ("batch_size=0", "batch_size=0: input should be greater than or equal to 1"),
        ("batch_size=2.5", "batch_size=2.5: input should be a valid integer"),
        ("max_epochs=-3", "max_epochs=-3: input should be greater than or equal to 1"),
        ("seed=-1", "seed=-1: input should be greater than or equal to 0"),
        ("weight_decay=-1", "weight_decay=-1: input should be greater than or equal to 0"),
        ("max_grad_norm=0", "max_grad_norm=0: input should be greater than 0"),
        ("timeout_min=-1", "timeout_min=-1: input should be greater than 0"),
        ("data_norm=foo", "data_norm=foo: input should be 'none', 'channel', 'global' or 'batch'"),
        ("data.protocol=x", "data.protocol=x: input should be 'holdout', 'paper' or 'poster'"),
        (
            "trainer.precision=16-mixed",
            "trainer.precision=16-mixed: input should be '32-true', '64-true' or 'bf16-mixed'",
        ),
        ("trainer.devices=99", "trainer.devices=99: this machine has 2 CPU cores; give at most 2"),
        ("trainer.accelerator=gpu", "trainer.accelerator=gpu: this machine has no GPU; give trainer.accelerator=cpu"),
        ("trainer.capture=on", "trainer.capture=on: a CUDA graph needs a GPU, this machine has no GPU; give"),
        ("trainer.capture=maybe", "trainer.capture=maybe: input should be 'auto', 'on' or 'off'"),
        ("name=../x", "name=../x: string should match pattern"),
    ],
)
def test_a_value_out_of_range_is_named(override: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "cpu_count", lambda: 2)
    monkeypatch.setattr(settings, "gpu_count", lambda: 0)
    with pytest.raises(BadInput) as caught:
        Request.of(composed(override))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["norm=batch", "batch_size=1"], "norm=batch needs at least two samples per batch"),
        (["data_norm=batch", "batch_size=1"], "data_norm=batch needs at least two samples per batch"),
        (["method=bfp", "method.engine=shortcut", "trainer.devices=2"], "engine=shortcut works on one device, not 2"),
        (
            ["method=bfp", "method.engine=shortcut", "trainer.precision=bf16-mixed"],
            "engine=shortcut needs full precision",
        ),
        (["trainer.devices=2", "batch_size=3"], "batch_size=3 cannot be shared by 2 devices"),
        (["min_delta=0.1"], "min_delta=0.1 belongs to patience"),
        (["study=one_step", "patience=3"], "stop_loss and patience end a training, and a study has none"),
    ],
)
def test_values_that_do_not_go_together_are_named(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "cpu_count", lambda: 2)
    monkeypatch.setattr(settings, "gpu_count", lambda: 0)
    with pytest.raises(BadInput, match=message):
        Request.of(composed(*overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("diagnostics=cheap", "trainer.capture=on replays it whole"),
        ("trainer.devices=2", "trainer.capture=on works on one device, not 2"),
        ("trainer=cpu", "a CUDA graph needs a GPU, not trainer.accelerator=cpu"),
        ("method=bfp_random", "draws anew for each batch"),
        ("method=shift_noise", "draws anew for each batch"),
    ],
)
def test_capture_is_refused_where_it_cannot_be_had(
    override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "gpu_count", lambda: 2)
    with pytest.raises(BadInput, match=message):
        Request.of(composed("trainer.capture=on", override))
    Request.of(composed("trainer.capture=auto", override))


@pytest.mark.parametrize(
    ("overrides", "capture"),
    [
        ([], "off"),
        (["trainer.capture=auto"], "auto"),
        (["trainer.capture=auto", "diagnostics=cheap"], "off"),
        (["trainer.capture=false"], "off"),  # what YAML makes of a bare off
    ],
)
def test_capture_is_left_out_where_diagnostics_look_into_steps(overrides: list[str], capture: str) -> None:
    assert Request.of(composed(*overrides)).settings.capture == capture


def test_of_several_faults_the_first_is_named() -> None:
    with pytest.raises(BadInput, match=r"^lr=-1"):
        Request.of(composed("max_epochs=-3", "batch_size=0", "lr=-1"))


@pytest.mark.parametrize(
    "override",
    ["name=x", "timeout_min=5", "data.root=/elsewhere", "trainer.progress_bar=false", "trainer.accelerator=cpu"],
)
def test_what_does_not_decide_the_result_is_not_hashed(override: str) -> None:
    assert fingerprint(plain(composed(override))) == fingerprint(plain(composed()))


@pytest.mark.parametrize(
    "override", ["lr=0.2", "seed=1", "method=bfp", "model.depth=2", "data.augment=flip", "norm=batch"]
)
def test_what_decides_the_result_is_hashed(override: str) -> None:
    assert fingerprint(plain(composed(override))) != fingerprint(plain(composed()))


def test_differing_keys_are_named_with_both_values() -> None:
    there = plain(composed("lr=0.2"))
    assert differing(plain(composed()), there) == "lr=0.1 (there: 0.2)"


def test_deciding_is_flat() -> None:
    values: dict[str, Any] = {"a": {"b": 1, "c": {"d": 2}}, "name": "x", "data": {"root": "y", "name": "z"}}
    assert deciding(values) == {"a.b": 1, "a.c.d": 2, "data.name": "z"}
