"""Optimizers from other packages: each equals one optimizer object per group bitwise, or is refused at construction.

Needs the extra `zoo`. Run by `make zoo`, or alone: `python -m tests.zoo.optimizers [words of names]`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tests.oracles import one_per_group
from torch import Tensor, nn
from torch.optim import Optimizer

from backforward import Backforward

BATCHES = 14
HALVED = 9  # index of the batch before which all learning rates are halved
Trained = Callable[[str, nn.Parameter], bool]


class Row(NamedTuple):
    """The result for an optimizer.

    Attributes:
        optimizer: The class, and settings that set it apart.
        package: On PyPI, with its version.
        verdict: `equal`, `refused` or `wrong`. An equal one also resumes bitwise from a checkpoint, unless that
            cannot be loaded with `weights_only=True`, with or without Backforward.
        reason: The message of a refusal; else what is wrong, or why there is no such checkpoint.
    """

    optimizer: str
    package: str
    verdict: str
    reason: str


# --- Networks and batches --------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """Return a small network with a convolution, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 4))


def matrices(bias: bool = False) -> nn.Sequential:
    """Return a small network of linear layers, the same each time."""
    torch.manual_seed(0)
    layers = (
        nn.Linear(25, 8, bias=bias),
        nn.Tanh(),
        nn.Linear(8, 8, bias=bias),
        nn.Tanh(),
        nn.Linear(8, 4, bias=bias),
    )
    return nn.Sequential(nn.Flatten(), *layers)


class Looked(nn.Module):
    """Adds an embedding of the pixels' signs, with sparse gradients, to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 1, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table((x > 0).long())[..., 0]


def embeddings() -> nn.Sequential:
    """Return two embeddings with sparse gradients between frozen layers, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), Looked(), nn.Linear(25, 25), Looked(), nn.Linear(25, 4))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Return small random images and labels, the same each time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(BATCHES):
        yield torch.randn(6, 1, 5, 5, generator=generator), torch.randint(4, (6,), generator=generator)


@dataclass(frozen=True)
class Case:
    """An optimizer and how to make it.

    Attributes:
        package: Its name on PyPI.
        name: The class, and settings that set it apart.
        make: Makes one for a module's trainable parameters.
        trained: Selects the parameters to train.
        network: Builds the network to train.
        refused: Part of the refusal, if it must be refused.
    """

    package: str
    name: str
    make: Callable[[nn.Module], Optimizer]
    trained: Trained = lambda name, parameter: True
    network: Callable[[], nn.Sequential] = network
    refused: str = ""


# --- The check -------------------------------------------------------------------------------------------------------


def check(case: Case) -> Row:
    """Compare Backforward with one optimizer to a plain loop with one optimizer object per group."""
    row = partial(Row, case.name, f"{case.package} {version(case.package)}")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            found = _compare(case)
            note = "" if found else _resume(case)
        except Exception as error:
            return row("wrong", f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0])
    if case.refused and case.refused not in found:
        return row("wrong", found or f"not refused ({case.refused})")
    if found or note == RESUMED_ELSEWHERE:
        return row("refused" if case.refused else "wrong", found or note)
    return row("equal", note)


RESUMED_ELSEWHERE = "weights differ after a checkpoint"


def _compare(case: Case) -> str:
    """Return the refusal, or what differs, or ""."""
    ours, optimizer = _build(case)
    theirs, _ = _build(case)
    try:
        rule = Backforward(ours, optimizer, F.cross_entropy)
    except (TypeError, ValueError) as refusal:
        return str(refusal).removeprefix("Backforward: ")
    groups, each = [], []
    for name, module in theirs.named_children():
        if names := [f"{name}.{rest}" for rest, p in module.named_parameters() if p.requires_grad]:
            groups.append(names)
            each.append([case.make(module)])
            _train_mode(each[-1][0])
    change = partial(_set_rates, 0.5 * optimizer.param_groups[0].get("lr", 1.0))
    _seed()
    for batch, (x, y) in enumerate(batches()):
        change([optimizer], batch)
        rule.step(x, y)
    _seed()
    flat = [own[0] for own in each]
    one_per_group.train(theirs, each, groups, F.cross_entropy, batches(), before_batch=partial(change, flat))
    state, start = theirs.state_dict(), case.network().state_dict()
    if apart := [name for name, value in ours.state_dict().items() if not torch.equal(value, state[name])]:
        return f"{', '.join(apart)} differ"
    if not all(bool(value.isfinite().all()) for value in state.values()):
        return "weights are not finite"
    still = [name for names in groups for name in names if torch.equal(state[name], start[name])]
    return f"{', '.join(still)} did not move" if still else ""


def _resume(case: Case) -> str:
    """Return whether resuming from a checkpoint changes the result, or why there is none, or ""."""
    ends, file = [], io.BytesIO()
    for resumed in (False, True):
        model, optimizer = _build(case)
        rule = Backforward(model, optimizer, F.cross_entropy)
        for batch, (x, y) in enumerate(batches()):
            if batch == BATCHES // 2:
                _seed()
                if resumed:
                    file.seek(0)
                    try:
                        saved = torch.load(file, weights_only=True)
                    except UnpicklingError:
                        return "no checkpoint: its state holds more than numbers and tensors"
                    model.load_state_dict(saved["model"])
                    optimizer.load_state_dict(saved["optimizer"])
                else:
                    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            if batch >= BATCHES // 2 or not resumed:
                rule.step(x, y)
        ends.append(list(model.parameters()))
    return "" if all(map(torch.equal, *ends)) else RESUMED_ELSEWHERE


def _build(case: Case) -> tuple[nn.Sequential, Optimizer]:
    model = case.network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.trained(name, parameter))
    optimizer = case.make(model)
    _train_mode(optimizer)
    return model, optimizer


def _seed() -> None:
    torch.manual_seed(2)
    np.random.seed(2)


def _set_rates(lr: float, optimizers: Sequence[Optimizer], batch: int) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups if batch == HALVED):
        group["lr"] = lr


def _train_mode(optimizer: Optimizer) -> None:
    train = getattr(optimizer, "train", None)
    if callable(train):
        train()


# --- The optimizers --------------------------------------------------------------------------------------------------


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def plain(optimizer: Callable[..., Optimizer], **settings: Any) -> Callable[[nn.Module], Optimizer]:
    """Return a function that makes the optimizer from a list of parameters."""
    return lambda module: optimizer(trained(module), **settings)


def with_muon(optimizer: Callable[..., Optimizer]) -> Callable[[nn.Module], Optimizer]:
    """Return a function that makes it from two param groups: matrices, and all others, which Adam steps."""

    def make(module: nn.Module) -> Optimizer:
        parts = [{"params": [p for p in trained(module) if (p.dim() > 1) == flag], "use_muon": flag} for flag in (1, 0)]
        return optimizer([{**part, "use_muon": bool(part["use_muon"])} for part in parts if part["params"]])

    return make


def cases() -> Iterator[Case]:
    """Return all optimizers, package by package."""
    yield from _torch()
    yield from _schedulefree()
    yield from _from_packages()
    yield from _pytorch_optimizer()


def _torch() -> Iterator[Case]:
    case = partial(Case, "torch")
    special = {"Optimizer", "LBFGS", "Muon", "SparseAdam", "SGD"}
    for name, optimizer in vars(torch.optim).items():
        if inspect.isclass(optimizer) and issubclass(optimizer, Optimizer) and name not in special:
            yield case(name, plain(optimizer))
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    yield case("SGD", plain(sgd, lr=0.1))
    yield case("SGD(momentum, nesterov)", plain(sgd, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01))
    yield case("SGD(maximize)", plain(sgd, lr=0.01, maximize=True))
    yield case("SGD(foreach)", plain(sgd, lr=0.1, momentum=0.9, foreach=True))
    yield case("SGD(fused)", plain(sgd, lr=0.1, momentum=0.9, fused=True))
    yield case("Adam(amsgrad)", plain(adam, amsgrad=True))
    yield case("Adam(foreach)", plain(adam, foreach=True))
    yield case("Adam(fused)", plain(adam, fused=True))
    yield case("Muon", plain(torch.optim.Muon), network=matrices)
    yield case("SparseAdam", plain(torch.optim.SparseAdam), lambda name, p: "table" in name, embeddings)
    yield case("LBFGS", plain(torch.optim.LBFGS), refused="needs a closure")
    yield case("SGD(differentiable)", plain(sgd, lr=0.1, differentiable=True), refused="differentiable")


def _schedulefree() -> Iterator[Case]:
    case, free = partial(Case, "schedulefree"), import_module("schedulefree")
    for name in ("SGDScheduleFree", "AdamWScheduleFree"):
        yield case(name, plain(getattr(free, name)))
        yield case(f"{name}(warmup)", plain(getattr(free, name), warmup_steps=10, weight_decay=0.01, r=0.5))
        yield case(f"{name}Reference", plain(getattr(free, f"{name}Reference"), warmup_steps=10))
    yield case("AdamWScheduleFreePaper", plain(free.AdamWScheduleFreePaper, warmup_steps=10))
    yield case("RAdamScheduleFree", plain(free.RAdamScheduleFree, lr=0.01))
    for name in ("SGDScheduleFreeClosure", "AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure"):
        yield case(name, plain(getattr(free, name), lr=0.01), refused="needs a closure")
    for name in ("ScheduleFreeWrapper", "ScheduleFreeWrapperReference"):
        wrapper = getattr(free, name)
        yield case(
            name,
            lambda module, wrapper=wrapper: wrapper(torch.optim.SGD(trained(module), lr=0.1)),
            refused="that it wraps",
        )


def _from_packages() -> Iterator[Case]:
    prodigy = import_module("prodigyopt").Prodigy
    yield Case("prodigyopt", "Prodigy", plain(prodigy))
    yield Case(
        "prodigyopt",
        "Prodigy(bias correction, warm-up)",
        plain(prodigy, use_bias_correction=True, safeguard_warmup=True, growth_rate=1.5, weight_decay=0.01),
    )
    yield Case("prodigyopt", "Prodigy(slices)", plain(prodigy, slice_p=3, d0=1e-3))
    dadaptation = import_module("dadaptation")
    for name in ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"):
        yield Case("dadaptation", name, plain(getattr(dadaptation, name), d0=1e-3))
    muon = import_module("muon")
    yield Case("muon-optimizer", "SingleDeviceMuon", plain(muon.SingleDeviceMuon), network=matrices)
    yield Case(
        "muon-optimizer",
        "SingleDeviceMuonWithAuxAdam",
        with_muon(muon.SingleDeviceMuonWithAuxAdam),
        network=partial(matrices, True),
    )
    yield Case("muon-optimizer", "Muon", plain(muon.Muon), network=matrices, refused="process group")
    yield Case("muon-optimizer", "MuonWithAuxAdam", with_muon(muon.MuonWithAuxAdam), refused="process group")
    lion = import_module("lion_pytorch").Lion
    yield Case("lion-pytorch", "Lion", plain(lion))
    yield Case("lion-pytorch", "Lion(decoupled)", plain(lion, weight_decay=0.1, decoupled_weight_decay=True))
    madgrad = import_module("madgrad")
    for name in ("MADGRAD", "MirrorMADGRAD"):
        yield Case("madgrad", name, plain(getattr(madgrad, name)))
    for name in ("DoG", "LDoG"):
        yield Case("dog-optimizer", name, plain(getattr(import_module("dog"), name)))
    lomo = import_module("lomo_optim")
    mini = import_module("adam_mini").Adam_mini
    yield Case(
        "adam-mini", "Adam_mini", lambda module: mini(module.named_parameters(), dim=8, n_heads=2, verbose=False)
    )
    yield Case("lomo-optim", "Lomo", lambda module: lomo.Lomo(module, lr=0.01), refused="a training loop of its own")


def _pytorch_optimizer() -> Iterator[Case]:
    """Return every optimizer of the package."""
    package = import_module("pytorch_optimizer")
    found = {n: o for n, o in vars(package).items() if inspect.isclass(o) and issubclass(o, Optimizer)}
    for name, optimizer in sorted(found.items()):
        if name in NOT_HERE:
            continue
        make, refused = plain(optimizer), REFUSED.get(name, "")
        if name in OF_MATRICES:
            make = with_muon(optimizer)
        elif name in OF_A_MODULE:
            make = lambda module, optimizer=optimizer: optimizer(module)  # noqa: E731
        elif name in WRAPPERS:
            make = lambda module, optimizer=optimizer: optimizer(torch.optim.SGD(trained(module), lr=0.1))  # noqa: E731
            refused = "wraps another optimizer; give the SGD itself"
        elif name in SETTINGS:
            make = plain(optimizer, **SETTINGS[name])
        net = matrices if name == "SpectralSphere" else network
        yield Case("pytorch_optimizer", name, make, network=net, refused=refused)


# Optimizers of pytorch_optimizer that cannot be made on one CPU or from one list of parameters.
NOT_HERE = {"DeMo", "DistributedMuon", "GSAM", "WSAM", "PCGrad", "SafeFP16Optimizer"}
OF_MATRICES = {"AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon"}
OF_A_MODULE = {"AdaLOMO", "LOMO", "AdamMini"}
WRAPPERS = {"Lookahead", "OrthoGrad", "ScheduleFreeWrapper", "TRAC"}
SETTINGS: dict[str, dict[str, Any]] = {
    "BSAM": {"num_data": 100},
    "FriendlySAM": {"base_optimizer": torch.optim.SGD, "lr": 0.1},
    "LookSAM": {"base_optimizer": torch.optim.SGD, "lr": 0.1},
    "SAM": {"base_optimizer": torch.optim.SGD, "lr": 0.1},
    "Ranger21": {"num_iterations": 100},
}
REFUSED = {
    "AdaHessian": "second derivatives",
    "SophiaH": "second derivatives",
    "AliG": "closure",
    "LBFGS": "closure",
    "EmoFact": "reads the loss",
    "EmoLynx": "reads the loss",
    "EmoNavi": "reads the loss",
    "AdaLOMO": "a training loop of its own",
    "LOMO": "a training loop of its own",
    "BSAM": "a training loop of its own",
    "FriendlySAM": "a training loop of its own",
    "LookSAM": "a training loop of its own",
    "SAM": "a training loop of its own",
    "Magma": "wraps another optimizer",
    "SaRA": "keeps '_mask_indices'",
}


def check_all(words: Sequence[str] = ()) -> list[Row]:
    """Check all optimizers, or those whose names contain one of these words."""
    return [check(case) for case in cases() if not words or any(word in case.name for word in words)]


if __name__ == "__main__":
    rows = check_all(sys.argv[1:])
    for row in rows:
        print(*row, sep="  ")
    print(*(f"{count} {verdict}" for verdict, count in Counter(row.verdict for row in rows).items()), sep=", ")
