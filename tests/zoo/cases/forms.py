"""Forms of inputs, outputs, losses and modules."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tests.zoo.cases.modes import Two
from tests.zoo.entry import CLASSES, FEATURES, Cases, images, vectors
from torch import Tensor, fx, nn

FORMS = Cases()


# --- Outputs ---------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """An output as a dataclass."""

    logits: Tensor
    hidden: Tensor | None = None


class ModelOutput(OrderedDict[str, Any]):
    """An output as a dictionary with attributes, as in transformers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Pair(NamedTuple):
    """An output as a named tuple."""

    logits: Tensor
    hidden: Tensor


class Plain:
    """An output as an object of a plain class."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def _logits(model: nn.Module) -> Any:
    return lambda output, y: F.cross_entropy(output.logits, y)


@FORMS.add(loss_of=_logits)
class DataclassOutput(Two):
    """The loss reads output.logits of a dataclass."""

    def forward(self, x: Tensor) -> Any:
        return Parts(super().forward(x))


@FORMS.add(loss_of=_logits)
class DictionaryWithAttributes(Two):
    """The loss reads output.logits of a dictionary subclass."""

    def forward(self, x: Tensor) -> Any:
        return ModelOutput(logits=super().forward(x), none=None)


@FORMS.add(loss_of=_logits)
class NamedTupleOutput(Two):
    """The loss reads output.logits of a named tuple."""

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.first(x))
        return Pair(self.head(h), self.middle(h))


@FORMS.add(loss_of=_logits)
class ObjectOutput(Two):
    """The loss reads output.logits of an object of a plain class."""

    def forward(self, x: Tensor) -> Any:
        return Plain(super().forward(x))


@FORMS.add(loss_of=lambda model: lambda output, y: F.cross_entropy(output["logits"], y))
class DictionaryOutput(Two):
    """A dictionary with a list and a number in it."""

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.first(x))
        return {"logits": self.head(torch.tanh(self.middle(h))), "hidden": [h, h + 1], "depth": 3}


@FORMS.add(loss_of=lambda model: lambda output, y: sum(F.cross_entropy(part, y) for part in output))
class DeepSupervision(Two):
    """A list of outputs, one from each depth."""

    def forward(self, x: Tensor) -> list[Tensor]:
        h = torch.tanh(self.first(x))
        return [self.head(h), self.head(torch.tanh(self.middle(h)))]


@FORMS.add(loss_of=lambda model: lambda output, y: F.mse_loss(*output))
class SiameseOutput(Two):
    """Two calls of one network, the second on a shifted input, compared with each other."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), super().forward(x.flip(0)).detach()


# --- Inputs ----------------------------------------------------------------------------------------------------------


@FORMS.add(batches=lambda: [({"x": x, "scale": 2.0}, y) for x, y in vectors()])
class KeywordInputs(Two):
    """Inputs by keyword, one of them a number."""

    def forward(self, x: Tensor, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return super().forward(x * scale + shift)


@FORMS.add(batches=lambda: [({"x": x}, y) for x, y in vectors()])
class KeywordOnly(Two):
    """A forward that takes keywords alone."""

    def forward(self, *, x: Tensor) -> Tensor:
        return super().forward(x)


@FORMS.add(batches=lambda: [([x, x.flip(0)], y) for x, y in vectors()])
class ListInput(Two):
    """One input that is a list of tensors."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        return super().forward(xs[0] - xs[1])


@FORMS.add(batches=lambda: [((x, None, {"mask": x > 0, "sizes": (2, [3])}, 3, "mean"), y) for x, y in vectors()])
class NestedInputs(Two):
    """Positional inputs of every kind: tensor, None, a nested dictionary, a number, a string."""

    def forward(self, x: Tensor, none: None, extra: dict[str, Any], factor: int, kind: str) -> Tensor:
        x = x.masked_fill(extra["mask"], 0) * factor + extra["sizes"][1][0]
        return super().forward(x if kind == "mean" else -x)


@FORMS.add(batches=lambda: [((x, y), y) for x, y in vectors()], loss_of=lambda model: lambda output, y: output)
class LossByModel(Two):
    """The network takes the labels and returns the loss."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(x), labels)


@FORMS.add(
    batches=lambda: [({"x": x, "labels": y}, None) for x, y in vectors()],
    loss_of=lambda model: lambda output, y: output.loss,
)
class LossInOutput(Two):
    """The network takes the labels by keyword and returns output.loss; the target is None."""

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = super().forward(x)
        return ModelOutput(loss=F.cross_entropy(logits, labels), logits=logits)


@FORMS.add(
    batches=lambda: [(x, {"class": y, "value": x[:, :1]}) for x, y in vectors()],
    loss_of=lambda model: lambda out, y: F.cross_entropy(out, y["class"]) + F.mse_loss(out[:, :1], y["value"]),
)
class DictionaryTarget(Two):
    """The target is a dictionary."""


@FORMS.add(refused="in place")
class InputChanged(Two):
    """The forward changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


@FORMS.add()
class NoiseInputWithoutGrad(Two):
    """The forward makes its own leaf that requires a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        delta = torch.zeros_like(x, requires_grad=True)
        loss = super().forward(x + delta).square().sum()
        (slope,) = torch.autograd.grad(loss, delta)
        return super().forward(x + 0.1 * slope.sign())


# --- Modules that are not plain --------------------------------------------------------------------------------------


@FORMS.add(oracle=False)
def compiled() -> nn.Module:
    """torch.compile around the whole network (backend eager)."""
    return torch.compile(Two(), backend="eager")


@FORMS.add(oracle=False)
def compiled_part() -> nn.Module:
    """torch.compile around one layer (backend eager)."""
    model = Two()
    model.middle = torch.compile(model.middle, backend="eager")
    return model


@FORMS.add(oracle=False)
def compiled_in_place() -> nn.Module:
    """module.compile() of a part (backend eager)."""
    model = Two()
    model.middle.compile(backend="eager")
    return model


def _quietly_scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def _quietly_traced(module: nn.Module, x: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, x)


def _chain() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES))


@FORMS.add(refused="script")
def scripted() -> nn.Module:
    """The whole network is a scripted module."""
    return _quietly_scripted(_chain())


@FORMS.add(refused="script")
def traced() -> nn.Module:
    """The whole network is a traced module."""
    return _quietly_traced(_chain(), torch.zeros(2, FEATURES))


@FORMS.add(refused="script")
def scripted_part() -> nn.Module:
    """One part of the network is a scripted module."""
    model = Two()
    model.middle = _quietly_scripted(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    return model


@FORMS.add(batches=images, refused="script")
def scripted_batchnorm() -> nn.Module:
    """A scripted part with BatchNorm and dropout in it."""
    part = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
    return nn.Sequential(_quietly_scripted(part), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, CLASSES))


@FORMS.add(oracle=False)
def graph_module() -> nn.Module:
    """A torch.fx GraphModule."""
    return fx.symbolic_trace(_chain())


@FORMS.add()
def nested_sequentials() -> nn.Module:
    """Sequentials in sequentials, with an identity and a flatten."""
    return nn.Sequential(
        nn.Sequential(nn.Identity(), nn.Linear(FEATURES, 6)), nn.Tanh(),
        nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 6), nn.GELU())), nn.Linear(6, CLASSES),
    )  # fmt: skip


@FORMS.add()
def in_float64() -> nn.Module:
    """A network whose middle is in double precision."""

    class Mixed(Two):
        def between(self, h: Tensor) -> Tensor:
            return self.inner(h.double()).float()

    model = Mixed()
    model.inner = nn.Linear(6, 6).double()
    return model


@FORMS.add()
def in_bfloat16() -> nn.Module:
    """A network wholly in bfloat16 but for its loss."""

    class Low(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.bfloat16()).float()

    return Low().bfloat16()
