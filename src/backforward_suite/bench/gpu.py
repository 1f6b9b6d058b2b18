"""Speed on a GPU: an epoch as in the paper and its share of the GPU's peak, and a whole run.

Each benchmark appends rows to a list as it goes, so that an interruption loses none of them. A dry run executes the
same code at toy size on any device. Only `run` needs more than torch, numpy and the library.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backforward.data_norm import DataNorm
from backforward.models import NIN, weight_decay_groups
from backforward.normprop import NormPropConv2d, unit_norm_projection
from backforward.rules import Backforward, Backprop, StepResult
from backforward_suite.bench.common import Row, available, data_overrides, train
from backforward_suite.bench.rules import multiply_accumulates
from backforward_suite.data import EpochLoader, Images, load_data
from backforward_suite.precision import set_matmul_precision
from backforward_suite.timing import Arm, interleaved
from backforward_suite.train.capture import WARM_UP, Captured, Record, Replay, record_cuda

Step = Callable[[Tensor, Tensor], StepResult]

PRECISIONS = ("fp32", "tf32", "bf16")
RULES: dict[str, type[Backprop | Backforward]] = {"sgd": Backprop, "bfp": Backforward}
CIFAR = (3, 32, 32)
PAPER_RATIO = 0.875  # Arpit et al., section 5.6: an epoch of 84 s against BatchNorm's 96 s


@dataclass(frozen=True)
class Conditions:
    """Where and how much to measure.

    Attributes:
        device: Where to compute.
        dry_run: Toy size.
        root: The folder of data sets.
        due: Value of `time.monotonic` after which no new row is begun.
    """

    device: torch.device
    dry_run: bool
    root: Path
    due: float

    @property
    def late(self) -> bool:
        """Whether time is up."""
        return time.monotonic() >= self.due


def attempt(setting: Conditions, rows: list[Row], labels: Row, body: Callable[[], Row | list[Row]]) -> None:
    """Append the rows that `body` returns, with these labels; or one row that tells the error, or says `not run`."""
    if setting.late:
        rows.append({**labels, "status": "not run"})
        return
    try:
        given = body()
        rows += [{**labels, "status": "measured", **row} for row in (given if isinstance(given, list) else [given])]
    except Exception as error:
        rows.append({**labels, "status": "failed", "error": last_line(error)})
    if setting.device.type == "cuda":  # free memory between rows
        gc.collect()
        torch.cuda.empty_cache()


def last_line(error: BaseException) -> str:
    """Return the kind of error and the first line of its message."""
    message = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextmanager
def precise(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in `fp32`, `tf32` (products alone) or `bf16` (products, by autocast); restore the settings afterwards."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def stepper(network: nn.Module, method: str, captured: bool = False) -> Step:
    """Return a training step as in the experiments: a captured one replays a CUDA graph, or raises an error."""
    optimizer = torch.optim.SGD(weight_decay_groups(network), lr=0.01, momentum=0.9, weight_decay=5e-4)
    projected = any(isinstance(module, NormPropConv2d) for module in network.modules())
    after_update = unit_norm_projection(network) if projected else None
    rule = RULES[method](network, optimizer, F.cross_entropy, after_update=after_update)
    record: Record = record_cuda if next(network.parameters()).is_cuda else _again
    return Captured(rule, optimizer, record, must=True).step if captured else rule.step


def _again(step: Callable[[], StepResult]) -> tuple[Replay, StepResult]:
    """Repeat the step itself where there are no CUDA graphs, in a dry run."""
    out = step()
    return (lambda: (step(), None)[1]), out


ARMS = {"none": ("none", "sgd"), "batch": ("batch", "sgd"), "prop": ("prop", "sgd"), "bfp": ("prop", "bfp")}


def epoch(setting: Conditions, rows: list[Row]) -> str | None:
    """Time an epoch of 45,000 images, data norm and loader included: each norm under SGD, and NormProp under BFP.

    One row per batch size, precision, and eager or captured steps; the four arms of a row run in turn. The share of the
    peak is the speed of the products and convolutions of an epoch against that of one large matrix product in the same
    precision. The paper's ratio of NormProp to BatchNorm at batch 50 is .875. The images are CIFAR-10's, or random
    bytes where the data folder lacks it: they make no difference to the time.
    """
    have = not setting.dry_run and available("cifar10", setting.root)
    count = 4 if setting.dry_run else 45_000
    x = torch.randint(256, (count, *CIFAR), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = load_data("cifar10", setting.root).train if have else Images(x, torch.arange(count) % 10)
    images = images.to(setting.device)
    for size, precision, captured in product((2,) if setting.dry_run else (50, 1000), PRECISIONS, (False, True)):
        labels = {"precision": precision, "captured": captured, "batch_size": size, "images": count}
        attempt(setting, rows, labels, partial(_epoch, setting, images, size, precision, captured))
    found = [
        f"{row['precision']}{' captured' * row['captured']} {row['prop_s']:.2f} s, prop/batch {row['prop/batch']:.3f},"
        f" bfp/sgd {row['bfp/sgd']:.2f}"
        for row in rows
        if "prop_s" in row and row["batch_size"] == 50
    ]
    return f"{'; '.join(found)} (paper's prop/batch {PAPER_RATIO})" if found else None


def _epoch(setting: Conditions, images: Images, size: int, precision: str, captured: bool) -> Row:
    loader = EpochLoader(images, size, device=setting.device)

    def whole_epoch(step: Step) -> None:
        for x, y in loader:
            step(x, y)

    arms: dict[str, Arm] = {}
    macs: dict[str, int] = {}
    width = 0.02 if setting.dry_run else 1.0
    with precise(precision, setting.device):
        x, y = next(iter(loader))
        for name, (norm, method) in ARMS.items():
            network = nn.Sequential(DataNorm("batch", shape=CIFAR), NIN(CIFAR, 10, width, norm, seed=0)).to(
                setting.device
            )
            macs[name] = multiply_accumulates(partial(stepper(network, method), x[:2], y[:2])) * len(images) // 2
            step = stepper(network, method, captured)
            for _ in range(WARM_UP + 1):
                step(x, y)
            arms[name] = partial(whole_epoch, step)
        times = interleaved(arms, rounds=1, device=setting.device, calls=1)
    seconds = {name: timing.median / 1000 for name, timing in times.items()}
    peak = multiply_accumulates_per_second(setting, precision)
    return {
        **{f"{name}_s": value for name, value in seconds.items()},
        **{f"{name}_share_of_peak": macs[name] / seconds[name] / peak for name in arms},
        "prop/batch": seconds["prop"] / seconds["batch"],
        "bfp/sgd": seconds["bfp"] / seconds["prop"],
        "peak_tflops": 2 * peak / 1e12,
    }


def multiply_accumulates_per_second(setting: Conditions, precision: str) -> float:
    """Return the speed of one large matrix product."""
    size = 64 if setting.dry_run else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, out = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(3))
    with precise("fp32" if precision == "bf16" else precision, setting.device):
        times = interleaved({"product": lambda: torch.mm(a, b, out=out)}, 5, device=setting.device, calls=2)
    return size**3 / (min(times["product"].rounds) / 1000)


def run(setting: Conditions, rows: list[Row]) -> str | None:
    """Time an epoch of a run as the command line starts it: NIN with NormProp, batch 50, with TensorBoard and the bar.

    Enlarged digits replace CIFAR-10 where it is missing.
    """
    for needed in ("hydra", "pydantic", "sklearn", "tensorboard", "backforward_suite.train.fit"):
        import_module(needed)  # the part is skipped where one of these is missing
    for precision, method in (("tf32", "sgd"), ("tf32", "bfp"), ("fp32", "sgd")):
        attempt(setting, rows, {"precision": precision, "method": method}, partial(_run, setting, precision, method))
    found = [f"{row['precision']} {row['method']} {row['epoch_s']:.2f} s" for row in rows if "epoch_s" in row]
    return f"an epoch: {', '.join(found)}" if found else None


def _run(setting: Conditions, precision: str, method: str) -> Row:
    chosen = data_overrides("cifar10", Path() if setting.dry_run else setting.root)
    if setting.device.type == "cuda":
        chosen += ["trainer=gpu_tf32" if precision == "tf32" else "trainer=gpu", "trainer.capture=on"]
    if setting.dry_run:
        chosen += ["model.width=0.02", "data.train_images=100", "data.evaluation_images=20"]
    chosen += ["model=nin", "norm=prop", "optimizer=sgd_momentum", "weight_decay=5e-4", "lr=0.01", "batch_size=50"]
    one, three = (train([*chosen, f"method={method}", f"max_epochs={epochs}"]) for epochs in (1, 3))
    # The difference leaves out what happens once, such as the recording of steps.
    seconds = (three["timing"]["training_seconds"] - one["timing"]["training_seconds"]) / 2
    return {"data": three["data"]["name"], "images": three["data"]["train"], "epoch_s": seconds}
