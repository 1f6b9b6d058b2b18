"""One training, from its start or its last checkpoint to its result."""

from __future__ import annotations

import backforward_suite._torchvision  # noqa: F401  (before Lightning, which imports torchvision)

# isort: split
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

from backforward_suite import cli
from backforward_suite.build import Parts
from backforward_suite.config import Request, Settings
from backforward_suite.data import DataSplits
from backforward_suite.hardware import emulates_bf16
from backforward_suite.precision import set_matmul_precision
from backforward_suite.processes import made_by_slurm, rank
from backforward_suite.results import assembled, shows_progress
from backforward_suite.runs.files import Result
from backforward_suite.runs.identity import own_sources
from backforward_suite.train import loggers
from backforward_suite.train.bar import ProgressBar
from backforward_suite.train.callbacks.checkpoint import Checkpoints, WholeFileIO
from backforward_suite.train.callbacks.diagnostics import Diagnostics
from backforward_suite.train.callbacks.record import RunRecord
from backforward_suite.train.callbacks.stopping import Stopping
from backforward_suite.train.capture import say_ordinary
from backforward_suite.train.module import Arithmetic, Classification, InMemoryData, quiet_lightning


def train(request: Request, folder: Path | None) -> Result:
    """Build a training, try it on a few images, and run it.

    Args:
        request: The run's settings.
        folder: As for `fit`.

    Raises:
        BadInput: The settings cannot be met.
    """
    with cli.refusing():
        module, loaders, arithmetic = assemble(request)
    return fit(request, module, loaders, folder, arithmetic)


def assemble(request: Request, data: DataSplits | None = None) -> tuple[Classification, InMemoryData, Arithmetic]:
    """Return what a training needs: module, data, and the arithmetic of a batch.

    Args:
        request: The run's settings.
        data: The data set, if it is loaded already.
    """
    settings = request.settings
    parts = Parts(request, data)
    network = parts.network(settings.seed)
    module = Classification(
        network,
        make_optimizer=parts.optimizer,
        make_rule=parts.rule,
        make_schedule=parts.schedule,
        schedule_interval=settings.schedule.interval,
        after_update=parts.projection(network),
        check_every=settings.trainer.log_every_n_steps,
        seed=settings.seed,
        capture=settings.capture,
    )
    arithmetic = module.rehearse(*parts.few())
    loaders = InMemoryData(
        parts.data,
        settings.batch_size,
        seed=settings.seed,
        augment=settings.data.augment,
        shuffle=settings.data.shuffle,
        limit=settings.trainer.limit_train_batches,
    )
    return module, loaders, arithmetic


def fit(
    request: Request,
    module: Classification,
    loaders: InMemoryData,
    folder: Path | None,
    arithmetic: Arithmetic | None = None,
) -> Result:
    """Train, evaluate on the test set once, and return the result.

    Args:
        request: The run's settings.
        module: Network, optimizer and update rule.
        loaders: The data.
        folder: The folder of curves and checkpoints, where a half-done run resumes; None writes nothing.
        arithmetic: The cost of a batch, as counted by `Classification.rehearse`.

    Returns:
        The content of `result.json`.

    Raises:
        BadInput: The folder has a damaged checkpoint, or one of other settings, data or source.
    """
    settings = request.settings
    _set_up(settings, module)
    own = own_sources(request.values)
    record = RunRecord(folder, settings.trainer.log_every_n_steps)
    diagnostics = Diagnostics(settings.diagnostics.when(), settings.diagnostics.samples, folder)
    stopping = Stopping(record, settings.stop_loss, settings.patience, settings.min_delta)
    # Diagnostics before the record, so that the run's time includes them.
    callbacks: list[L.Callback] = [*([diagnostics] if diagnostics.when else []), record, stopping]
    last, logger = None, None
    if folder is not None:
        checkpoints = Checkpoints(folder, request, {"data": loaders.data.fingerprint, "own": own})
        callbacks.append(checkpoints)
        step = checkpoints.step_to_resume(module)
        last = None if step is None else checkpoints.path
        logger = loggers.opened(folder, request, step)
    with tempfile.TemporaryDirectory() as nowhere, _ctrl_c_as_python_has_it(), _disk_errors_of_tensorboard_once():
        trainer = _trainer(settings, callbacks, logger, loaders.steps_per_epoch, folder or Path(nowhere))
        with nullcontext() if last is None else checkpoints.fitting():
            trainer.fit(module, loaders, ckpt_path=last, weights_only=True)
        final = dict(record.rows[-1])
        if not module.diverged:
            trainer.test(module, loaders, verbose=False)
            final |= module.evaluated
    if trainer.is_global_zero:
        record.write()  # again: someone may have removed them since the last epoch
        diagnostics.write()
    if logger is not None and folder is not None:
        loggers.close(logger, folder, request, final, trainer.global_step)
    return assembled(
        {
            "status": "diverged" if module.diverged else "finished",
            **stopping.found,
            "final": final,
            "best": dict(record.best() or {}),
            "arithmetic": arithmetic or [],
            "parameters": sum(parameter.numel() for parameter in module.network.parameters()),
        },
        request,
        loaders.data,
        trainer.strategy.root_device,
        {**record.timing(), "diagnostics_seconds": diagnostics.seconds, "diagnostics_times": diagnostics.times},
        own,
        devices=trainer.world_size,
    )


def _set_up(settings: Settings, module: Classification) -> None:
    """Set global options of the process; print in one line which settings have no effect here."""
    quiet_lightning()
    set_matmul_precision(settings.trainer.matmul_precision)
    if settings.trainer.precision == "64-true":
        module.double()  # Lightning would convert it after loading a checkpoint, whose lower bits would be lost
    # Lightning set it on import from variables that a scheduler may have left for other processes.
    rank_zero_only.rank = rank(settings.trainer.devices)  # type: ignore[attr-defined]
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return
    if settings.capture != settings.trainer.capture:
        say_ordinary("the method draws anew for each batch" if settings.draws_anew else "diagnostics look into them")
    if settings.trainer.precision == "bf16-mixed" and _accelerator(settings) == "cpu" and emulates_bf16():
        print("this CPU emulates bfloat16: trainer=cpu is faster", file=sys.stderr, flush=True)


def _trainer(
    settings: Settings, callbacks: list[L.Callback], logger: Logger | None, steps_per_epoch: int, folder: Path
) -> L.Trainer:
    asked, bar = settings.trainer, shows_progress(settings)
    return L.Trainer(
        accelerator=_accelerator(settings),
        devices=asked.devices,
        # Each rank keeps its own sums and statistics: DistributedDataParallel would overwrite them by the first's.
        strategy=DDPStrategy(broadcast_buffers=False) if asked.devices > 1 else "auto",
        precision=asked.precision,
        max_epochs=settings.max_epochs,
        num_sanity_val_steps=-1,  # the whole validation set before training: epoch 0
        log_every_n_steps=steps_per_epoch,  # the record flushes the logger after each epoch
        use_distributed_sampler=False,  # the loader shares out each batch itself
        logger=logger or False,
        callbacks=[*callbacks, *([ProgressBar()] if bar else [])],
        plugins=[WholeFileIO(), *_cluster(asked.devices)],
        enable_checkpointing=any(isinstance(callback, Checkpoints) for callback in callbacks),
        enable_progress_bar=bar,
        enable_model_summary=False,
        profiler=_profiler(asked.profiler, folder),
        default_root_dir=folder,
    )


def _accelerator(settings: Settings) -> str:
    """Lightning's own `auto` and `gpu` include Apple's GPUs, on which nothing has been tried."""
    asked = settings.trainer.accelerator
    return "cuda" if asked == "gpu" or (asked == "auto" and torch.cuda.is_available()) else "cpu"


def _cluster(devices: int) -> list[ClusterEnvironment]:
    """Say who starts this run's processes: by itself, Lightning takes any Slurm variable for Slurm."""
    if made_by_slurm(devices):
        return [SLURMEnvironment(auto_requeue=False)]
    return [LightningEnvironment()] if "SLURM_JOB_ID" in os.environ else []


def _profiler(kind: str | None, folder: Path) -> Profiler | None:
    """Return Lightning's profiler, which writes `fit-profile.txt` and `test-profile.txt` in the folder."""
    make = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return None if kind is None else make[kind](dirpath=folder, filename="profile")


@contextmanager
def _disk_errors_of_tensorboard_once() -> Iterator[None]:
    """Print no traceback of TensorBoard's writing thread: a disk error there is raised in this thread as well."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def _ctrl_c_as_python_has_it() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C: Lightning exits with code 1 instead, and ignores a second Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise end.__context__ from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
