"""torchvision beside a CPU-only torch. Each case runs in a process of its own, for imports happen once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.helpers.commands import REPOSITORY

SRC = str(REPOSITORY / "src")


def python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {SRC!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stand_in(folder: Path, code: str) -> str:
    """Return code that puts a torchvision of one line before the installed one."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(code)
    return f"sys.path.insert(0, {str(folder)!r})\n"


def test_torchvision_imports_without_a_warning_and_its_data_sets_transforms_and_grids_work() -> None:
    out = python(
        "import backforward_suite._torchvision\n"
        "import torch, torchvision\n"
        "from torchvision import datasets\n"
        "from torchvision.transforms import v2\n"
        "from torchvision.utils import make_grid\n"
        "images = torch.arange(4 * 3 * 2 * 2, dtype=torch.float32).view(4, 3, 2, 2)\n"
        "print(datasets.CIFAR10.base_folder, make_grid(images, padding=0).shape == (3, 2, 8))\n"
        "print(torch.equal(v2.functional.horizontal_flip(images), images.flip(-1)))\n"
    )
    assert out == "cifar-10-batches-py True\nTrue\n"


def test_lightning_imports_afterwards() -> None:
    assert python("import backforward_suite._torchvision\nimport lightning\nprint('fine')") == "fine\n"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is no CPU build")
@pytest.mark.parametrize("message", ["operator torchvision::nms does not exist", "something else"])
def test_only_that_error_is_mended(tmp_path: Path, message: str) -> None:
    """The stand-in fails the first time; a second import must be tried for that message alone."""
    code = (
        "import sys, torch\nimport torchvision.half\n"
        f"if not hasattr(torch.ops.torchvision, 'nms'): raise RuntimeError({message!r})\n"
    )
    prepared = stand_in(tmp_path, code)
    (tmp_path / "torchvision" / "half.py").write_text("print('imported')")
    out = python(
        prepared + "try:\n    import backforward_suite._torchvision\n    import torchvision\n    print('mended')\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    mended = message == "operator torchvision::nms does not exist"
    # Modules of the failed import are imported again; all others stay.
    assert out == ("imported\nimported\nmended\n" if mended else f"imported\n{message}\n")


def test_on_a_cuda_torch_that_error_passes(tmp_path: Path) -> None:
    prepared = stand_in(tmp_path, "raise RuntimeError('operator torchvision::nms does not exist')")
    out = python(
        prepared + "import torch\ntorch.version.cuda = '13.0'\n"
        "try:\n    import backforward_suite._torchvision\nexcept RuntimeError as error:\n    print(error)\n"
    )
    assert out == "operator torchvision::nms does not exist\n"


def test_a_missing_torchvision_is_said_to_be_missing(tmp_path: Path) -> None:
    prepared = stand_in(tmp_path, "raise ModuleNotFoundError('no torchvision here', name='torchvision')")
    out = python(
        prepared
        + "try:\n    import backforward_suite._torchvision\nexcept ModuleNotFoundError as error:\n    print(error)\n"
    )
    assert out == "no torchvision here\n"
