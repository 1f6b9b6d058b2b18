"""Running statistics and other buffers that a forward moves."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from tests.zoo.entry import CLASSES, FEATURES, Cases, images
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

STATISTICS = Cases()


class Convs(nn.Module):
    """Two convolutions, each with the norm of the case, and a head."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d, **settings: object) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm1 = norm(4, **settings)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2 = norm(4, **settings)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)) + h)
        return self.head(h.mean((2, 3)))


class _CallsSuper(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


@STATISTICS.add(batches=images)
def batchnorm_calls_super() -> nn.Module:
    """A BatchNorm subclass whose forward adds an activation."""
    return Convs(_CallsSuper)


class _WrittenOut(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        own = self.training or (self.running_mean is None and self.running_var is None)
        kept = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if kept else None,
            self.running_var if kept else None,
            self.weight,
            self.bias,
            own,
            factor,
            self.eps,
        )
        return F.relu(x, inplace=True)


@STATISTICS.add(batches=images)
def batchnorm_act() -> nn.Module:
    """A BatchNorm subclass that writes torch's forward out, then an activation in place (as timm's does)."""
    return Convs(_WrittenOut)


@STATISTICS.add(batches=images)
def batchnorm_act_cumulative() -> nn.Module:
    """The same with momentum=None: the factor is 1 / number of batches, a Python float."""
    return Convs(_WrittenOut, momentum=None)


class _CallsFunctional(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.2)


@STATISTICS.add(batches=images)
def batchnorm_calls_functional() -> nn.Module:
    """A BatchNorm subclass that calls F.batch_norm, whatever track_running_stats says."""
    return Convs(_CallsFunctional)


class _NoClass(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, weight=self.scale, training=self.training)


@STATISTICS.add(batches=images)
def functional_batchnorm() -> nn.Module:
    """F.batch_norm in a module that is no BatchNorm, with buffers under other names."""
    return Convs(_NoClass)


class _ByHand(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        with torch.no_grad():
            self.mean.lerp_(mean, 0.1)
            self.var.mul_(0.9).add_(var, alpha=0.1)
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()


@STATISTICS.add(batches=images)
def batchnorm_by_hand() -> nn.Module:
    """BatchNorm written with elementary operations, no weights, buffers moved under no_grad."""
    return Convs(_ByHand)


class _Renorm(_ByHand):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        scale = (var.detach() / self.var).sqrt().clamp(1 / 3, 3)
        shift = ((mean.detach() - self.mean) / self.var.sqrt()).clamp(-5, 5)
        out = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        out = out * scale[:, None, None] + shift[:, None, None]
        self.mean += 0.1 * (mean.detach() - self.mean)
        self.var += 0.1 * (var.detach() - self.var)
        return out


@STATISTICS.add(batches=images)
def batch_renorm() -> nn.Module:
    """Batch renormalisation computes with its running statistics, then moves them."""
    return Convs(_Renorm)


@STATISTICS.add(batches=images)
def batchnorm_cumulative() -> nn.Module:
    """BatchNorm with momentum=None."""
    return Convs(momentum=None)


@STATISTICS.add(batches=images)
def batchnorm_without_weights() -> nn.Module:
    """BatchNorm with affine=False."""
    return Convs(affine=False)


@STATISTICS.add(batches=images)
def batchnorm_without_statistics() -> nn.Module:
    """BatchNorm with track_running_stats=False."""
    return Convs(track_running_stats=False)


@STATISTICS.add(batches=images)
class FrozenBatchNorm(Convs):
    """BatchNorm held in evaluation mode: its running statistics are read, and stay."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        super().train(mode)
        self.norm1.eval()
        return self


def _evaluation(model: nn.Module, i: int) -> None:
    model.norm1.train(i != 1)


@STATISTICS.add(batches=images, between=_evaluation)
def batchnorm_switched() -> nn.Module:
    """BatchNorm set to evaluation mode for one batch."""
    return Convs()


@STATISTICS.add(batches=images)
class SharedBatchNorm(Convs):
    """One BatchNorm used twice in a forward: its statistics move twice a batch."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm1(self.conv2(h)))
        return self.head(h.mean((2, 3)))


@STATISTICS.add(batches=images)
class GhostBatchNorm(Convs):
    """BatchNorm over parts of the batch: three moves a forward."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(torch.cat([self.norm1(part) for part in self.conv1(x).chunk(3)]))
        h = F.relu(self.norm2(self.conv2(h)))
        return self.head(h.mean((2, 3)))


@STATISTICS.add(batches=images)
class BatchNormOfInput(Convs):
    """BatchNorm before any layer with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.data = nn.BatchNorm2d(2, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.data(x))


@STATISTICS.add(batches=images)
class CheckpointedBatchNorm(Convs):
    """Checkpointing runs the BatchNorm a second time in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda x: F.relu(self.norm1(self.conv1(x))), x, use_reentrant=False)
        h = checkpoint(lambda h: F.relu(self.norm2(self.conv2(h))), h, use_reentrant=False)
        return self.head(h.mean((2, 3)))


@STATISTICS.add(batches=images)
class CheckpointedDropout(Convs):
    """Checkpointing draws the same dropout a second time in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda x: F.dropout(F.relu(self.conv1(x)), 0.3), x, use_reentrant=False)
        h = checkpoint(lambda h: F.dropout(F.relu(self.conv2(h)), 0.3), h, use_reentrant=False)
        return self.head(F.dropout(h.mean((2, 3)), 0.3))


@STATISTICS.add(batches=images)
def instance_norm() -> nn.Module:
    """InstanceNorm with running statistics and weights."""
    return Convs(nn.InstanceNorm2d, affine=True, track_running_stats=True)


@STATISTICS.add(batches=images)
def group_norm() -> nn.Module:
    """GroupNorm: no statistics kept."""
    return Convs(lambda width: nn.GroupNorm(2, width))


@STATISTICS.add()
def other_norms() -> nn.Module:
    """LayerNorm, RMSNorm and BatchNorm1d in a chain."""
    return nn.Sequential(
        nn.Linear(FEATURES, 6), nn.LayerNorm(6), nn.Tanh(),
        nn.Linear(6, 6), nn.RMSNorm(6), nn.Tanh(),
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES),
    )  # fmt: skip


@STATISTICS.add()
class RunningMean(nn.Module):
    """A running mean of its own, moved in place and then subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)
        self.register_buffer("mean", torch.zeros(6))

    def move(self, h: Tensor) -> None:
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        self.move(h)
        return self.head(torch.tanh(self.body(h - self.mean)))


@STATISTICS.add()
class BufferAssigned(RunningMean):
    """A buffer replaced in forward by assignment."""

    def move(self, h: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)


@STATISTICS.add()
class BufferCopied(RunningMean):
    """A buffer moved by copy_ through .data."""

    def move(self, h: Tensor) -> None:
        self.mean.data.copy_(0.9 * self.mean + 0.1 * h.data.mean(0))


@STATISTICS.add()
class BufferDataReplaced(RunningMean):
    """A buffer whose .data is replaced."""

    def move(self, h: Tensor) -> None:
        self.mean.data = 0.9 * self.mean.data + 0.1 * h.data.mean(0)


@STATISTICS.add()
class BufferByIndex(RunningMean):
    """A buffer moved through an index and a slice."""

    def move(self, h: Tensor) -> None:
        mean = h.detach().mean(0)
        self.mean[0] = mean[0]
        self.mean[1:3] += mean[1:3]
        self.mean[3:].mul_(0.5)


@STATISTICS.add()
class BufferMovedByNumpy(RunningMean):
    """A buffer moved through numpy, out of torch's sight."""

    def move(self, h: Tensor) -> None:
        shared = self.mean.numpy()
        shared *= 0.9
        shared += 0.1 * h.detach().mean(0).numpy()


@STATISTICS.add()
class BufferOfWeights(RunningMean):
    """A running mean of the next layer's weights, subtracted before that layer."""

    def move(self, h: Tensor) -> None:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(self.body.weight.mean(0), alpha=0.1)


@STATISTICS.add()
def spectral_norm() -> nn.Module:
    """The spectral_norm parametrization: power iteration in each forward."""
    layers = [parametrizations.spectral_norm(nn.Linear(a, b)) for a, b in ((FEATURES, 6), (6, 6))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), nn.Linear(6, CLASSES))


@STATISTICS.add()
def spectral_norm_hook() -> nn.Module:
    """The older spectral_norm: a pre-hook sets the weight as an attribute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [nn.utils.spectral_norm(nn.Linear(a, b)) for a, b in ((FEATURES, 6), (6, 6))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), nn.Linear(6, CLASSES))


@STATISTICS.add()
def weight_norm() -> nn.Module:
    """The weight_norm and orthogonal parametrizations."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(FEATURES, 6)), nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, CLASSES),
    )  # fmt: skip


@STATISTICS.add(oracle=False)  # its weight is no leaf and cannot be copied
def weight_norm_hook() -> nn.Module:
    """The older weight_norm: a pre-hook sets the weight as an attribute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [nn.utils.weight_norm(nn.Linear(a, b)) for a, b in ((FEATURES, 6), (6, 6))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), nn.Linear(6, CLASSES))


@STATISTICS.add()
class FakeQuantised(RunningMean):
    """Quantisation-aware training: an observer moves its range in each forward, then rounds by it."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.quantise = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)

    def forward(self, x: Tensor) -> Tensor:
        h = self.quantise(torch.tanh(self.stem(x)))
        return self.head(torch.tanh(self.body(h)))
