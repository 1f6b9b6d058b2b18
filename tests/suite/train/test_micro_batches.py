"""Gradient accumulation: the same training up to rounding, in less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.configs import requested
from tests.helpers.training import trained, weights

from backforward_suite.config import Request
from backforward_suite.errors import BadInput

SHORT = ("max_epochs=1", "trainer.limit_train_batches=5")


@pytest.mark.parametrize("method", ["sgd", "bfp", "bfp_warmup"])
@pytest.mark.parametrize("norm", ["none", "prop"])
def test_parts_of_a_batch_train_as_the_batch(method: str, norm: str, tmp_path: Path) -> None:
    ends = []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        folder.mkdir()
        result = trained(folder, *SHORT, f"method={method}", f"norm={norm}", f"micro_batches={parts}")
        assert result["final"]["step"] == 5
        ends.append(weights(folder))
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_it_belongs_to_the_result_unless_it_is_one() -> None:
    assert requested("micro_batches=1").hash == requested().hash
    assert requested("micro_batches=2").hash != requested().hash


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["micro_batches=3", "batch_size=32"],
            "batch_size=32 cannot be split into 3 micro-batches; give a multiple of",
        ),
        (["micro_batches=4", "batch_size=4", "norm=batch"], "norm=batch needs at least two samples per micro-batch"),
        (["micro_batches=0"], "micro_batches=0: input should be greater than or equal to 1"),
        (["micro_batches=2", "method=bfp", "method.engine=shortcut"], "engine=shortcut computes a batch as a whole"),
        (["micro_batches=2", "study=one_step", "diagnostics=off"], "a study has none; leave it out"),
    ],
)
def test_what_cannot_be_split_is_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(BadInput, match=line):
        requested(*overrides)


def test_a_rule_that_cannot_split_says_so() -> None:
    with pytest.raises(BadInput, match="Dose takes batches as a whole; leave out micro_batches=2"):
        trained(None, *SHORT, "method=dose", "micro_batches=2")


def test_on_two_devices() -> None:
    asked = ("trainer=ddp", "trainer.accelerator=cpu", "batch_size=32")
    assert isinstance(requested(*asked, "micro_batches=4"), Request)
    with pytest.raises(BadInput, match="cannot be split into 6 micro-batches on 2 devices; give a multiple of 6"):
        requested(*asked, "micro_batches=3")
