"""What a GPU makes of training: images/s and share of its peak, an epoch as in the paper, a whole run.

Each benchmark appends rows to a list as it goes, so that what was measured stays if it is cut off. A dry run takes the
same way on any device at toy size, and leaves every figure out.

Depends on torch, numpy and the library alone, so that it runs where little else is installed; only a whole run needs
all that runs need.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backforward.data_norm import DataNorm
from backforward.flops import FlopCounter
from backforward.models import NIN, weight_decay_groups
from backforward.models.blocks import NORMS
from backforward.normprop import NormPropConv2d, unit_norm_projection
from backforward.rules import Backforward, Backprop, StepResult
from backforward_suite.data import EpochLoader, Images, load_data
from backforward_suite.precision import set_matmul_precision
from backforward_suite.timing import Arm, Timing, interleaved
from backforward_suite.train.capture import WARM_UP, Captured, Record, Replay, record_cuda

Row = dict[str, Any]
Step = Callable[[Tensor, Tensor], StepResult]

PRECISIONS = ("fp32", "tf32", "bf16")
RULES: dict[str, type[Backprop | Backforward]] = {"sgd": Backprop, "bfp": Backforward}
CONF = Path(__file__).resolve().parents[3] / "conf"
CIFAR = (3, 32, 32)
LAYOUTS = ("channels last", "contiguous")  # of filters and activations; the first is NIN's own
EPOCH_IMAGES = 45_000
PAPER_RATIO = 0.875  # Arpit et al., section 5.6: an epoch of 84 s against BatchNorm's 96 s
FEW = 2  # images of the step whose arithmetic is counted


@dataclass(frozen=True)
class Conditions:
    """Where and how much.

    Attributes:
        device: Where to compute.
        dry_run: Toy size, no figures.
        root: The folder of data sets.
        due: Reading of `time.monotonic` after which no new row is begun.
    """

    device: torch.device
    dry_run: bool
    root: Path
    due: float

    def figure(self, value: float) -> float | None:
        """A measured value; none in a dry run."""
        return None if self.dry_run else value

    @property
    def late(self) -> bool:
        """Whether time is up."""
        return time.monotonic() >= self.due


def attempt(setting: Conditions, rows: list[Row], labels: Row, body: Callable[[], Row | list[Row]]) -> None:
    """Append the row or rows that `body` gives, after `labels`; if it fails, a row that says so; if late, one too."""
    if setting.late:
        rows.append({**labels, "status": "not run"})
        return
    try:
        given = body()
        rows += [{**labels, "status": "measured", **row} for row in (given if isinstance(given, list) else [given])]
    except Exception as error:
        rows.append({**labels, "status": "failed", "error": last_line(error)})
    if setting.device.type == "cuda":  # what a row held is not the next one's to go without
        gc.collect()
        torch.cuda.empty_cache()


def last_line(error: BaseException) -> str:
    """What stands in the last line of a traceback: the kind of error and the first line of what it says."""
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextmanager
def precise(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in `fp32`, `tf32` (products alone) or `bf16` (products, by autocast); afterwards as before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# --- images/s and the share of the peak ------------------------------------------------------------------------------


def steps(setting: Conditions, rows: list[Row]) -> str | None:
    """A training step of NIN: norm x rule x batch x precision, eager and captured, against the device's own peak.

    Momentum, weight decay and NormProp's projection included, images on the device. `mfu` is the step's floating-point
    operations (two for each multiply-accumulate of products and convolutions, as carried out) over its time and over
    the speed of one large matrix product in the same precision.
    """
    peaks: dict[str, float] = {}
    batches = (2,) if setting.dry_run else (50, 100, 1000)
    for batch, precision, method in product(batches, PRECISIONS, RULES):
        labels = {"precision": precision, "batch": batch, "method": method}

        def body(batch: int = batch, precision: str = precision, method: str = method) -> list[Row]:
            if precision not in peaks:
                peaks[precision] = peak(setting, precision)
            return _steps(setting, precision, batch, method, peaks[precision])

        attempt(setting, rows, labels, body)
    best = max((row["mfu"] for row in rows if row.get("mfu") is not None), default=None)
    return None if best is None else f"best share of the peak: {best:.2f}"


def peak(setting: Conditions, precision: str) -> float:
    """Floating-point operations a second of one large matrix product."""
    size = 64 if setting.dry_run else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, out = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(3))
    with precise(precision, setting.device), torch.autocast(setting.device.type, enabled=False):
        timing = interleaved({"product": lambda: torch.mm(a, b, out=out)}, *_repeats(setting), setting.device)
    return 2 * size**3 / (min(timing["product"].rounds) / 1000)


def _steps(setting: Conditions, precision: str, batch: int, method: str, peak: float) -> list[Row]:
    x = torch.randn(batch, *CIFAR, generator=torch.Generator().manual_seed(0)).to(setting.device)
    y = (torch.arange(batch) % 10).to(setting.device)
    arms: dict[str, Arm] = {}
    rows: dict[str, Row] = {}
    with precise(precision, setting.device):
        for layout, norm, captured in product(LAYOUTS, NORMS, (False, True)):
            if layout != LAYOUTS[0] and (norm, method) != ("none", "sgd"):
                continue
            name = f"{norm}, {layout}, {'captured' if captured else 'eager'}"
            rows[name] = {"norm": norm, "captured": captured, "layout": layout}
            try:
                network = nin(setting, norm)
                if layout == "contiguous":
                    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
                flops = counted(network, method, x[:FEW]) * batch / FEW
                step = stepper(network, method, captured, setting.device)
                arms[name] = warmed(partial(step, x, y))
                rows[name] |= {"flops": flops}
            except Exception as error:  # of this arm alone
                rows[name] |= {"status": "failed", "error": last_line(error)}
        times = interleaved(arms, *_repeats(setting), setting.device) if arms else {}
    for name, timing in times.items():
        seconds = timing.median / 1000
        rows[name] |= {
            "ms": setting.figure(timing.median),
            "ms_spread": setting.figure(timing.spread),
            "images_per_second": setting.figure(batch / seconds),
            "mfu": setting.figure(rows[name]["flops"] / seconds / peak),
            "peak_tflops": setting.figure(peak / 1e12),
        }
    return list(rows.values())


def nin(setting: Conditions, norm: str, data_norm: nn.Module | None = None) -> nn.Module:
    """The Network in Network on the device; with a data norm in front if there is one."""
    network: nn.Module = NIN(CIFAR, 10, 0.02 if setting.dry_run else 1.0, norm, seed=0)
    if data_norm is not None:
        network = nn.Sequential(OrderedDict(data_norm=data_norm, model=network))
    return network.to(setting.device)


def counted(network: nn.Module, method: str, x: Tensor) -> int:
    """Floating-point operations of a step on these images; the weights move."""
    step = stepper(network, method, captured=False, device=x.device)
    with FlopCounter() as counter:
        step(x, torch.arange(len(x), device=x.device) % 10)
    return int(counter.get_total_flops())


def stepper(network: nn.Module, method: str, captured: bool, device: torch.device) -> Step:
    """A training step as the experiments have it; captured, or refused."""
    optimizer = torch.optim.SGD(weight_decay_groups(network), lr=0.01, momentum=0.9, weight_decay=5e-4)
    projected = any(isinstance(module, NormPropConv2d) for module in network.modules())
    after_update = unit_norm_projection(network) if projected else None
    rule = RULES[method](network, optimizer, F.cross_entropy, after_update=after_update)
    return Captured(rule, optimizer, recording(device), must=True).step if captured else rule.step


def recording(device: torch.device) -> Record:
    """What records a step there; where there are no CUDA graphs, what runs it again."""
    return record_cuda if device.type == "cuda" else _again


def _again(step: Callable[[], StepResult]) -> tuple[Replay, StepResult]:
    out = step()

    def replay() -> None:
        step()

    return replay, out


def warmed(arm: Arm) -> Arm:
    """The same, called until it is recorded if it is to be."""
    for _ in range(WARM_UP + 1):
        arm()
    return arm


def _repeats(setting: Conditions) -> tuple[int, float]:
    """Rounds, and seconds of a turn."""
    return (1, 0.0) if setting.dry_run else (5, 0.1)


# --- an epoch as in the paper ----------------------------------------------------------------------------------------


EPOCHS_OF = {"prop": ("prop", "sgd"), "batch": ("batch", "sgd"), "bfp": ("prop", "bfp")}  # norm, update rule


def epoch(setting: Conditions, rows: list[Row]) -> str | None:
    """An epoch of 45,000 images at batch 50, data norm and loader included: NormProp, BatchNorm, and BFP, in turn.

    The paper's ratio of NormProp to BatchNorm, both under SGD, is .875; `bfp` is NormProp under BFP. Images are
    CIFAR-10's where it is in the data folder, else random bytes: of no effect on time.
    """
    images, source = epoch_images(setting)
    for precision in PRECISIONS[:2]:
        labels = {"precision": precision, "images": len(images), "data": source}
        attempt(setting, rows, labels, partial(_epochs, setting, images, precision))
    found = [
        f"{row['precision']} {row['prop_s']:.2f} s, prop/batch {row['ratio']:.3f}, bfp/sgd {row['bfp_ratio']:.2f}"
        for row in rows
        if row.get("ratio") is not None and row.get("bfp_ratio") is not None
    ]
    return f"eager, then captured: {'; '.join(found)} (paper's prop/batch {PAPER_RATIO})" if found else None


def epoch_images(setting: Conditions) -> tuple[Images, str]:
    """What an epoch runs over, on the device, and whence."""
    if not setting.dry_run and (setting.root / "cifar10.npz").is_file():
        return load_data("cifar10", setting.root).train.to(setting.device), "cifar10"
    count, generator = 4 if setting.dry_run else EPOCH_IMAGES, torch.Generator().manual_seed(0)
    x = torch.randint(256, (count, *CIFAR), dtype=torch.uint8, generator=generator)
    return Images(x, torch.arange(count) % 10).to(setting.device), "random"


def _epochs(setting: Conditions, images: Images, precision: str) -> list[Row]:
    size = 2 if setting.dry_run else 50
    loader = EpochLoader(images, size, device=setting.device)

    def whole_epoch(step: Step) -> None:
        for x, y in loader:
            step(x, y)

    arms: dict[tuple[str, bool], Arm] = {}
    rounds: dict[tuple[str, bool], list[float]] = {}
    errors: dict[tuple[str, bool], str] = {}
    with precise(precision, setting.device):
        x, y = next(iter(loader))
        for (name, (norm, method)), captured in product(EPOCHS_OF.items(), (False, True)):
            key = name, captured
            try:
                network = nin(setting, norm, DataNorm("batch", shape=CIFAR))
                step = stepper(network, method, captured, setting.device)
                warmed(partial(step, x, y))
                arms[key], rounds[key] = partial(whole_epoch, step), []
            except Exception as error:  # of this arm alone
                errors[key] = last_line(error)
        names = {f"{name} {captured}": (name, captured) for name, captured in arms}
        for number in range(1 if setting.dry_run else 3):
            if number and setting.late:
                break
            # Backforward's epochs are long; one is enough for a ratio of three.
            timed = {name: key for name, key in names.items() if key[0] != "bfp" or not number}
            times = interleaved({name: arms[key] for name, key in timed.items()}, 1, 0, setting.device, calls=1)
            for name, key in timed.items():
                rounds[key] += times[name].rounds
    rows: list[Row] = []
    for captured in (False, True):
        row: Row = {"captured": captured, "rounds": len(rounds.get(("prop", captured), []))}
        for name in EPOCHS_OF:
            if (name, captured) in errors:
                row |= {"status": "failed", "error": errors[name, captured]}
            else:
                row[f"{name}_s"] = setting.figure(statistics.median(rounds[name, captured]) / 1000)
        times_of = {name: Timing(tuple(rounds.get((name, captured), ()))) for name in EPOCHS_OF}
        for ratio, ours, theirs in (("ratio", "prop", "batch"), ("bfp_ratio", "bfp", "prop")):
            if (count := len(times_of[ours].rounds)) and times_of[theirs].rounds:
                row[ratio] = setting.figure(times_of[ours].ratio(Timing(times_of[theirs].rounds[:count])))
        rows.append({**row, "paper_ratio": PAPER_RATIO})
    return rows


# --- a whole run -----------------------------------------------------------------------------------------------------


def run(setting: Conditions, rows: list[Row]) -> str | None:
    """An epoch of a run as the command line gives it: NIN with NormProp, batch 50, TensorBoard, bar and record on.

    Needs all that a run needs. Digits enlarged stand in where CIFAR-10 is missing.
    """
    for needed in ("hydra", "pydantic", "sklearn", "tensorboard", "backforward_suite.train.fit"):
        import_module(needed)  # where one of these is missing, this part is skipped

    for precision, method in (("tf32", "sgd"), ("tf32", "bfp"), ("fp32", "sgd")):
        attempt(setting, rows, {"precision": precision, "method": method}, partial(_run, setting, precision, method))
    found = [
        f"{row['precision']} {row['method']} {row['epoch_s']:.2f} s"
        for row in rows
        if row.get("epoch_s") is not None and row["data"] == "cifar10"
    ]
    return f"an epoch of 45,000 images: {', '.join(found)}" if found else None


def _run(setting: Conditions, precision: str, method: str) -> Row:
    """What two epochs add to one, halved: without what is made once, the recording of steps among it."""
    have = not setting.dry_run and (setting.root / "cifar10.npz").is_file()
    chosen = ["data=cifar10", f"data.root={setting.root}"] if have else ["data=digits", "data.size=32"]
    if setting.device.type == "cuda":
        chosen += ["trainer=gpu_tf32" if precision == "tf32" else "trainer=gpu", "trainer.capture=on"]
    if setting.dry_run:
        chosen += ["model.width=0.02", "data.train_images=100", "data.evaluation_images=20"]
    chosen += ["model=nin", "norm=prop", "optimizer=sgd_momentum", "weight_decay=5e-4", "lr=0.01", "batch_size=50"]
    chosen += [f"method={method}", "trainer.progress_bar=true"]
    one, three = (_trained([*chosen, f"max_epochs={epochs}"]) for epochs in (1, 3))
    seconds = three["timing"]["training_seconds"] - one["timing"]["training_seconds"]
    return {
        "data": three["data"]["name"],
        "images": three["data"]["train"],
        "epoch_s": setting.figure(seconds / 2),
    }


def _trained(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir

    from backforward_suite.run import train

    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), tempfile.TemporaryDirectory() as folder:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=overrides)
        return train(cfg, Path(folder))
