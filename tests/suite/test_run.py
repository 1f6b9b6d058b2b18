from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.configs import composed, requested

from backforward_suite.errors import BadInput
from backforward_suite.run import run, train

TINY = ("data=digits", "model.hidden=4", "max_epochs=1", "trainer.accelerator=cpu", "data.train_images=64")


def test_a_training_or_a_study(tmp_path: Path) -> None:
    result = run(requested(*TINY, "batch_size=32"), tmp_path)
    assert (result["status"], result["final"]["epoch"], result["final"]["step"]) == ("finished", 1, 2)
    assert (tmp_path / "metrics.csv").exists()
    study = run(requested(*TINY, "study=one_step", "study.draws=2"))
    assert study["settings"]["study"]["_target_"] == "backforward_suite.studies.OneStep"


def test_what_cannot_be_built_is_bad_input() -> None:
    with pytest.raises(BadInput, match="groups=0: give at least 1"):
        train(composed(*TINY, "method=bfp", "method.groups=0"))
