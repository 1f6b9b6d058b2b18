"""What Lightning, TensorBoard, the bar and the record cost: steps/s of a whole run against a bare loop."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from backforward.data import DataSplits, load_data
from backforward.runs import Result

ROUNDS = 5
BATCH = 64
STEPS_TO_WARM_UP = 50

Train = Callable[[list[str], Path], Result]  # overrides, folder -> result


def run(train: Train, root: Path) -> dict[str, Any]:
    """Time an epoch of the MLP 784-256-10 with SGD, by hand and through `train`, in turn.

    Args:
        train: Trains one run from overrides in a folder.
        root: The folder of data sets; without MNIST there, digits enlarged to 28 x 28 stand in, and the row says so.

    Returns:
        Medians over rounds: steps/s of both, and their ratio in each round.
    """
    have_mnist = (root / "mnist.npz").is_file()
    data = load_data("mnist", root) if have_mnist else load_data("digits", root, size=28)
    choice = ["data=mnist", f"data.root={root}"] if have_mnist else ["data=digits", "data.size=28"]
    epochs = 1 if have_mnist else 40  # as many steps
    steps = epochs * (len(data.train) // BATCH)
    bare, full = [], []
    for _ in range(ROUNDS):
        bare.append(steps / bare_loop(data, epochs))
        with tempfile.TemporaryDirectory() as folder:
            overrides = [
                *choice,
                "method=sgd",
                f"batch_size={BATCH}",
                f"max_epochs={epochs}",
                "trainer.progress_bar=true",
            ]
            # The bar is drawn, but not on the table that this ends in.
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
                result = train([*overrides, "trainer.accelerator=cpu"], Path(folder))
        full.append(steps / result["timing"]["training_seconds"])
    return {
        "case": f"mlp, batch {BATCH}, {data.name}",
        "bare_steps_per_second": statistics.median(bare),
        "lightning_steps_per_second": statistics.median(full),
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(full, bare, strict=True)),
        "rounds": ROUNDS,
        "steps": steps,
        "threads": torch.get_num_threads(),
    }


def bare_loop(data: DataSplits, epochs: int) -> float:
    """Seconds of plain PyTorch for the same steps: index, normalise, forward, backward, SGD; no metric is kept."""
    images, labels = data.train.x, data.train.y
    pixels = images.float().div_(255)
    shift, scale = -pixels.mean() / pixels.std(), 1 / (255 * pixels.std())
    features = images[0].numel()
    network = nn.Sequential(nn.Flatten(), nn.Linear(features, 256), nn.ReLU(), nn.Linear(256, data.classes))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def epoch(steps: int) -> None:
        order = torch.randperm(len(labels))
        for start in range(0, steps * BATCH, BATCH):
            batch = order[start : start + BATCH]
            x = torch.addcmul(shift, images[batch].float(), scale)
            loss = F.cross_entropy(network(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    epoch(STEPS_TO_WARM_UP)
    started = time.perf_counter()
    for _ in range(epochs):
        epoch(len(labels) // BATCH)
    return time.perf_counter() - started
