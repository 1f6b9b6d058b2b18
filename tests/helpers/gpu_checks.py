"""What `src/gpu_check.py` checks on a device: oracle comparisons, recorded steps, memory, several GPUs.

Needs torch and the library alone. Products of float64 leave no room for an excuse: what differs there by more than
rounding is wrong. Float32 is judged more loosely, as rounding grows with every step.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.helpers.problems import OPTIMIZERS, PROBLEMS, Problem
from tests.oracles.naive_rules import backforward_batch
from tests.oracles.normprop import literal
from tests.oracles.ranks import mean_over_ranks
from tests.oracles.recording import again
from torch import Tensor, nn

from backforward.models import MLP, NIN
from backforward.models.blocks import NORMS
from backforward.moments import ACTIVATIONS
from backforward.normprop import NormPropConv2d, NormPropLinear, unit_norm_projection
from backforward.rules import Backforward, Backprop, Rule
from backforward_suite.bench.common import Row
from backforward_suite.bench.gpu import RULES, Conditions, attempt, precise
from backforward_suite.data import DataSplits, EpochLoader, Images
from backforward_suite.train.capture import WARM_UP, Captured, Record, record_cuda, set_capturable
from backforward_suite.train.readings import Readings

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
DRAWS = {"dropout", "transformer", "functional", "opaque", "recurrent"}  # the written-out oracle draws on the host
FORMS = RULES | {  # update rules whose steps are recorded
    "sgd_repeat": partial(Backprop, repeats=2),
    "bfp_poster": partial(Backforward, joint_pass=True),
    "bfp_naive": partial(Backforward, engine="naive"),
}
TOY = {"mlp", "residual", "dropout", "two-inputs", "recurrent"}  # of a dry run
ON_THE_HOST = {"functional", "opaque"}  # their own forward makes a tensor there


def deviation(ours: Any, theirs: Any) -> float:
    """The largest over tensors of ||ours - theirs|| / ||theirs||, of values in a dictionary or one after the other."""
    pairs = [(ours[key], theirs[key]) for key in theirs] if isinstance(theirs, dict) else zip(ours, theirs, strict=True)
    found = [0.0]
    for one, other in pairs:
        difference = (one.detach().double() - other.detach().double()).norm()
        found.append(float(difference / other.detach().double().norm().clamp(min=1e-6)))
    return math.nan if any(math.isnan(value) for value in found) else max(found)


def judged(found: float, tolerance: float) -> Row:
    """A row of a comparison; a deviation that is no number is written as None."""
    status = "passed" if found <= tolerance else "failed"
    return {"status": status, "deviation": found if math.isfinite(found) else None, "tolerance": tolerance}


def of_all(rows: list[Row]) -> str:
    """How many passed, and the largest deviation."""
    ran = [row for row in rows if row["status"] != "not run"]
    passed = sum(row["status"] == "passed" for row in ran)
    worst = max((row["deviation"] for row in ran if row.get("deviation") is not None), default=0.0)
    left = f", {len(rows) - len(ran)} not run" if len(rows) > len(ran) else ""
    return f"{passed} of {len(ran)} passed{left}, largest deviation {worst:.1e}"


def moved(value: Any, device: torch.device) -> Any:
    """A batch on the device, floats in float64."""
    if isinstance(value, tuple):
        return tuple(moved(each, device) for each in value)
    return value.to(device, torch.float64) if value.is_floating_point() else value.to(device)


def projector(network: nn.Module) -> Any:
    """NormProp's projection, where there is something to project."""
    holds = any(isinstance(module, NormPropConv2d | NormPropLinear) for module in network.modules())
    return unit_norm_projection(network) if holds else None


# --- update rules ----------------------------------------------------------------------------------------------------


def rules(setting: Conditions, rows: list[Row]) -> str:
    """Replay = naive = Backforward Propagation written out, on the table of test problems; and on NIN in float32."""
    optimizers = ("nesterov",) if setting.dry_run else ("sgd", "nesterov", "adam")
    for norm in NORMS[-1:] if setting.dry_run else NORMS:
        attempt(setting, rows, {"problem": f"nin, {norm}, fp32", "optimizer": "nesterov"}, partial(_nin, setting, norm))
    for optimizer, problem in product(optimizers, PROBLEMS):
        left_out = problem.id not in TOY if setting.dry_run else problem.id in ON_THE_HOST
        if problem.traceable and not left_out:
            labels = {"problem": problem.id, "optimizer": optimizer}
            attempt(setting, rows, labels, partial(_engines, setting, problem, optimizer))
    return of_all(rows)


def _engines(setting: Conditions, problem: Problem, optimizer: str) -> Row:
    batches = [moved(problem.batch(i), setting.device) for i in range(3)]

    def trained(engine: str) -> nn.Module:
        model = problem.model().to(setting.device, torch.float64)
        opt = OPTIMIZERS[optimizer](list(model.parameters()))
        rule = None if engine == "oracle" else Backforward(model, opt, problem.loss, engine=engine)
        torch.manual_seed(3)
        for x, y in batches:
            if rule is None:
                groups = list(problem.groups.values())
                backforward_batch(model, opt, problem.loss, x, y, groups, problem.statistics)
            else:
                rule.step(x, y)
        return model

    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = problem.id != "recurrent"  # cuDNN keeps the state of an LSTM's dropout to itself
    try:
        replay, naive = trained("replay").state_dict(), trained("naive").state_dict()
        row = {"bitwise": all(torch.equal(replay[key], naive[key]) for key in naive)}
        found = deviation(replay, naive)
        if problem.id not in DRAWS:
            row["oracle"] = True
            found = max(found, deviation(naive, trained("oracle").state_dict()))
    finally:
        torch.backends.cudnn.enabled = before
    return row | judged(found, TOLERANCE[torch.float64])


def _nin(setting: Conditions, norm: str) -> Row:
    ends = []
    x, y = _images(setting.device, torch.float32, 0)
    with precise("fp32", setting.device):
        for engine in ("replay", "naive"):
            network = NIN((3, 32, 32), 10, 0.05, norm, seed=0).to(setting.device)
            optimizer = OPTIMIZERS["nesterov"](list(network.parameters()))
            rule = Backforward(network, optimizer, F.cross_entropy, engine=engine, after_update=projector(network))
            for _ in range(2):
                rule.step(x, y)
            ends.append(network.state_dict())
    bitwise = all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    return {"bitwise": bitwise} | judged(deviation(*ends), TOLERANCE[torch.float32])


def _images(device: torch.device, dtype: torch.dtype, seed: int, count: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return x.to(device), ((torch.arange(count) + seed) % 10).to(device)


# --- NormProp --------------------------------------------------------------------------------------------------------


def normprop(setting: Conditions, rows: list[Row]) -> str:
    """Folded = literal: outputs and gradients of a linear layer and of a convolution, with every activation."""
    activations = ("relu", "prelu") if setting.dry_run else tuple(ACTIVATIONS)
    for dtype, kind, activation in product(TOLERANCE, ("linear", "conv"), activations):
        labels = {"layer": kind, "activation": activation, "dtype": str(dtype).removeprefix("torch.")}
        attempt(setting, rows, labels, partial(_folded, setting, kind, activation, dtype))
    return of_all(rows)


def _folded(setting: Conditions, kind: str, activation: str, dtype: torch.dtype) -> Row:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(setting.device, dtype)

    layer: NormPropLinear | NormPropConv2d
    if kind == "linear":
        layer, x = NormPropLinear(24, 16, activation=activation), noise(32, 24)
    else:
        layer, x = NormPropConv2d(3, 8, 3, padding=1, activation=activation), noise(4, 3, 9, 9)
    layer.to(setting.device, dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            near = 0.3 + 0.2 * noise(*parameter.shape) if parameter is layer.slope else 0.3 * noise(*parameter.shape)
            parameter.copy_(near if parameter is layer.slope else parameter + near)
    arguments: list[Tensor] = []

    def act(u: Tensor) -> Tensor:
        arguments.append(u)
        return layer.activation(u.clone()) if layer.slope is None else F.prelu(u, layer.slope)

    x.requires_grad_()
    with precise("fp32", setting.device):
        got, expected = layer(x), literal(layer, x, act)
        upstream = noise(*got.shape)
        upstream[arguments[0].abs() < 1e-5] = 0  # at the kink a rounding error turns the gradient on or off
        inputs = [x, *layer.parameters()]
        gradients = [torch.autograd.grad(each, inputs, upstream) for each in (got, expected)]
    found = deviation([got, *gradients[0]], [expected, *gradients[1]])
    return judged(found, {torch.float64: 1e-9, torch.float32: 1e-4}[dtype])


# --- recorded steps --------------------------------------------------------------------------------------------------


def capture(setting: Conditions, rows: list[Row]) -> str:
    """Steps replayed from a recording = ordinary ones: losses, outputs and weights, to rounding.

    By an optimizer that counts its steps; after a rate has moved; and where a step
    cannot be recorded. And an epoch in which nothing waits for the GPU.
    """
    networks = [("mlp", "prop"), ("nin", "batch")] if setting.dry_run else [*product(("mlp", "nin"), NORMS)]
    for (name, norm), method, dtype in product(networks, RULES, TOLERANCE):
        labels = {"network": name, "norm": norm, "method": method, "dtype": str(dtype).removeprefix("torch.")}
        attempt(setting, rows, labels, partial(_captured, setting, name, norm, method, dtype))
    for method in [name for name in FORMS if name not in RULES]:
        labels = {"network": "mlp", "norm": "prop", "method": method, "dtype": "float64"}
        attempt(setting, rows, labels, partial(_captured, setting, "mlp", "prop", method, torch.float64))
    for method in RULES:
        labels = {"method": method, "dtype": "float64"}
        attempt(setting, rows, {"network": "mlp, adam", **labels}, partial(_captured_adam, setting, method))
        attempt(setting, rows, {"network": "nin, no waiting", **labels}, partial(_without_waiting, setting, method))
    attempt(setting, rows, {"network": "mlp, not to be recorded"}, partial(_not_recorded, setting))
    return of_all(rows)


def _recorder(setting: Conditions, network: nn.Module, optimizer: torch.optim.Optimizer) -> Record:
    return record_cuda if setting.device.type == "cuda" else again(network, optimizer)


def _compared(captured: Captured, alone: Rule, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The largest deviation of what steps say."""
    found = 0.0
    for batch in batches:
        ours, theirs = captured.step(*batch), alone.step(*batch)
        found = max(found, deviation([ours.loss, ours.output], [theirs.loss, theirs.output]))
    return found


def _captured_adam(setting: Conditions, method: str) -> Row:
    networks = [MLP((3, 32, 32), 10, 8, seed=0).to(setting.device, torch.float64) for _ in range(2)]
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.001) for each in networks]
    one, other = (
        RULES[method](each, optimizer, F.cross_entropy) for each, optimizer in zip(networks, optimizers, strict=True)
    )
    captured = Captured(one, optimizers[0], _recorder(setting, networks[0], optimizers[0]), must=True)
    set_capturable(optimizers[1], optimizers[1].param_groups, True)  # which counts in float32
    batches = [_images(setting.device, torch.float64, number) for number in range(WARM_UP + 3)]
    found = _compared(captured, other, batches)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] /= 2
    found = max(found, _compared(captured, other, batches))
    found = max(found, deviation(networks[0].state_dict(), networks[1].state_dict()))
    return replays(captured, 6) | judged(found, TOLERANCE[torch.float64])


def replays(captured: Captured, expected: int) -> Row:
    """How many steps were replays.

    Raises:
        RuntimeError: Another number than expected.
    """
    if captured.replayed != expected:
        raise RuntimeError(f"{captured.replayed} of {expected} steps were replayed")
    return {"replayed": captured.replayed}


def _without_waiting(setting: Conditions, method: str) -> Row:
    """The loader, recorded steps, sums, and looks at them: what a training loop does within an epoch."""
    size, steps = 8, 8 if setting.dry_run else 60
    x = torch.randint(256, (size * steps, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loader = EpochLoader(Images(x, torch.arange(len(x)) % 10), size, augment="flip", device=setting.device)
    network = NIN((3, 32, 32), 10, 0.03, "batch", seed=0).to(setting.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    rule = RULES[method](network, optimizer, F.cross_entropy)
    captured = Captured(rule, optimizer, _recorder(setting, network, optimizer), must=True)
    sums, seen, given = torch.zeros((), dtype=torch.float64, device=setting.device), Readings(), []
    try:
        for number, (images, labels) in enumerate(loader):
            sums += captured.step(images, labels).loss
            if number == WARM_UP:  # recorded by now
                set_waiting(setting.device, allowed=False)
            if number % 5 == 0:
                given.append(seen.look(sums, number))
    finally:
        set_waiting(setting.device, allowed=True)
    kept = [each for each in (*given, seen.take()) if each is not None]
    right = [step for step, _ in kept] == [*range(0, steps, 5)] and all(math.isfinite(value) for _, (value,) in kept)
    return {"status": "passed" if right else "failed", "looks": len(kept)} | replays(captured, steps - WARM_UP)


def _not_recorded(setting: Conditions) -> Row:
    """A loss that waits for the GPU: said once, with the reason, and trained as ever."""
    networks = [MLP((3, 32, 32), 10, 8, seed=0).to(setting.device, torch.float64) for _ in range(2)]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in networks]

    def waiting(logits: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, y)
        return loss if loss.item() >= 0 else -loss

    def refused(_: Any) -> Any:
        raise RuntimeError("not permitted when stream is capturing")

    record = record_cuda if setting.device.type == "cuda" else refused
    one, other = (Backprop(each, held, waiting) for each, held in zip(networks, optimizers, strict=True))
    captured, said = Captured(one, optimizers[0], record), io.StringIO()
    with redirect_stderr(said):
        found = _compared(captured, other, [_images(setting.device, torch.float64, n) for n in range(WARM_UP + 3)])
    row = judged(max(found, deviation(networks[0].state_dict(), networks[1].state_dict())), TOLERANCE[torch.float64])
    lines = [line for line in said.getvalue().splitlines() if "CUDA graph" in line]
    if len(lines) != 1 or captured.replayed:
        row["status"] = "failed"
    return row | {"said": lines} | replays(captured, 0)


def _captured(setting: Conditions, name: str, norm: str, method: str, dtype: torch.dtype) -> Row:
    shape = (3, 32, 32)
    network: nn.Module = (
        MLP(shape, 10, 8, norm=norm, seed=0) if name == "mlp" else NIN(shape, 10, 0.03, norm=norm, seed=0)
    )
    network.to(setting.device, dtype)
    alone = copy.deepcopy(network)
    held = []
    for each in (network, alone):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01, momentum=0.9)
        held.append((FORMS[method](each, optimizer, F.cross_entropy, after_update=projector(each)), optimizer))
    captured = Captured(*held[0], _recorder(setting, network, held[0][1]), must=True)
    repeats, found = 2 if setting.dry_run else 5, 0.0
    with precise("fp32", setting.device):
        for number in range(WARM_UP + repeats):
            batch = _images(setting.device, dtype, number)
            ours, theirs = captured.step(*batch), held[1][0].step(*batch)
            found = max(found, deviation([ours.loss, ours.output], [theirs.loss, theirs.output]))
    found = max(found, deviation(network.state_dict(), alone.state_dict()))
    return replays(captured, repeats) | judged(found, TOLERANCE[dtype])


# --- a training under Lightning --------------------------------------------------------------------------------------


def training(setting: Conditions, rows: list[Row]) -> str:
    """Under Lightning, steps recorded or not: nothing within an epoch waits for the GPU, and what is learnt is learnt.

    Against the update rule alone on the same batches.
    """
    import backforward_suite.train.module  # noqa: F401  (where Lightning is missing, this part is skipped)

    for method, captured in product(RULES, (False, True)):
        labels = {"method": method, "captured": captured}
        attempt(setting, rows, labels, partial(_trained, setting, method, captured))
    return of_all(rows)


def _trained(setting: Conditions, method: str, captured: bool) -> Row:
    import backforward_suite._torchvision  # noqa: F401, I001  (before Lightning, which imports torchvision)
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger

    from backforward_suite.train.module import Classification, EachBatch, InMemoryData, quiet_lightning

    size, steps, epochs = 8, 12 if setting.dry_run else 60, 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (size * steps, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images, few = (Images(x[:count], torch.arange(count) % 10) for count in (len(x), 20))
    data = DataSplits("random", 10, (3, 32, 32), images, few, few, fingerprint="", source="")
    network = NIN((3, 32, 32), 10, 0.03, "batch", seed=0)
    alone = copy.deepcopy(network).to(setting.device, torch.float64)

    def optimizer(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    class NoWaiting(EachBatch):
        """Lets whatever makes the host wait for the GPU raise an error, once steps may be recorded in an epoch."""

        watched = 0

        def before_batch(self, *given: Any) -> None:
            if given[-1] % steps > WARM_UP:
                self.watched += 1
                set_waiting(setting.device, allowed=False)

        def after_batch(self, *given: Any) -> bool:
            if given[-1] % steps == 0:  # the evaluation may wait
                set_waiting(setting.device, allowed=True)
            return False

    quiet_lightning()
    watch = NoWaiting()
    module = Classification(network, optimizer, RULES[method], check_every=5, capture="on" if captured else "off")
    also = observers()
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=setting.device.type,
            devices=1,
            precision="64-true",
            max_epochs=epochs,
            num_sanity_val_steps=-1,
            log_every_n_steps=steps,
            callbacks=[watch, *also],
            use_distributed_sampler=False,
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, InMemoryData(data, size, seed=0, augment="flip"))
        finally:
            set_waiting(setting.device, allowed=True)
    rule = RULES[method](alone, optimizer(alone), F.cross_entropy)
    loader = EpochLoader(images, size, seed=0, augment="flip", device=setting.device)
    for number in range(epochs):
        loader.set_epoch(number)
        for x, y in loader:
            rule.step(x.double(), y)
    ours, theirs = (each.cpu().state_dict() for each in (network, alone))
    if isinstance(module.rule, Captured):
        replays(module.rule, epochs * steps - WARM_UP)
    names = [type(each).__name__ for each in also]
    return {"watched": watch.watched, "observers": names} | judged(deviation(ours, theirs), TOLERANCE[torch.float64])


def observers() -> list[Any]:
    """The record and the bar of a run, where what they need is installed: they look at numbers within an epoch."""
    try:
        from backforward_suite.train.bar import ProgressBar
        from backforward_suite.train.callbacks.record import RunRecord
    except ModuleNotFoundError:
        return []
    return [RunRecord(None, log_every=5), ProgressBar(seconds=0)]


def set_waiting(device: torch.device, *, allowed: bool) -> None:
    """Whether torch raises an error where the host waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default" if allowed else "error")


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(setting: Conditions, rows: list[Row]) -> str:
    """What is held after a step does not grow with the steps."""
    for method, captured in product(RULES, (False, True)):
        labels = {"method": method, "captured": captured}
        attempt(setting, rows, labels, partial(_memory, setting, method, captured))
    return of_all(rows)


def _memory(setting: Conditions, method: str, captured: bool) -> Row:
    network = NIN((3, 32, 32), 10, 0.03 if setting.dry_run else 0.25, norm="batch", seed=0).to(setting.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    rule = RULES[method](network, optimizer, F.cross_entropy)
    record = _recorder(setting, network, optimizer)
    step = Captured(rule, optimizer, record, must=True).step if captured else rule.step
    batch = _images(setting.device, torch.float32, 0)

    def train(rates: int) -> None:  # each recorded anew
        for _ in range(rates):
            optimizer.param_groups[0]["lr"] *= 0.99
            for _ in range(WARM_UP + 2):
                step(*batch)

    train(2)
    before, reserved = held_bytes(setting.device), reserved_bytes(setting.device)
    train(2 if setting.dry_run else 40)
    after, growth = held_bytes(setting.device), reserved_bytes(setting.device) - reserved
    flat = after <= before and growth <= reserved // 2
    return {
        "status": "passed" if flat else "failed",
        "bytes_before": before,
        "bytes_after": after,
        "reserved_before": reserved,
        "reserved_growth": growth,
    }


def reserved_bytes(device: torch.device) -> int:
    """What torch's allocator has taken of the GPU's memory, whether tensors lie there or not; 0 on a CPU."""
    return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else 0


def held_bytes(device: torch.device) -> int:
    """Bytes of tensors that are alive: as the GPU's allocator counts them, or on the host as the garbage collector."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return int(torch.cuda.memory_allocated(device))
    tensors = (each for each in gc.get_objects() if issubclass(type(each), Tensor))
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


# --- several GPUs ----------------------------------------------------------------------------------------------------


def ddp(setting: Conditions, rows: list[Row]) -> str:
    """One process a GPU, gradients averaged by nccl (two by gloo on a CPU): bitwise equal, and as one on the batch."""
    ranks = torch.cuda.device_count() if setting.device.type == "cuda" else 2
    backend = "nccl" if setting.device.type == "cuda" else "gloo"
    attempt(setting, rows, {"ranks": ranks, "backend": backend}, partial(_ddp, setting, ranks, backend))
    return of_all(rows)


def _ddp(setting: Conditions, ranks: int, backend: str) -> list[Row]:
    kind = setting.device.type
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(train_as_rank, (ranks, backend, kind, folder), ranks, join=False)
        assert context is not None
        until = min(setting.due, time.monotonic() + 90)
        try:
            while not context.join(timeout=1):
                if time.monotonic() >= until:
                    raise TimeoutError("the processes did not end in time")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        ends = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]
    whole = trained_on(setting.device, 0, 1, ranks)
    found = []
    for norm, alone in whole.items():
        expected = {key: value.cpu() for key, value in alone.items()}
        equal = all(torch.equal(end[norm][key], ends[0][norm][key]) for end in ends for key in expected)
        row = judged(deviation(ends[0][norm], expected), TOLERANCE[torch.float64])
        found.append(row | {"norm": norm, "ranks_bitwise": equal} | ({} if equal else {"status": "failed"}))
    return found


def train_as_rank(rank: int, ranks: int, backend: str, kind: str, folder: str) -> None:
    """A process: train on this rank's share of each batch, leave the weights in the folder."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    meeting = Path(folder, "meeting").as_uri()
    dist.init_process_group(backend, meeting, timedelta(seconds=60), world_size=ranks, rank=rank)
    try:
        ends = trained_on(device, rank, ranks, ranks, reduce=mean_over_ranks)
        torch.save({norm: {k: v.cpu() for k, v in end.items()} for norm, end in ends.items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def trained_on(
    device: torch.device, rank: int, of: int, ranks: int, reduce: Any = None
) -> dict[str, dict[str, Tensor]]:
    """By norm, the weights after three batches of four images a rank, of which every `of`-th from `rank` is taken."""
    ends = {}
    for norm in ("none", "prop"):
        network = NIN((3, 32, 32), 10, 0.03, norm=norm, seed=0).to(device, torch.float64)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        rule = Backforward(network, optimizer, F.cross_entropy, reduce=reduce, after_update=projector(network))
        for number in range(3):
            x, y = _images(device, torch.float64, number, count=4 * ranks)
            rule.step(x[rank::of], y[rank::of])
        ends[norm] = dict(network.state_dict())
    return ends
