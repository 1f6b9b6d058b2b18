"""Cost of Lightning, TensorBoard, the progress bar and the run's record: steps per second against a bare loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backforward.models import MLP, NIN
from backforward.rules import Backforward
from backforward_suite.bench.common import SIZES, Row, available, data_overrides, train
from backforward_suite.data import DataSplits, load_data

Build = Callable[[tuple[int, ...], int], nn.Module]  # shape of an image, classes -> network
Step = Callable[[Tensor, Tensor], object]  # images, labels -> weights changed

LR = 0.1
WARM_UP = 3  # steps


class TrainingCase(NamedTuple):
    """A network on a data set, and the overrides that choose the same network for a run."""

    name: str
    build: Build
    overrides: tuple[str, ...]
    data: str
    batch_size: int
    steps: int | None = None  # per epoch; None: as many as the data set has
    rounds: int = 5


def _nin(width: float, steps: int, rounds: int) -> TrainingCase:
    overrides = ("model=nin", f"model.width={width:g}", "data_norm=channel")
    build = lambda shape, classes: NIN(shape, classes, width)  # noqa: E731
    return TrainingCase(f"nin, width {width:g}", build, overrides, "cifar10", 128, steps, rounds)


CASES = (
    TrainingCase("mlp", MLP, (), "mnist", 64),
    TrainingCase("mlp", MLP, (), "mnist", 128),
    _nin(0.25, steps=20, rounds=5),
    _nin(1, steps=5, rounds=3),
)


def run(root: Path, cases: Iterable[TrainingCase] = CASES) -> list[Row]:
    """Time an epoch of SGD and of BFP, in a bare loop and in a run, in turn.

    Returns:
        One row per case and method: medians over rounds of the milliseconds per step, and of the ratio of speeds within
        a round.
    """
    return [_row(root, case, method) for case in cases for method in STEPS]


def _row(root: Path, case: TrainingCase, method: str) -> Row:
    have = available(case.data, root)
    limits: dict[str, Any] = {}
    if case.steps is not None and have:
        limits = {"train_images": case.steps * case.batch_size, "evaluation_images": 100}
    data = load_data(case.data if have else "digits", root, size=None if have else SIZES[case.data], **limits)
    steps = len(data.train) // case.batch_size
    overrides = [*data_overrides(case.data, root), *case.overrides, *(f"data.{key}={n}" for key, n in limits.items())]
    overrides += [f"method={method}", f"batch_size={case.batch_size}", f"lr={LR}", "max_epochs=1"]
    overrides += ["trainer.progress_bar=true", "trainer.accelerator=cpu"]
    bare, full = [], []
    for _ in range(case.rounds):
        bare.append(bare_epochs(case.build, method, data, case.batch_size) / steps)
        full.append(train(overrides)["timing"]["training_seconds"] / steps)
    return {
        "case": f"{case.name}, batch {case.batch_size}, {data.name}",
        "method": method,
        "bare_ms": 1000 * statistics.median(bare),
        "lightning_ms": 1000 * statistics.median(full),
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(bare, full, strict=True)),
        "rounds": case.rounds,
        "steps": steps,
        "threads": torch.get_num_threads(),
    }


def bare_epochs(build: Build, method: str, data: DataSplits, batch_size: int, epochs: int = 1) -> float:
    """Return the seconds of a loop without Lightning: index, normalise, step; no metric, no log."""
    images, labels = data.train.x, data.train.y
    std, mean = torch.std_mean(images.float().div_(255), (0, 2, 3))
    shift, scale = (-mean / std).view(-1, 1, 1), (1 / (255 * std)).view(-1, 1, 1)
    step = STEPS[method](build(data.shape, data.classes))

    def train(steps: int) -> None:
        order = torch.randperm(len(labels))
        for start in range(0, steps * batch_size, batch_size):
            batch = order[start : start + batch_size]
            step(torch.addcmul(shift, images[batch].float(), scale), labels[batch])

    train(WARM_UP)
    started = time.perf_counter()
    for _ in range(epochs):
        train(len(labels) // batch_size)
    return time.perf_counter() - started


def _sgd(network: nn.Module) -> Step:
    """Return a step in plain PyTorch."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)

    def step(x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _bfp(network: nn.Module) -> Step:
    return Backforward(network, torch.optim.SGD(network.parameters(), lr=LR), F.cross_entropy).step


STEPS: dict[str, Callable[[nn.Module], Step]] = {"sgd": _sgd, "bfp": _bfp}
