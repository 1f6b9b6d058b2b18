"""The table of test problems: small networks, one for each way in which networks are built, with readable ids.

What each network's groups are, and in which pass its running statistics move, is written out by hand: it is what the
library has to find by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, CLASSES = 6, 4


class Residual(nn.Module):
    """Convolutions with BatchNorm, a skip connection added in place, a projection on the skip of the second block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(3)
        self.same = _Block(3, 3)
        self.wider = _Block(3, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = self.wider(self.same(x))
        return self.head(x.mean(dim=(2, 3)))


class _Block(nn.Module):
    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.project = nn.Conv2d(inside, out, 1) if inside != out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.project is None else self.project(x)
        return self.relu(out)


class Branched(nn.Module):
    """Two branches of unequal depth, joined, and a skip from the input to the head; one branch has a bare BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(5, 4)
        self.right = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4))
        self.bare = nn.BatchNorm1d(5, affine=False)
        self.head = nn.Linear(13, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.tanh(self.left(x)), self.right(x)
        return self.head(torch.cat([left * right, right, self.bare(x)], dim=1))


class Tied(nn.Module):
    """One convolution used three times with another layer in between, and a linear layer that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(2, 2, 3, padding=1)
        self.between = nn.Conv2d(2, 2, 1)
        self.down = nn.Linear(8, 8)
        self.up = nn.Linear(8, 8)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(x))
        x = torch.tanh(self.shared(self.between(x)))
        x = F.max_pool2d(self.shared(x), 4).flatten(1)
        return self.up(torch.tanh(self.down(x)))[:, :CLASSES]


class Transformer(nn.Module):
    """A pre-norm block with attention, dropout, a position embedding held by the network itself and token averaging."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.position = nn.Parameter(torch.linspace(-0.5, 0.5, 20).reshape(5, 4))
        self.norm1 = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.norm2 = nn.LayerNorm(4)
        self.feed = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.feed(self.norm2(x))
        return self.head(x.mean(1))


class Functional(nn.Module):
    """Weights held by the modules that use them, functional calls, constants and random masks between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _Dense(5, 6)
        self.second = _Dense(6, CLASSES)
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h.view(x.shape[0], -1) * self.scale[0] + self.scale[1]
        h = F.dropout(h, 0.2, self.training) + 0.1 * torch.rand_like(h)
        a, b = torch.tanh(h).chunk(2, dim=1)
        return self.second(torch.cat((b, a * torch.tensor([1.0, 2.0, 3.0])), dim=1))


class _Dense(nn.Module):
    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(out, inside).uniform_(-0.5, 0.5))
        self.b = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W, self.b)


class TwoInputs(nn.Module):
    """Two inputs, two outputs in a dictionary, nested containers, a frozen layer and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"image": nn.Sequential(nn.Linear(5, 4), nn.ReLU()), "text": nn.Linear(3, 4)})
        self.towers["text"].requires_grad_(False)
        self.heads = nn.ModuleList([nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)])

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        h = self.towers["image"](image) + self.towers["text"](text)
        return {"main": self.heads[0](h), "side": self.heads[1](h)}


class Moving(nn.Module):
    """Statistics other than BatchNorm's: one before the first layer, one in the middle, one of InstanceNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.data_norm = _RunningNorm(5)
        self.first = nn.Linear(5, 6)
        self.middle = _RunningNorm(6)
        self.second = nn.Linear(6, 6)
        self.instance = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
        self.third = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.middle(self.first(self.data_norm(x))))
        x = self.instance(self.second(x).unflatten(1, (2, 3))).flatten(1)
        return self.third(torch.tanh(x))


class _RunningNorm(nn.Module):
    """Batch statistics in training, without parameters; running ones for evaluation."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, std = x.mean(0), x.std(0) + 1e-3
            self.mean.lerp_(mean.detach(), 0.1)
            self.std.lerp_(std.detach(), 0.1)
            return (x - mean) / std
        return (x - self.mean) / self.std


class Opaque(nn.Module):
    """A submodule that torch.fx cannot trace, with two layers and dropout of its own, between ordinary layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.inner = _Choosing()
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.inner(torch.tanh(self.first(x)), scale=torch.ones(6))
        return self.last(a + b)


class _Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2))

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        if float(x.detach().sum()) > 1e6:  # a choice by value: no fixed graph
            return x, x
        return torch.tanh(self.one(x)) * scale, self.two(x)


class ByValue(nn.Module):
    """A network whose own forward chooses by value: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.first(x)))
        return self.second(h if h.detach().mean() > -5 else -h)


class InPlace(nn.Module):
    """Values and views of them that later operations change, between layers and across skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        left = x.view(-1, 2, 3)
        gate = x.exp()  # reads x before it is changed
        left.mul_(self.second(torch.tanh(x + 1)).view(-1, 2, 3).sigmoid())
        x = F.relu(x + gate, inplace=True)  # sees the change made through the view
        return self.third(x)


def _mlp(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(5, 6), *extra, nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, CLASSES)
    )


def _nin() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(3, 2, 1),
        nn.Conv2d(4, CLASSES, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _weight_norm() -> nn.Sequential:
    torch_norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(torch_norm(nn.Linear(5, 6)), nn.PReLU(), nn.GroupNorm(2, 6), torch_norm(nn.Linear(6, CLASSES)))


def _recurrent() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.lstm = nn.LSTM(4, 5, num_layers=2, dropout=0.2, batch_first=True)
            self.head = nn.Linear(5, CLASSES)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.lstm(self.embed(tokens))[0][:, -1])

    return Recurrent()


@dataclass(frozen=True)
class Problem:
    """A network, a batch maker, a loss, and what the library has to find out about it."""

    id: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    groups: dict[str, list[str]]  # group -> its parameters
    statistics: dict[str, int] = field(
        default_factory=dict
    )  # module with running statistics -> pass in which they move
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy
    traceable: bool = True
    tokens: bool = False

    def model(self) -> nn.Module:
        """The network, with the same initial weights at each call. Draws nothing from the caller's generator."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.build()

    def batch(self, seed: int = 0) -> tuple[Any, Tensor]:
        """Inputs (a tuple where there are several) and targets."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            xs = tuple(torch.randint(7, (BATCH, *shape), generator=generator) for shape in self.shapes)
        else:
            xs = tuple(torch.randn((BATCH, *shape), generator=generator) for shape in self.shapes)
        y = torch.randint(CLASSES, (BATCH,), generator=generator)
        return (xs if len(xs) > 1 else xs[0]), y


def _wb(*layers: str) -> dict[str, list[str]]:
    """Each layer a group of its weight and bias."""
    return {layer: [f"{layer}.weight", f"{layer}.bias"] for layer in layers}


def _both_heads(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output["main"], target) + 0.3 * F.cross_entropy(output["side"], target)


PROBLEMS = [
    Problem("mlp", _mlp, ((5,),), _wb("1", "3", "5")),
    Problem("nin", _nin, ((2, 8, 8),), _wb("0", "2", "5", "8")),
    Problem(
        "residual",
        Residual,
        ((2, 4, 4),),
        {
            "stem": ["stem.weight", "stem_norm.weight", "stem_norm.bias"],
            "same.conv1": ["same.conv1.weight", "same.bn1.weight", "same.bn1.bias"],
            "same.conv2": ["same.conv2.weight", "same.bn2.weight", "same.bn2.bias"],
            "wider.conv1": ["wider.conv1.weight", "wider.bn1.weight", "wider.bn1.bias"],
            "wider.conv2": ["wider.conv2.weight", "wider.bn2.weight", "wider.bn2.bias"],
            **_wb("wider.project", "head"),
        },
        {"stem_norm": 0, "same.bn1": 1, "same.bn2": 2, "wider.bn1": 3, "wider.bn2": 4},
    ),
    Problem("branched", Branched, ((5,),), _wb("left", "right.0", "right.2", "head"), {"bare": 2}),
    Problem(
        "tied",
        Tied,
        ((2, 8, 8),),
        {**_wb("shared", "between", "down"), "up": ["up.bias"]},
    ),
    Problem("dropout", lambda: _mlp(nn.Dropout(0.3)), ((5,),), _wb("1", "4", "6")),
    Problem(
        "batchnorm",
        lambda: _mlp(nn.BatchNorm1d(6)),
        ((5,),),
        {"1": ["1.weight", "1.bias", "2.weight", "2.bias"], **_wb("4", "6")},
        {"2": 0},
    ),
    Problem(
        "layernorm",
        lambda: nn.Sequential(nn.LayerNorm(5), *_mlp(nn.LayerNorm(6))),
        ((5,),),
        {"2": ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"], **_wb("5", "7")},
    ),
    Problem(
        "transformer",
        Transformer,
        ((5, 3),),
        {
            **_wb("embed"),
            "Transformer": ["position", "norm1.weight", "norm1.bias"],
            "attention": ["attention.in_proj_weight", "attention.in_proj_bias"],
            "attention.out_proj": [
                "attention.out_proj.weight",
                "attention.out_proj.bias",
                "norm2.weight",
                "norm2.bias",
            ],
            **_wb("feed.0", "feed.3", "head"),
        },
    ),
    Problem(
        "functional",
        Functional,
        ((5,),),
        {"first": ["first.W", "first.b"], "scale": ["scale.0", "scale.1"], "second": ["second.W", "second.b"]},
    ),
    Problem("two-inputs", TwoInputs, ((5,), (3,)), _wb("towers.image.0", "heads.0", "heads.1"), loss=_both_heads),
    Problem(
        "moving",
        Moving,
        ((5,),),
        {
            **_wb("first"),
            "second": ["second.weight", "second.bias", "instance.weight", "instance.bias"],
            **_wb("third"),
        },
        {"data_norm": 0, "middle": 0, "instance": 1},
    ),
    Problem(
        "opaque",
        Opaque,
        ((5,),),
        {
            **_wb("first", "inner.one"),
            "inner.two.0": ["inner.two.0.weight", "inner.two.0.bias", "inner.two.1.weight", "inner.two.1.bias"],
            **_wb("last"),
        },
        {"inner.two.1": 2},
    ),
    Problem("in-place", InPlace, ((5,),), _wb("first", "second", "third")),
    Problem(
        "weight-norm",
        _weight_norm,
        ((5,),),
        {
            "0": ["0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
            "1": ["1.weight", "2.weight", "2.bias"],
            "3": ["3.bias", "3.parametrizations.weight.original0", "3.parametrizations.weight.original1"],
        },
    ),
    Problem(
        "recurrent",
        _recurrent,
        ((4,),),
        {
            "embed": ["embed.weight"],
            "lstm": [
                f"lstm.{kind}_{gate}_l{i}" for i in (0, 1) for kind in ("weight", "bias") for gate in ("ih", "hh")
            ],
            **_wb("head"),
        },
        tokens=True,
    ),
    Problem("by-value", ByValue, ((5,),), _wb("first", "second"), traceable=False),
]

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}
