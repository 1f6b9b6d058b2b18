from __future__ import annotations

import pytest
from tests.helpers.commands import modules_after


@pytest.mark.parametrize("name", ["train.fit", "train.callbacks.record", "train.callbacks.checkpoint"])
def test_what_imports_lightning_can_be_imported_first(name: str) -> None:
    assert "lightning" in modules_after(f"import backforward_suite.{name}")


@pytest.mark.parametrize("name", ["runs.lifecycle", "config", "cli", "report.table"])
def test_what_a_skipped_run_needs_does_not_import_torch(name: str) -> None:
    assert not modules_after(f"import backforward_suite.{name}") & {"torch", "lightning"}


def test_the_library_is_a_name_away_and_does_not_import_lightning() -> None:
    assert "lightning" not in modules_after("from backforward import Backforward, Backprop, Switch")


def test_an_unknown_name_is_an_attribute_error() -> None:
    import backforward

    with pytest.raises(AttributeError, match="no attribute 'Backward'"):
        backforward.Backward  # noqa: B018
