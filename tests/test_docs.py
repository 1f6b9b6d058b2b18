"""Every command and example of the README and of docs/ runs; what is generated is up to date; links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.commands import REPOSITORY, Command, environment

README = (REPOSITORY / "README.md").read_text()
DOCS = REPOSITORY / "docs"
ELSEWHERE = (
    "lightning.md",
    "optimizers.md",
)  # their examples run in tests/library/test_loops.py and test_optimizers.py
TEXTS = [README, *(path.read_text() for path in sorted(DOCS.glob("*.md")) if path.name not in ELSEWHERE)]
BLOCKS = [block for text in TEXTS for block in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)]
FILES = {
    found.group(1): block for _, block in BLOCKS if (found := re.search(r"^# (\S+\.(?:py|yaml))$", block, re.MULTILINE))
}
SCRIPTS = [block.splitlines() for kind, block in BLOCKS if kind == "bash"]
OWN = next(lines for lines in SCRIPTS if "--config-dir" in " ".join(lines))  # what is run on those files
COMMANDS = list(dict.fromkeys(line for lines in SCRIPTS if lines != OWN for line in lines if line.strip()))
EXAMPLES = [block for kind, block in BLOCKS if kind == "python" and block not in FILES.values()]
# What makes a command short: appended, so that it wins over what the README says.
SHORT = [
    "data=digits",
    "data.train_images=256",
    "data.evaluation_images=100",
    "max_epochs=1",
    "batch_size=256",
    "trainer.accelerator=cpu",
]
SHORT_OF = {"model=nin": ["data.size=17", "model.width=0.05"]}


def python(*arguments: str, cwd: Path | None = None) -> str:
    """What a fresh interpreter prints."""
    ended = subprocess.run(
        [sys.executable, *arguments], check=False, cwd=cwd, env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_there_is_something_to_test() -> None:
    assert len(COMMANDS) >= 4
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: re.search(r"import (\w+)$|import (\w+),", text, re.M)[0])
def test_example(example: str) -> None:
    assert python("-W", "error", "-c", example).strip()


@pytest.mark.parametrize("line", [line for line in COMMANDS if "train.py" in line])
def test_train(line: str, spawned: Command, tmp_path: Path) -> None:
    program, script, *overrides = shlex.split(line.partition(" #")[0])
    assert (program, script) == ("python", "src/train.py")
    data = [key for key in overrides if not key.startswith("data=")]
    short = [word for key, words in SHORT_OF.items() if key in overrides for word in words]
    seeds = [re.sub(r"^seed=.*", "seed=0", key) for key in data]
    ended = spawned(*seeds, *SHORT, *short)
    assert ended.code == 0, ended.err
    assert list(tmp_path.rglob("result.json"))


def test_report(train: Command, tmp_path: Path) -> None:
    tiny = ("data=digits", "max_epochs=1", "trainer.accelerator=cpu")
    assert train(*tiny).code == 0
    assert train(*tiny, "name=smoke/bfp_max_lr").code == 0  # a run of the referee's, which is then committed
    python(str(REPOSITORY / "src/report.py"), "keep", cwd=tmp_path)
    shown = {
        arguments: python(str(REPOSITORY / script), *arguments.split(), cwd=tmp_path)
        for _, script, arguments in (line.split(maxsplit=2) for line in COMMANDS if "report.py" in line)
    }
    assert "digits (1297 training images), 1 epoch\n" in shown["table outputs/train"]
    assert "finished" in shown["status outputs/train"]
    assert "outputs/report/index.html" in shown["page"]
    assert "outputs/reference/report/index.html" in shown["page --reference"]


def test_ones_own_network_rule_data_and_experiment(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for line in OWN:
        *variables, _, script, rest = re.match(r"(?:PYTHONPATH=(\.) )?(python) (\S+) ?(.*)", line).groups()  # type: ignore[union-attr]
        script = str(REPOSITORY / script) if script.startswith("src/") else script
        path = os.pathsep.join([*filter(None, variables), *filter(None, [os.environ.get("PYTHONPATH")])])
        ended = subprocess.run(
            [sys.executable, script, *shlex.split(rest)],
            check=False,
            cwd=tmp_path,
            env=environment() | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
    names = {path.parent.name for path in (tmp_path / "outputs/noise").glob("*/result.json")}
    assert names == {f"{arm}-seed{seed}" for arm in ("sgd", "noisy-noise0.1", "noisy-noise0.5") for seed in (0, 1)}
    assert "wide" in ended.stdout or "noisy" in ended.stdout


def test_every_make_target_of_the_readme_is_in_the_help() -> None:
    targets = set(re.findall(r"\bmake ([a-z]+)", README))
    listed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert targets
    for target in targets:
        assert f"make {target}" in listed


def test_the_page_of_settings_is_what_the_configs_say() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        from make_configuration import page
    finally:
        sys.path.remove(str(DOCS))
    assert (DOCS / "configuration.md").read_text() == page(), "run python docs/make_configuration.py"


def test_links_lead_somewhere() -> None:
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
            if not target.startswith(("http", "mailto")):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 170


@pytest.mark.slow
def test_the_tutorial_runs() -> None:
    nbformat, nbclient = (
        pytest.importorskip(name, reason="pip install -e '.[docs]'") for name in ("nbformat", "nbclient")
    )
    notebook = nbformat.read(DOCS / "tutorial.ipynb", 4)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment().items():
            patch.setenv(key, value)
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    figures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(figures) == 3


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    python("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path), cwd=REPOSITORY)
    assert "Backforward(" in (tmp_path / "api" / "index.html").read_text()
