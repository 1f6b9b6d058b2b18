"""The shape of the repository: what may import what, a test file for each module, one meaning for each name."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.commands import REPOSITORY

SRC, TESTS = REPOSITORY / "src", REPOSITORY / "tests"
LONGEST = 500  # lines of a module
MIRRORED = ("backforward/**", "backforward_suite/train/**", "backforward_suite/runs", "backforward_suite")
# Of the suite's own folder these have a test file of their own; the others are tested by what uses them.
TOP = ("build", "run", "config")


def modules(pattern: str = "**") -> Iterator[Path]:
    yield from sorted(SRC.glob(f"{pattern}/*.py"))


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_scripts_are_thin() -> None:
    for script in (path for path in SRC.glob("*.py") if path.name != "gpu_check.py"):
        assert imported(script) == {"sys", f"backforward_suite.commands.{script.stem}"}


def test_no_module_is_longer_than_a_sitting() -> None:
    longest = {path.relative_to(SRC): len(path.read_text().splitlines()) for path in modules()}
    assert {str(path): lines for path, lines in longest.items() if lines > LONGEST} == {}


def test_test_files_import_helpers_and_oracles_alone() -> None:
    for path in TESTS.rglob("*.py"):
        ours = {name for name in imported(path) if name.split(".")[0] == "tests"}
        assert all(name.split(".")[1:2] in (["helpers"], ["oracles"], ["zoo"]) for name in ours), f"{path}: {ours}"


@pytest.mark.parametrize("pattern", MIRRORED)
def test_every_module_has_its_test_file(pattern: str) -> None:
    for path in modules(pattern):
        package, *folders = path.relative_to(SRC).parent.parts
        if path.name == "__init__.py" or (pattern == "backforward_suite" and path.stem not in TOP):
            continue
        where = TESTS / {"backforward": "library", "backforward_suite": "suite"}[package] / "/".join(folders)
        assert (where / f"test_{path.stem}.py").exists(), f"{path.relative_to(SRC)} has no test file"


def test_a_class_has_a_name_of_its_own() -> None:
    """Hydra's names for our launchers and the arms of experiments, which all have the same, aside."""
    homes = defaultdict(list)
    for path in modules():
        if "hydra_plugins" in path.parts or "experiments" in path.parts:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path.relative_to(SRC)))
    assert {name: there for name, there in homes.items() if len(there) > 1} == {}


@pytest.mark.slow
@pytest.mark.parametrize("line", ["import backforward_suite.errors", "import numpy"])
def test_import_linter_sees_what_the_library_must_not_import(line: str, tmp_path: Path) -> None:
    shutil.copytree(SRC, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    rules = tmp_path / "src" / "backforward" / "rules.py"

    def linted() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"],
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
            capture_output=True,
            text=True,
        )

    assert linted().returncode == 0
    rules.write_text(rules.read_text() + f"\n{line}\n")
    broken = linted()
    assert broken.returncode == 1
    assert "The library needs torch alone BROKEN" in broken.stdout
