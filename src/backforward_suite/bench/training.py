"""What Lightning, TensorBoard, the bar and the record cost: steps/s of a whole run against a bare loop."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backforward.flops import FlopCounter
from backforward.models import MLP, NIN
from backforward_suite.data import DataSplits, load_data
from backforward_suite.runs.files import Result
from backforward_suite.timing import interleaved

Train = Callable[[list[str], Path], Result]  # overrides, folder -> result
Build = Callable[[tuple[int, ...], int], nn.Sequential]  # shape of an image, classes -> network
Step = Callable[[Tensor, Tensor], None]  # images, labels -> weights changed

LR = 0.1
STEPS_TO_WARM_UP = 3
METHODS = ("sgd", "bfp")


@dataclass(frozen=True)
class TrainingCase:
    """A network on a data set.

    Attributes:
        name: As the table shows it.
        build: The network: images [N, C, H, W] to logits [N, classes].
        data: The data set.
        size: Height and width to which digits are enlarged, to stand in where it is missing.
        batch: Samples in a batch.
        overrides: That choose the same network for a run.
        steps: In an epoch of the measurement; None: all that the data set has.
        rounds: Epochs of each loop.
    """

    name: str
    build: Build
    data: str
    size: int
    batch: int
    overrides: tuple[str, ...]
    steps: int | None = None
    rounds: int = 5


def _nin(width: float, steps: int, rounds: int) -> TrainingCase:
    name, overrides = f"nin, width {width:g}", ("model=nin", f"model.width={width:g}", "data_norm=channel")
    return TrainingCase(
        name, lambda shape, classes: NIN(shape, classes, width), "cifar10", 32, 128, overrides, steps, rounds
    )


MLP_CASE = TrainingCase("mlp", MLP, "mnist", 28, 128, ())
CASES = (
    replace(MLP_CASE, batch=64),
    MLP_CASE,
    _nin(0.25, steps=20, rounds=5),
    _nin(1, steps=5, rounds=3),
)


def run(train: Train, root: Path, cases: Iterable[TrainingCase] = CASES) -> list[dict[str, Any]]:
    """Time an epoch of SGD and of BFP, by hand and through `train`, in turn.

    Args:
        train: Trains one run from overrides in a folder.
        root: The folder of data sets; digits stand in for what is missing there, and the row says so.
        cases: What to train.

    Returns:
        A row for each case and method. Medians over rounds of the milliseconds of a step, and of the ratio of speeds
        within a round; `floor_ms`: the step's multiply-accumulates at the speed of one large matrix product.
    """
    peak = multiply_accumulates_per_second()
    return [_row(train, root, case, method, peak) for case in cases for method in METHODS]


def _row(train: Train, root: Path, case: TrainingCase, method: str, peak: float) -> dict[str, Any]:
    have = (root / f"{case.data}.npz").is_file()
    choice = [f"data={case.data}", f"data.root={root}"] if have else ["data=digits", f"data.size={case.size}"]
    limits: dict[str, Any] = {}
    if case.steps is not None and have:
        limits = {"train_images": case.steps * case.batch, "evaluation_images": 100}
    data = load_data(case.data if have else "digits", root, size=None if have else case.size, **limits)
    steps = len(data.train) // case.batch
    overrides = [*choice, *case.overrides, *(f"data.{key}={value}" for key, value in limits.items())]
    overrides += [f"method={method}", f"batch_size={case.batch}", f"lr={LR}", "max_epochs=1"]
    overrides += ["trainer.progress_bar=true", "trainer.accelerator=cpu"]
    bare, full = [], []
    for _ in range(case.rounds):
        bare.append(bare_epochs(case.build, method, data, case.batch) / steps)
        # The bar is drawn, but not on the table that this ends in.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), tempfile.TemporaryDirectory() as folder:
            result = train(overrides, Path(folder))
        full.append(result["timing"]["training_seconds"] / steps)
    network = case.build(data.shape, data.classes)
    floor = multiply_accumulates(network, method, (case.batch, *data.shape)) / peak
    return {
        "case": f"{case.name}, batch {case.batch}, {data.name}",
        "method": method,
        "bare_ms": 1000 * statistics.median(bare),
        "lightning_ms": 1000 * statistics.median(full),
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(bare, full, strict=True)),
        "floor_ms": 1000 * floor,
        "rounds": case.rounds,
        "steps": steps,
        "threads": torch.get_num_threads(),
    }


def bare_epochs(build: Build, method: str, data: DataSplits, size: int, epochs: int = 1) -> float:
    """Seconds of plain PyTorch, for batches of that size: index, normalise, forward, backward, step; no metric."""
    images, labels = data.train.x, data.train.y
    pixels = images.float().div_(255)
    std, mean = torch.std_mean(pixels, (0, 2, 3))
    shift, scale = (-mean / std).view(-1, 1, 1), (1 / (255 * std)).view(-1, 1, 1)
    step = STEPS[method](build(data.shape, data.classes))

    def train(steps: int) -> None:
        order = torch.randperm(len(labels))
        for start in range(0, steps * size, size):
            batch = order[start : start + size]
            step(torch.addcmul(shift, images[batch].float(), scale), labels[batch])

    train(STEPS_TO_WARM_UP)
    started = time.perf_counter()
    for _ in range(epochs):
        train(len(labels) // size)
    return time.perf_counter() - started


def bare_sgd(network: nn.Sequential) -> Step:
    """The loop of any tutorial."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)

    def step(x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def bare_bfp(network: nn.Sequential) -> Step:
    """Backforward Propagation by hand: what lies below the layer at hand is not computed again."""
    stages: list[nn.Sequential] = [nn.Sequential()]
    for child in network:
        if any(True for _ in child.parameters()) and any(True for _ in stages[-1].parameters()):
            stages.append(nn.Sequential())
        stages[-1].append(child)
    optimizers = [torch.optim.SGD(stage.parameters(), lr=LR) for stage in stages]

    def step(x: Tensor, y: Tensor) -> None:
        for k, (stage, optimizer) in enumerate(zip(stages, optimizers, strict=True)):
            out = x
            for above in stages[k:]:
                out = above(out)
            loss = F.cross_entropy(out, y)
            optimizer.zero_grad()
            loss.backward(inputs=list(stage.parameters()))
            optimizer.step()
            if k + 1 < len(stages):
                with torch.no_grad():
                    x = stage(x)

    return step


STEPS: dict[str, Callable[[nn.Sequential], Step]] = {"sgd": bare_sgd, "bfp": bare_bfp}


def multiply_accumulates(network: nn.Sequential, method: str, shape: tuple[int, ...]) -> int:
    """Of one step of the bare loop on a batch of that shape [N, C, H, W]."""
    step = STEPS[method](network)
    with FlopCounter() as counter:
        step(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64))
    return int(counter.get_total_flops()) // 2


def multiply_accumulates_per_second(size: int = 1024, rounds: int = 15) -> float:
    """Speed of one large float32 matrix product on the threads that training has: the attainable peak."""
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    out = torch.empty(size, size)
    timing = interleaved({"product": lambda: torch.mm(a, b, out=out)}, rounds)["product"]
    return size**3 / (min(timing.rounds) / 1000)
