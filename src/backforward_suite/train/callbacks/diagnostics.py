"""Diagnostics in training: when each is due, and where its numbers go.

Measuring does not change the training: it uses a copy of the network and restores the random generators. What is due
depends on the count of batches alone, so an interrupted and resumed run measures at the same batches.
"""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn

from backforward.groups import Group
from backforward.rules import StepResult
from backforward.shift import Update, Watch, layers, undisturbed, write
from backforward_suite.data import Images
from backforward_suite.data.draws import first
from backforward_suite.runs.files import Measured, write_diagnostics
from backforward_suite.train.callbacks.measures import (
    CURVATURE_IMAGES,
    DIAGNOSTICS,
    Diagnostic,
    Held,
    Measure,
    Scene,
    WatchedBatch,
)
from backforward_suite.train.module import Batch, Classification, EachBatch, InMemoryData, wait_for

Occasion = Literal["epoch", "log"] | int

LOG_BASE = 4


def due(when: Sequence[Occasion], step: int, steps_per_epoch: int) -> bool:
    """Return whether a measurement is due after this batch.

    Args:
        when: `epoch`: before training and after the last batch of each epoch; `log`: after batch 1, 4, 16, 64, ...; a
            number n: after every n-th batch.
        step: Batches trained on so far, over all epochs.
        steps_per_epoch: Batches per epoch.
    """
    return any(_upcoming(occasion, step, steps_per_epoch) == step for occasion in when)


def _upcoming(occasion: Occasion, start: int, steps_per_epoch: int) -> int:
    """Return the first step >= `start` at which this occasion is due."""
    if occasion == "log":
        step = 1
        while step < start:
            step *= LOG_BASE
        return step
    every, first_of_all = (steps_per_epoch, 0) if occasion == "epoch" else (occasion, 1)
    return -(-max(start, first_of_all) // every) * every


class Diagnostics(EachBatch):
    """Measures what is due, and writes it to TensorBoard and `diagnostics.csv`.

    The rows are part of the checkpoint, as those of the run's record are.

    Args:
        when: By diagnostic, when it is due (see `due`); an empty list: never.
        samples: Validation images to measure on, class-balanced and always the same; None: all. Sharpness uses as many
            training images, but at most `CURVATURE_IMAGES`.
        folder: The folder of `diagnostics.csv`; None keeps the rows in memory only.

    Attributes:
        rows: One per number.
        seconds: Time of measuring, over all processes that have worked on the run: `start`, before the first batch,
            with the set-up; `batch`, within epochs; `epoch`, at the end of epochs, with writing the file.
        times: Number of measurements, likewise.
    """

    def __init__(self, when: Mapping[str, Sequence[Occasion]], samples: int | None, folder: Path | None) -> None:
        self.when = {key: list(when[key]) for key in DIAGNOSTICS if when.get(key)}
        self.diagnostics: dict[str, Diagnostic] = {key: DIAGNOSTICS[key]() for key in self.when}
        self.samples = samples
        self.folder = folder
        self.rows: list[Measured] = []
        self.seconds = {"start": 0.0, "batch": 0.0, "epoch": 0.0}
        self.times = dict.fromkeys(self.seconds, 0)
        self._next = (
            0  # the next step with something due; asking every diagnostic at each step costs a small network 1 %
        )
        self._keys: list[str] = []  # the diagnostics due then
        self._watch: Watch | None = None
        self._layers: list[Group] = []
        self._batch: Batch | None = None
        self._training: Held | None = None
        self._after_update: Callable[..., None] | None = None

    # --- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Observe the update rule through its `after_update` hook."""
        assert isinstance(module, Classification)
        if stage == "fit" and any("batch" in diagnostic.needs for diagnostic in self.diagnostics.values()):
            self._after_update = own = module.after_update

            def after_update(parameters: Sequence[nn.Parameter]) -> None:
                if own is not None:
                    own(parameters)
                if self._batch is not None:
                    assert self._watch is not None
                    self._watch.observe(parameters)

            module.after_update = after_update

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Stop observing the update rule."""
        assert isinstance(module, Classification)
        if stage == "fit":
            module.after_update = self._after_update

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Copy the network; measure before the first batch of the run."""
        assert isinstance(module, Classification)
        with self._timed(trainer, "start"):
            self._prepare(trainer, module)
        if trainer.global_step == 0:
            self._plan(trainer, 0)
            if self._next == 0:
                self._measure(trainer, module)
        self._plan(trainer, trainer.global_step + 1)

    def _prepare(self, trainer: L.Trainer, module: Classification) -> None:
        assert isinstance(trainer.datamodule, InMemoryData)  # type: ignore[attr-defined]
        data = trainer.datamodule.data  # type: ignore[attr-defined]
        self._validation = _held(data.validation, self.samples, module.device)
        if any("training images" in diagnostic.needs for diagnostic in self.diagnostics.values()):
            count = min(self.samples or CURVATURE_IMAGES, CURVATURE_IMAGES)
            self._training = _held(data.train, count, module.device)
        self._watch = Watch(module.network)
        with undisturbed(module.network):
            self._watch.replica.eval()
            x = self._validation.x[:2].to(next(module.network.parameters()).dtype) / 255
            self._layers = layers(self._watch.replica, x)
        if (writer := _writer(trainer)) is not None:
            charts = [chart for diagnostic in self.diagnostics.values() for chart in diagnostic.charts.items()]
            writer.add_custom_scalars(layout(dict(charts)))

    def before_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, step: int) -> None:
        """Watch the batch, if a diagnostic that needs it is due after it."""
        if step + 1 == self._next and self._of_batch():
            assert self._watch is not None
            with self._timed(trainer, self._occasion(trainer)):
                self._batch = batch
                self._watch.begin()

    def after_batch(self, trainer: L.Trainer, module: Classification, batch: Batch, out: StepResult, step: int) -> bool:
        """Measure what is due."""
        if step == self._next:
            self._measure(trainer, module, out.loss)
            self._batch = None
            self._plan(trainer, self._next + 1)
        return False

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write `diagnostics.csv`."""
        if trainer.is_global_zero:
            with self._timed(trainer, "epoch"):
                self.write()

    def write(self) -> None:
        """Write all rows to `diagnostics.csv`."""
        if self.folder is not None and self.when:
            write_diagnostics(self.folder, self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Return rows and times so far, and the diagnostics' own states."""
        memory = {key: diagnostic.state_dict() for key, diagnostic in self.diagnostics.items()}
        rows = [tuple(row) for row in self.rows]
        return {"rows": rows, "memory": memory, "seconds": dict(self.seconds), "times": dict(self.times)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.rows = [Measured(*row) for row in state["rows"]]
        self.seconds |= state.get("seconds", {})  # missing in an older version's
        self.times |= state.get("times", {})
        for key, memory in state["memory"].items():
            self.diagnostics[key].load_state_dict(memory)

    # --- the rest ----------------------------------------------------------------------------------------------------

    def _plan(self, trainer: L.Trainer, start: int) -> None:
        """Find the first step >= `start` after which something is due."""
        per_epoch = int(trainer.num_training_batches)
        steps = {}
        for key, when in self.when.items():
            begin = max(start, 1) if "batch" in self.diagnostics[key].needs else start
            steps[key] = min(_upcoming(occasion, begin, per_epoch) for occasion in when)
        self._next = min(steps.values())
        self._keys = [key for key, step in steps.items() if step == self._next]

    def _of_batch(self) -> list[str]:
        return [key for key in self._keys if "batch" in self.diagnostics[key].needs]

    def _occasion(self, trainer: L.Trainer) -> str:
        """Return the key of `seconds` for the next measurement."""
        return "batch" if self._next % int(trainer.num_training_batches) else "epoch" if self._next else "start"

    @contextmanager
    def _timed(self, trainer: L.Trainer, occasion: str) -> Iterator[None]:
        """Add the time of the body to `seconds`."""
        device = trainer.strategy.root_device
        wait_for(device)
        started = time.perf_counter()
        yield
        wait_for(device)
        self.seconds[occasion] += time.perf_counter() - started

    def _measure(self, trainer: L.Trainer, module: Classification, loss: Tensor | None = None) -> None:
        step, keys, of_batch, occasion = self._next, self._keys, self._of_batch(), self._occasion(trainer)
        watch = self._watch
        assert watch is not None
        measured: list[Measure] = []
        self.times[occasion] += 1
        with self._timed(trainer, occasion), undisturbed(module.network):
            if of_batch:
                assert loss is not None
                scene = self._scene(self._watched(trainer, watch.end(), loss))
                for key in of_batch:
                    measured += self.diagnostics[key].measure(scene)
            _mirror(module.network, watch.replica)
            scene = self._scene()
            writer = _writer(trainer)
            for key in keys:
                if key not in of_batch:
                    measured += self.diagnostics[key].measure(scene)
                    if writer is not None:
                        self.diagnostics[key].show(scene, writer, step)
            self._record(trainer, measured, step)

    def _watched(self, trainer: L.Trainer, updates: list[Update], loss_before: Tensor) -> WatchedBatch:
        assert self._batch is not None
        assert self._watch is not None
        x, y = self._batch

        def loss(replica: nn.Module) -> Tensor:
            with trainer.precision_plugin.train_step_context():
                return F.cross_entropy(replica(x), y)

        def mean(flat: Tensor) -> Tensor:
            return trainer.strategy.reduce(flat.clone(), reduce_op="mean")  # the strategy may reduce in place

        return WatchedBatch(self._watch, updates, loss, loss_before, mean if trainer.world_size > 1 else None)

    def _scene(self, batch: WatchedBatch | None = None) -> Scene:
        assert self._watch is not None
        return Scene(self._watch.replica, self._layers, self._validation, self._training, batch)

    def _record(self, trainer: L.Trainer, measured: list[Measure], step: int) -> None:
        if not measured:
            return
        # One read from the device for all values.
        device = next((m.value.device for m in measured if isinstance(m.value, Tensor)), None)
        values = torch.stack([torch.as_tensor(m.value, dtype=torch.float64, device=device) for m in measured]).tolist()
        epoch = -(-step // int(trainer.num_training_batches))
        self.rows += [
            Measured(epoch, step, m.name, m.layer, m.update, value) for m, value in zip(measured, values, strict=True)
        ]
        tags = [m.tag for m in measured]
        if (writer := _writer(trainer)) is not None:
            # One event for all values: one event each takes three times as long.
            scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in zip(tags, values, strict=True)]
            writer.file_writer.add_summary(Summary(value=scalars), step)
        elif trainer.logger is not None:
            trainer.logger.log_metrics(dict(zip(tags, values, strict=True)), step)


def _writer(trainer: L.Trainer) -> Any:
    """Return TensorBoard's writer; None with another logger, and on other ranks."""
    logger = trainer.logger
    return logger.experiment if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero else None


def layout(charts: Mapping[str, str]) -> dict[str, dict[str, list[Any]]]:
    """Return TensorBoard's custom layout: charts with a line for each layer and run.

    Args:
        charts: By title, the measure, as `group/quantity`.
    """
    titles = {"shift": "Covariate shift", "input": "Layer inputs", "gaussianity": "Layer inputs", "": "Weights"}
    found: dict[str, dict[str, list[Any]]] = {title: {} for title in titles.values()}
    for title, measure in charts.items():
        category = titles.get(measure.split("/")[0], titles[""])
        found[category][title] = ["Multiline", [f"^{measure}(/[^/]+)?$"]]
    return {title: charts_of_it for title, charts_of_it in found.items() if charts_of_it}


def _held(images: Images, count: int | None, device: torch.device) -> Held:
    """Return this many images, class-balanced."""
    if count is not None and count < len(images):
        chosen = np.flatnonzero(first(images.y.cpu().numpy(), count))
        images = images.take(torch.from_numpy(chosen).to(images.x.device))
    images = images.to(device)
    return Held(images.x, images.y)


def _mirror(network: nn.Module, replica: nn.Module) -> None:
    """Copy the network's weights and buffers into the replica, and set it to evaluation mode."""
    write([*replica.parameters(), *replica.buffers()], [*network.parameters(), *network.buffers()])
    replica.eval()
