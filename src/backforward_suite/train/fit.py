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
from backforward_suite.config import Request
from backforward_suite.data import DataSplits
from backforward_suite.errors import BadInput, cause_of
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
    """Build what was asked for, try it on a few images, and train it.

    Args:
        request: What was asked for.
        folder: As of `fit`.

    Raises:
        BadInput: Something asked for cannot be had.
    """
    with cli.refusing():
        module, loaders, arithmetic = assemble(request)
    return fit(request, module, loaders, folder, arithmetic)


def assemble(request: Request, data: DataSplits | None = None) -> tuple[Classification, InMemoryData, Arithmetic]:
    """A training that is ready to start: module, data, and what a batch costs.

    Args:
        request: What was asked for.
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
    """Train, evaluate on the test set once, and say what came of it.

    Args:
        request: What was asked for.
        module: Network, optimizer and update rule.
        loaders: The data.
        folder: Where curves and checkpoints go and where a half-done run goes on; None writes nothing.
        arithmetic: What a batch costs, as `Classification.rehearse` counts it.

    Returns:
        The content of `result.json`.

    Raises:
        BadInput: The folder holds a damaged checkpoint, or one of other settings, data or source.
    """
    settings = request.settings
    quiet_lightning()
    set_matmul_precision(settings.trainer.matmul_precision)
    if settings.trainer.precision == "64-true":
        module.double()  # Lightning converts it after it has restored a checkpoint, whose lower bits would be lost
    own = own_sources(request.values)
    devices = settings.trainer.devices
    # Lightning took it, as it was imported, from what a scheduler may have said of other processes.
    rank_zero_only.rank = rank(devices)  # type: ignore[attr-defined]
    if settings.capture != settings.trainer.capture and rank(devices) == 0:
        say_ordinary("the method draws anew for each batch" if settings.draws_anew else "diagnostics look into them")
    accelerator = _accelerator(settings.trainer.accelerator)
    if settings.trainer.precision == "bf16-mixed" and accelerator == "cpu" and emulates_bf16() and rank(devices) == 0:
        print("this CPU emulates bfloat16: trainer=cpu is faster", file=sys.stderr, flush=True)
    record = RunRecord(folder, settings.trainer.log_every_n_steps)
    diagnostics = Diagnostics(settings.diagnostics.when(), settings.diagnostics.samples, folder)
    # Before the record, so that the run's time includes their price.
    callbacks: list[L.Callback] = [diagnostics, record] if diagnostics.when else [record]
    stopping = Stopping(record, settings.stop_loss, settings.patience, settings.min_delta)
    callbacks.append(stopping)
    resume: Path | None = None
    logger: Logger | None = None
    if folder is not None:
        last = Checkpoints(
            folder,
            request,
            {"data": loaders.data.fingerprint, "own": own},
            agree_every=settings.trainer.log_every_n_steps,
        )
        callbacks.append(last)
        step = None
        if settings.go_on_from is not None and not last.path.exists():
            last.begin_from(Path(settings.go_on_from))
        if last.path.exists():
            resume, step = last.path, last.step_to_resume(module)
            if rank(devices) == 0:
                print(f"goes on from step {step}, where its last checkpoint was written", flush=True)
        logger = loggers.opened(folder, request, step)
    bar = shows_progress(settings)
    if bar:
        callbacks.append(ProgressBar())

    with tempfile.TemporaryDirectory() as nowhere:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            # Each rank keeps its own sums and statistics: DistributedDataParallel would overwrite them by the first's.
            strategy=DDPStrategy(broadcast_buffers=False) if devices > 1 else "auto",
            precision=settings.trainer.precision,
            max_epochs=settings.max_epochs,
            num_sanity_val_steps=-1,  # the whole validation set before training: epoch 0
            log_every_n_steps=loaders.steps_per_epoch,  # the record flushes the logger after each epoch
            use_distributed_sampler=False,  # the loader shares out each batch itself
            logger=logger or False,
            callbacks=callbacks,
            plugins=[WholeFileIO(), *_processes(devices)],
            enable_checkpointing=folder is not None,
            enable_progress_bar=bar,
            enable_model_summary=False,
            profiler=_profiler(settings.trainer.profiler, folder),
            default_root_dir=nowhere if folder is None else folder,
        )
        with _interruptible(), _writer_heard_once():
            with nullcontext() if resume is None else _fitting(last):
                trainer.fit(module, loaders, ckpt_path=resume, weights_only=True)
            final = dict(record.rows[-1])
            if not module.diverged:
                trainer.test(module, loaders, verbose=False)
                final |= module.evaluated
    if folder is not None and trainer.is_global_zero:
        record.write()  # and what was lost of them since the last checkpoint
        if diagnostics.when:
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
        {
            "seconds": record.elapsed(),
            "start_seconds": record.start_seconds,
            "training_seconds": record.seconds,
            "diagnostics_seconds": diagnostics.seconds,
            "diagnostics_times": diagnostics.times,
            "samples_per_second": record.samples / record.seconds if record.seconds else None,
        },
        own,
        devices=trainer.world_size,
    )


@contextmanager
def _fitting(last: Checkpoints) -> Iterator[None]:
    """Say in one line that a checkpoint does not fit: what Lightning raises while it restores one."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if last.restored or isinstance(error, BadInput | torch.OutOfMemoryError):
            raise
        raise last.does_not_fit(cause_of(error)) from None


@contextmanager
def _writer_heard_once() -> Iterator[None]:
    """Print no traceback of TensorBoard's writing thread: what the disk told it is raised here as well."""
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
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C be what it is: Lightning makes of it an exit with code 1, and has the process ignore a second one."""
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


def _profiler(kind: str | None, folder: Path | None) -> Profiler | None:
    """Lightning's profiler of that kind; its reports go to `fit-profile.txt` and `test-profile.txt` in the folder."""
    make = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return None if kind is None or folder is None else make[kind](dirpath=folder, filename="profile")


def _accelerator(asked: str) -> str:
    """A GPU is an NVIDIA one: Lightning's own `auto` and `gpu` also take Apple's, where nothing has been tried."""
    return "cuda" if asked == "gpu" or (asked == "auto" and torch.cuda.is_available()) else "cpu"


def _processes(devices: int) -> list[ClusterEnvironment]:
    """Who starts the processes of this run. Left to itself, Lightning takes any Slurm variable for a yes."""
    if made_by_slurm(devices):
        return [SLURMEnvironment(auto_requeue=False)]
    return [LightningEnvironment()] if "SLURM_JOB_ID" in os.environ else []
