"""Trained networks: load one from a run's folder, and measure it on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from backforward.data_norm import DataNorm
from backforward_suite.build import model_maker, with_data_norm
from backforward_suite.cli import refusing
from backforward_suite.config import Request
from backforward_suite.data import EpochLoader, Images, load_asked
from backforward_suite.errors import BadInput
from backforward_suite.precision import set_matmul_precision
from backforward_suite.runs.files import read_result

Which = Literal["last", "best"]

EVALUATION_BATCH = 500  # samples; affects the result by rounding only


class Trained(NamedTuple):
    """A run's network.

    Attributes:
        network: In evaluation mode, on the CPU: float images [N, C, H, W] in [0, 1] to logits [N, classes].
        request: The run's settings.
        shape: ``(C, H, W)`` of an image.
        classes: Number of classes.
        epoch: Number of epochs of training.
    """

    network: nn.Module
    request: Request
    shape: tuple[int, int, int]
    classes: int
    epoch: int


def load(folder: Path | str, checkpoint: Which = "last") -> nn.Module:
    """Return the trained network of a run, on the CPU and in evaluation mode.

    The network normalises its input itself: it maps float images [N, C, H, W] in [0, 1] to logits [N, classes]. The
    module of your own model must be importable.

    Example:
        >>> network = load("outputs/train/bfp-lr0.05")  # doctest: +SKIP
        >>> torch.export.export(network, (torch.rand(1, 1, 28, 28),))  # doctest: +SKIP

    Args:
        folder: The run's folder, such as ``outputs/train/bfp-lr0.05``.
        checkpoint: ``last``: from the end of the run; ``best``: from the epoch of the best validation accuracy.

    Raises:
        BadInput: The folder has no such checkpoint, it is damaged, or its model cannot be built.
    """
    return trained(folder, checkpoint).network


def trained(folder: Path | str, checkpoint: Which = "last") -> Trained:
    """Return the same with the run's settings. Arguments and errors are those of `load`."""
    from backforward_suite.train.callbacks.checkpoint import read_checkpoint  # Lightning takes seconds

    folder = Path(folder)
    if checkpoint not in ("last", "best"):
        raise BadInput(f"checkpoint={checkpoint}: there are last and best")
    result = read_result(folder) or {}
    path = folder / f"{checkpoint}.ckpt"
    if not path.is_file():
        raise BadInput(_why_none(path, result))
    found = read_checkpoint(path)
    if "settings" not in found:
        raise BadInput(f"{path} is no checkpoint of a run: it has no settings")
    with refusing():
        request = Request.of(OmegaConf.create(found["settings"]), here=False)
        if "data" in result:
            channels, height, width = result["data"]["shape"]
            shape, classes = (channels, height, width), result["data"]["classes"]
        else:  # a half-done run
            data = load_asked(request.settings.data)
            shape, classes = data.shape, data.classes
        data_norm = DataNorm.unfitted(request.settings.data_norm, shape)
        network = with_data_norm(data_norm, model_maker(request.cfg, shape, classes)(seed=request.settings.seed))
    weights = {
        key.removeprefix("network."): value for key, value in found["state_dict"].items() if key.startswith("network.")
    }
    try:
        network.load_state_dict(weights, assign=True)  # in the precision of the run
    except RuntimeError as error:
        what = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise BadInput(f"{path} does not fit the network that {request.settings.model.target} builds: {what}") from None
    return Trained(network.eval(), request, shape, classes, _epochs(found))


def _epochs(checkpoint: dict[str, object]) -> int:
    """Return the number of epochs finished before a checkpoint."""
    loops = checkpoint["loops"]
    assert isinstance(loops, dict)
    return int(loops["fit_loop"]["epoch_progress"]["current"]["processed"])


def _why_none(path: Path, result: dict[str, object]) -> str:
    if not path.parent.is_dir():
        return f"{path.parent}: no such folder; give the folder of a run, such as outputs/train/sgd"
    if "taken_over_from" in result:
        return f"{path.parent} has its result from {result['taken_over_from']}, where the weights are"
    if isinstance(settings := result.get("settings"), dict) and settings.get("study"):
        return f"{path.parent} is a study, which saves no network; give the folder of a training"
    return f"{path.parent} has no {path.name}; give the folder of a run that has trained"


class Score(NamedTuple):
    """The performance of a network on labelled images.

    Attributes:
        loss: Mean cross-entropy, in nats.
        accuracy: Share of images whose largest logit is that of their label.
        images: Number of images.
    """

    loss: float
    accuracy: float
    images: int


def score(network: nn.Module, images: Images, precision: str, device: torch.device) -> Score:
    """Measure a network on labelled images, in the precision of a run.

    Args:
        network: On the device, in evaluation mode.
        images: The images.
        precision: ``trainer.precision`` of the run.
        device: Where to compute.
    """
    dtype = torch.float64 if precision == "64-true" else torch.float32
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    batches = EpochLoader(images, EVALUATION_BATCH, shuffle=False, drop_last=False, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        for x, y in batches:
            logits = network(x.to(dtype))
            loss += F.cross_entropy(logits, y, reduction="sum").double()
            correct += (logits.argmax(dim=1) == y).sum()
    return Score(loss.item() / len(images), correct.item() / len(images), len(images))


def scores(found: Trained, splits: dict[str, Images]) -> dict[str, Score]:
    """Measure a run's network on the splits of a data set, on a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_matmul_precision(found.request.settings.trainer.matmul_precision)
    network = found.network.to(device)
    precision = found.request.settings.trainer.precision
    return {split: score(network, images, precision, device) for split, images in splits.items()}
