"""What tests share: calling the command line, and real data where there is some."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.commands import REPOSITORY, TRAIN, Command, Ended, as_by_hand, environment

import backforward_suite._torchvision  # noqa: F401  (before any test imports Lightning)
from backforward_suite.commands.train import command


@pytest.fixture
def spawned(tmp_path: Path) -> Command:
    """`spawned("lr=0.1", ...)`: `python src/train.py lr=0.1 ...` in an empty folder, as a process of its own."""

    def call(*arguments: str, **changes: str) -> Ended:
        ended = subprocess.run(
            [sys.executable, str(TRAIN), *arguments],
            check=False,
            cwd=tmp_path,
            env=environment(**changes),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            preexec_fn=as_by_hand,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return call


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The same within this process: it need not import torch again."""

    def call(*arguments: str, **changes: str) -> Ended:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", [str(TRAIN), *arguments])
            patch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets both: have them put back
            patch.setenv("BACKFORWARD_TRACEBACKS", "0")
            for key, value in changes.items():
                patch.setenv(key, value)
            capfd.readouterr()
            code = command()
        return Ended(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder with real MNIST; tests that ask for it are skipped where there is none."""
    root = Path(os.environ.get("BACKFORWARD_DATA", REPOSITORY / "data"))
    if not (root / "mnist.npz").is_file():
        pytest.skip(f"no {root / 'mnist.npz'}: real MNIST is not here")
    return root
