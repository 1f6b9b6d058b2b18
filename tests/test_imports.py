from __future__ import annotations

import subprocess
import sys

import pytest
from tests.conftest import environment


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after some code."""
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        check=True,
        env=environment(),
        capture_output=True,
        text=True,
    )
    return set(ended.stdout.split())


@pytest.mark.parametrize("name", ["fitting", "callbacks.record", "callbacks.checkpoint"])
def test_what_imports_lightning_can_be_imported_first(name: str) -> None:
    assert "lightning" in modules_after(f"import backforward.{name}")


@pytest.mark.parametrize("name", ["runs", "settings", "cli", "report.table"])
def test_what_a_skipped_run_needs_does_not_import_torch(name: str) -> None:
    assert not modules_after(f"import backforward.{name}") & {"torch", "lightning"}


def test_the_library_is_a_name_away_and_does_not_import_lightning() -> None:
    assert "lightning" not in modules_after("from backforward import Backforward, Backprop, Switch")


def test_an_unknown_name_is_an_attribute_error() -> None:
    import backforward

    with pytest.raises(AttributeError, match="no attribute 'Backward'"):
        backforward.Backward  # noqa: B018
