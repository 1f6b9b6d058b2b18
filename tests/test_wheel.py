"""The wheel, installed beside torch alone: the library needs nothing else, and no plugin of Hydra wakes up."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from tests.helpers.commands import REPOSITORY

pytestmark = pytest.mark.slow

README = (REPOSITORY / "README.md").read_text()
EXAMPLE = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Backforward(model" in block)
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return found[0]


def closure(name: str) -> dict[str, metadata.Distribution]:
    """A distribution, as installed here, and all that it needs."""
    found: dict[str, metadata.Distribution] = {}
    left = [name]
    while left:
        this = left.pop()
        if this.lower() in found:
            continue
        try:
            found[this.lower()] = metadata.distribution(this)
        except metadata.PackageNotFoundError:  # for another platform or Python
            continue
        left += [name_of(text) for text in found[this.lower()].requires or [] if "extra ==" not in text]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has torch, what torch needs, and the wheel."""
    pytest.importorskip("setuptools")
    here = tmp_path_factory.mktemp("wheel")
    source = here / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(here)], check=True, cwd=source, capture_output=True)
    (wheel,) = here.glob("backforward-*.whl")

    venv.create(here / "environment", with_pip=False)
    (site,) = (here / "environment").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)
    for distribution in closure("torch").values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return here / "environment" / "bin" / "python"


def said(python: Path, code: str) -> str:
    warned = ["-W", "error", "-W", "ignore:Failed to initialize NumPy"]  # torch's own, where there is none
    ended = subprocess.run(
        [str(python), "-I", *warned, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_torch_is_the_only_requirement(python: Path) -> None:
    needs = said(python, "from importlib.metadata import requires; print(*requires('backforward'), sep='\\n')")
    assert [name_of(line) for line in needs.splitlines() if "extra ==" not in line] == ["torch"]


def test_there_is_nothing_but_torch_in_that_environment(python: Path) -> None:
    for name in ("numpy", "hydra", "lightning", "pydantic", "torchvision", "yaml", "rich"):
        assert said(python, f"from importlib.util import find_spec; print(find_spec({name!r}))").strip() == "None"


def test_every_public_name_and_module_of_the_library_can_be_imported(python: Path) -> None:
    code = """
import sys, pkgutil, importlib, backforward
for name in backforward.__all__:
    getattr(backforward, name)
for module in pkgutil.walk_packages(backforward.__path__, "backforward."):
    importlib.import_module(module.name)
print([name for name in sys.modules if name.partition(".")[0] in ("backforward_suite", "hydra_plugins")])
"""
    assert said(python, code).strip() == "[]"


def test_the_readmes_example_runs(python: Path) -> None:
    assert said(python, EXAMPLE).startswith("loss ")
